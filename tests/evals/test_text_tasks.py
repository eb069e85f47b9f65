"""Measures of recall over any text: which tokens count, summaries, resumption, the commands."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.intervals import Estimate
from rwkvx_jax.evals.readers import TokenScores
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.evals.tasks import ar_hits, copying, long_ppl
from rwkvx_jax.evals.tasks.ar_hits import ArHitsOptions, find_repeats
from rwkvx_jax.evals.tasks.copying import CopyOptions, passages
from rwkvx_jax.evals.tasks.long_ppl import LongPplOptions
from rwkvx_jax.tokenizer import load_tokenizer
from tests.evals.eval_models import QUIET, make_model, run_command, write_checkpoint

BYTE = load_tokenizer("byte")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    words = np.random.default_rng(0).choice(["one ", "two ", "three ", "four "], 2000)
    path.write_text("".join(words))
    return path


class Scorer:
    """Scores that `rule` makes of a whole text: the losses of predicting text[1:]."""

    def __init__(self, rule, stop_after=None):
        self.rule, self.stop_after, self.read = rule, stop_after, []

    def __call__(self, tested, *, prefill_chunk, batch, longest):
        def score(texts, advance):
            assert max(map(len, texts)) <= longest + 1
            if self.stop_after is not None and len(self.read) >= self.stop_after:
                raise KeyboardInterrupt
            self.read += [(tested.label, len(text)) for text in texts]
            advance(sum(len(text) - 1 for text in texts))
            losses = [np.asarray(self.rule(tested, text), np.float32) for text in texts]
            return [TokenScores(own, own < 1) for own in losses]

        return score


@given(arrays(np.int32, st.integers(2, 60), elements=st.integers(0, 2)), st.integers(2, 5))
def test_repeats_are_those_that_a_search_finds(tokens, ngram):
    found = find_repeats(tokens, ngram)
    text = tokens.tolist()
    for t in range(1, len(text)):
        begin, distance, times = t - ngram + 1, 0, 0
        for earlier in range(begin):
            if begin >= 0 and text[earlier : earlier + ngram] == text[begin : t + 1]:
                distance, times = begin - earlier, times + 1
        assert (found.distance[t - 1], found.times[t - 1]) == (distance, times)


def test_hits_and_others_are_all_predictions(text, tmp_path):
    options = ArHitsOptions(
        checkpoint=(Path("m"),), output=tmp_path, text=text, length=300, skip=10, documents=3
    )
    rule = lambda model, text: np.arange(len(text) - 1)
    results = ar_hits.evaluate(options, [make_model()], QUIET, Scorer(rule))
    trials = read_results(tmp_path / "ar_hits.jsonl")["models"][0]["trials"]
    assert results.document["settings"]["ngram"] == 8, "of bytes"
    for trial in trials:
        hits = ar_hits._all_hits(trial)
        assert hits["tokens"] + trial["others"]["tokens"] == 300 - 6
        assert hits["loss"] + trial["others"]["loss"] == sum(range(6, 300))
        assert sum(part["tokens"] for part in trial["times"]) == hits["tokens"] > 0
    summary = results.summary("model")
    tokens = [trial["others"]["tokens"] for trial in trials]
    losses = [trial["others"]["loss"] for trial in trials]
    assert summary["others"]["loss"] == Estimate.of_ratio(losses, tokens)
    assert ar_hits.summarize([]) == {"hits": None, "others": None, "distance": [], "times": []}


def test_a_ratio_has_the_interval_of_its_documents():
    value, low, high = Estimate.of_ratio([2.0, 6.0], [1.0, 3.0])
    assert value == low == high == 2.0, "both documents agree, whatever their sizes"
    value, low, high = Estimate.of_ratio([1.0, 2.0, 6.0], [1.0, 1.0, 1.0])
    error = np.std([1, 2, 6], ddof=1) / 3**0.5  # as of a mean, where all weigh alike
    assert value == 3 and high - value == pytest.approx(1.96 * error)
    assert Estimate.of_ratio([4.0], [2.0]) == (2.0, None, None)


def test_gains_are_of_the_same_documents(text, tmp_path):
    flags = {"checkpoint": (Path("m"),), "output": tmp_path, "text": text, "length": 300}
    models = [make_model(), make_model("other", scale=2.0)]
    rule = lambda model, text: np.full(len(text) - 1, 1.0 + (model.label == "other"))
    results = ar_hits.evaluate(ArHitsOptions(**flags, documents=3), models, QUIET, Scorer(rule))
    (row,) = ar_hits.gains(results.document["models"]).rows
    assert row[0] == "other" and row[-2:] == ["1.000 ± 0.000"] * 2
    options = CopyOptions(**flags | {"length": 20}, distances=(7, 40), lead=5, documents=2)
    rule = lambda model, text: np.full(
        len(text) - 1, 1.0 + (text[0] % 3) * (model.label == "model")
    )
    document = copying.evaluate(options, models, QUIET, Scorer(rule)).document
    (row,) = copying.differences(document["models"]).rows
    gains = [
        [t["loss_without"] - t["loss"] for t in model["trials"]] for model in document["models"]
    ]
    assert row[1].startswith(f"{np.mean(gains[0][:2]) - np.mean(gains[1][:2]):.2f}")


def test_passages_come_again_after_their_distance(text, tmp_path):
    options = CopyOptions(
        checkpoint=(Path("m"),),
        output=tmp_path,
        text=text,
        length=20,
        distances=(7, 0, 40),
        lead=5,
        documents=2,
    )
    found = passages(options, BYTE)
    assert [key.distance for key in found] == [0, 0, 7, 7, 40, 40]
    for key, (known, new) in found.items():
        assert len(known) == len(new) == 40 + key.distance
        np.testing.assert_array_equal(known[:20], known[-20:])
        np.testing.assert_array_equal(known[20:], new[20:])
        assert (known[:20] != new[:20]).any()
    firsts = {key: known[:20].tolist() for key, (known, _) in found.items()}
    for key, first in firsts.items():
        assert first == firsts[key._replace(distance=0)], "every distance takes the same passages"
    # The prediction of each token of the second passage, but for the lead, costs its number there.
    rule = lambda model, text: np.arange(len(text) - 1) - (len(text) - 1 - 20)
    copying.evaluate(options, [make_model()], QUIET, Scorer(rule))
    for trial in read_results(tmp_path / "copy.jsonl")["models"][0]["trials"]:
        assert trial["loss"] == trial["loss_without"] == np.mean(range(5, 20))
        assert trial["right"] == 0


def test_contexts_are_those_of_longce(text, tmp_path):
    options = LongPplOptions(
        checkpoint=(Path("m"),),
        output=tmp_path,
        text=text,
        length=103,
        window=20,
        stride=9,
        documents=3,
    )
    # A prediction costs 1 / (tokens it sees): the whole text makes each cheaper than a window.
    rule = lambda model, text: 100 / np.arange(1, len(text))
    scorer = Scorer(rule)
    results = long_ppl.evaluate(options, [make_model()], QUIET, scorer)
    whole = 100 / np.arange(1, 104)[40:]
    seen = [21 + i % 9 for i in range(103 - 40)]
    (trial, *_) = results.trials("model")
    assert trial["edges"] == [40, 80, 103]
    assert sum(trial["losses"]) == pytest.approx(whole.sum(), rel=1e-6)
    assert sum(trial["losses_short"]) == pytest.approx((100 / np.array(seen)).sum(), rel=1e-6)
    key = (100 / np.array(seen) - whole > 2) & (whole < 2)
    assert trial["key_tokens"] == key.sum() > 0
    assert trial["key_loss"] == pytest.approx(whole[key].sum(), rel=1e-6)
    gain = results.summary("model")["gain"]
    assert gain.value == pytest.approx((100 / np.array(seen) - whole).mean(), rel=1e-6)


def test_the_judge_stays_the_first_model(text, tmp_path):
    flags = {"checkpoint": (Path("m"),), "text": text, "length": 103, "window": 20, "stride": 9}
    models = [make_model(), make_model("other", scale=2.0)]
    far = lambda text: np.arange(len(text) - 1) % 7 == 0

    def rule(model, text):
        losses = np.where(far(text) & (len(text) < 100), 9.0, 1.0)
        return losses if model.label == "model" else np.full(len(text) - 1, 0.5)

    whole = LongPplOptions(**flags, output=tmp_path / "a", documents=3)
    document = long_ppl.evaluate(whole, models, QUIET, Scorer(rule)).document
    judge, other = document["models"]
    assert [t["key_tokens"] for t in judge["trials"]] == [t["key_tokens"] for t in other["trials"]]
    assert other["trials"][0]["key_loss"] == 0.5 * other["trials"][0]["key_tokens"] > 0
    # Stopped behind the judge, and continued: it reads again what the other is measured on.
    options = LongPplOptions(**flags, output=tmp_path / "b", documents=3)
    with pytest.raises(KeyboardInterrupt):
        long_ppl.evaluate(options, models, QUIET, Scorer(rule, stop_after=24))
    assert {
        t["file"] for t in read_results(tmp_path / "b" / "longppl.jsonl")["models"][0]["trials"]
    }
    again = long_ppl.evaluate(options, models, QUIET, Scorer(rule)).document
    assert again["models"] == document["models"]
    with pytest.raises(ConfigError, match="judge"):
        long_ppl.evaluate(options, models[::-1], QUIET, Scorer(rule))


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        (ArHitsOptions, {"ngram": 1}, "--ngram is 1"),
        (ArHitsOptions, {"ngram": 900, "length": 300}, "--ngram is 900"),
        (CopyOptions, {"lead": 0}, "--lead is 0"),
        (CopyOptions, {"lead": 256}, "--lead is 256: it must be below --length 256"),
        (CopyOptions, {"distances": ()}, "--distances"),
        (CopyOptions, {"distances": (-1,)}, "--distances"),
        (LongPplOptions, {"window": 0}, "--window is 0"),
        (LongPplOptions, {"length": 8192}, "must exceed twice --window 4,096"),
    ],
)
def test_bad_flags(tmp_path, kind, flags, message):
    with pytest.raises(ConfigError, match=message):
        kind(checkpoint=(Path("m"),), output=tmp_path, text=tmp_path, **flags)


def test_too_little_text_for_the_longest_distance(text, tmp_path):
    options = CopyOptions(checkpoint=(Path("m"),), output=tmp_path, text=text, distances=(99_999,))
    with pytest.raises(ConfigError, match="lower --distances, --length or --skip"):
        passages(options, BYTE)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "task, flags, title",
    [
        ("ar-hits", ["--length", 200], "recall in plain text"),
        ("copy", ["--length", 32, "--distances", "8,64"], "what is left of a passage"),
        ("longppl", ["--length", 200, "--window", 60, "--stride", 30], "use of long context"),
    ],
)
def test_commands(tmp_path, text, monkeypatch, capsys, task, flags, title):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags += ["--checkpoint", checkpoint, "--output", tmp_path, "--text", text, "--piece", 64]
    run_command(monkeypatch, task, *flags, "--documents", 2)
    assert title in capsys.readouterr().out
    name = task.replace("-", "_")
    assert read_results(tmp_path / f"{name}.jsonl")["models"][0]["trials"]
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000

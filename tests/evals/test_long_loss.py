"""Long loss: losses equal a whole forward pass, documents, bins, resumption, flags, the command."""

import codecs
from pathlib import Path

import jax
import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, RunConfig
from rwkvx_jax.evals.documents import read_documents
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.readers import TextScorer, TokenScores
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.evals.tasks.long_loss import (
    LongLossOptions,
    bin_edges,
    evaluate,
    summarize,
)
from rwkvx_jax.generate import scoring
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.tokenizer import load_tokenizer
from tests.evals.eval_models import (
    QUIET,
    TINY,
    make_model,
    random_params,
    run_command,
    write_checkpoint,
)
from tests.helpers import assert_close, shared_path

BYTE = load_tokenizer("byte")


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name, count in (("a", 300), ("b", 900), ("c", 20)):
        (folder / f"{name}.txt").write_text("".join(f"{name}{i:04d} " for i in range(count)))
    return folder


def make_options(output, text, **flags):
    flags = {"length": 500, "skip": 60, "batch": 2} | flags
    return LongLossOptions(checkpoint=(Path("model"),), output=output, text=text, **flags)


class FakeScorer:
    """Loss of each prediction: its position, times a factor that the model's label names."""

    def __init__(self, stop_after=None):
        self.stop_after, self.read = stop_after, 0

    def __call__(self, tested, *, prefill_chunk, batch, longest):
        def score(texts, advance):
            if self.stop_after is not None and self.read >= self.stop_after:
                raise KeyboardInterrupt
            assert len(texts) <= batch and {len(text) for text in texts} == {longest + 1}
            self.read += len(texts)
            advance(longest * len(texts))
            offsets = np.asarray([text[0] % 7 for text in texts], np.float32)
            losses = np.arange(longest, dtype=np.float32)[None] + offsets[:, None]
            return [TokenScores(own, own < 1) for own in losses]

        return score


@pytest.mark.thorough
def test_piecewise_losses_equal_a_whole_pass(monkeypatch):
    monkeypatch.setattr(scoring, "_PLACE_LOGITS", {})
    monkeypatch.setattr(scoring, "_BLOCK_LOGITS", 2 * 257 * 9)  # several blocks, a ragged one
    params = random_params(TINY)
    run = RunConfig(compute_dtype="float32", recurrence="sequential")
    tested = EvalModel("m", TINY, run, params, BYTE, "", None, None)
    texts = np.random.default_rng(0).integers(1, 257, (2, 62)).astype(np.int32)
    read, sizes = [], (39, 61, 4)  # a third text in the row of whichever ends first
    ragged = [texts[1, :40], texts[0], texts[1, :5]]
    scores = TextScorer(tested, prefill_chunk=16, batch=2, longest=61)(ragged, read.append)
    model = with_params(abstract_model(TINY, tested.run), params)
    logits = np.asarray(jax.jit(lambda t: model(t))(texts[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    expected = -np.take_along_axis(log_p, texts[:, 1:, None], axis=-1)[..., 0]
    likeliest = logits.argmax(-1) == texts[:, 1:]
    assert sum(read) == sum(sizes)
    for own, row, size in zip(scores, (1, 0, 1), sizes, strict=True):
        assert len(own.losses) == size
        assert_close(own.losses, expected[row, :size], rel=2e-5)
        np.testing.assert_array_equal(own.hits, likeliest[row, :size])


def test_bins_do_not_depend_on_the_length():
    assert bin_edges(300) == [0, 64, 96, 128, 192, 256, 300]
    assert bin_edges(64) == [0, 64] and bin_edges(10) == [0, 10]
    assert bin_edges(65536)[:-1] == bin_edges(60000)[:-1]


def test_documents_are_taken_from_the_files_in_turn(books, tmp_path):
    documents = read_documents(make_options(tmp_path, books), BYTE)
    assert [tuple(d) for d in documents][:5] == [
        ("a.txt", 60),
        ("b.txt", 60),
        ("a.txt", 560),
        ("b.txt", 560),
        ("a.txt", 1060),
    ]
    assert all(len(tokens) == 501 for tokens in documents.values())
    text = (books / "b.txt").read_text()
    for (file, start), tokens in documents.items():
        if file == "b.txt":
            assert BYTE.decode(tokens) == text[start : start + 501]
    (tmp_path / "marked.txt").write_bytes(codecs.BOM_UTF8 + (books / "b.txt").read_bytes())
    marked = read_documents(make_options(tmp_path, tmp_path / "marked.txt"), BYTE)
    np.testing.assert_array_equal(marked["marked.txt", 60], documents["b.txt", 60])
    one = read_documents(make_options(tmp_path, books / "b.txt", documents=2), BYTE)
    assert [tuple(d) for d in one] == [("b.txt", 60), ("b.txt", 560)]


def test_results_and_summary(books, tmp_path):
    options = make_options(tmp_path / "out", books, documents=4)
    results = evaluate(options, [make_model()], QUIET, FakeScorer())
    document = read_results(tmp_path / "out" / "long_loss.jsonl")
    assert document["settings"] == {"length": 500, "skip": 60}
    (shown,) = document["models"]
    assert len(shown["trials"]) == 4 and shown["trials"][0]["edges"] == bin_edges(500)
    summary = results.summary("model")
    offsets = [t["loss"] - 249.5 for t in shown["trials"]]
    first = summary["by_position"][0]
    assert (first["begin"], first["end"], first["documents"]) == (0, 64, 4)
    assert first["loss"] == pytest.approx(31.5 + np.mean(offsets))
    assert first["error"] == pytest.approx(np.std(offsets, ddof=1) / 2)
    assert summary["all"]["loss"] == pytest.approx(249.5 + np.mean(offsets))
    assert summarize([]) == {"all": None, "by_position": []}
    assert summarize(shown["trials"][:1])["all"]["error"] is None


def test_interrupted_limited_and_grown(books, tmp_path):
    options = make_options(tmp_path / "out", books, documents=6)
    models = [make_model(), make_model("other", scale=2.0)]
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, models, QUIET, FakeScorer(stop_after=8))
    second = FakeScorer()
    results = evaluate(options, models, QUIET, second)
    assert second.read == 4
    undisturbed = make_options(tmp_path / "x", books, documents=6)
    document = evaluate(undisturbed, models, QUIET, FakeScorer()).document
    assert results.document["models"] == document["models"]
    limited = FakeScorer()
    evaluate(make_options(tmp_path / "y", books, limit=3), [make_model()], QUIET, limited)
    assert limited.read == 3
    with pytest.raises(ConfigError, match="length: 500 -> 400"):
        evaluate(make_options(tmp_path / "y", books, length=400), models, QUIET, limited)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"length": 0}, "--length is 0"),
        ({"documents": 0}, "--documents is 0"),
        ({"skip": -1}, "--skip is -1"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        make_options(tmp_path, tmp_path, **flags)


def test_too_little_text(books, tmp_path):
    with pytest.raises(ConfigError, match=r"the longest, b.txt, has 5400; lower --length"):
        read_documents(make_options(tmp_path, books, length=6000), BYTE)
    with pytest.raises(ConfigError, match="no such .txt file, nor a folder with any"):
        read_documents(make_options(tmp_path, tmp_path / "absent"), BYTE)


@pytest.mark.thorough
def test_command_on_war_and_peace(tmp_path, monkeypatch, capsys):
    book = shared_path("data", "gutenberg_clean", "war_and_peace.txt")
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--text", book, "--length", 300]
    run_command(monkeypatch, "long-loss", *flags, "--documents", 2, "--piece", 128)
    printed = capsys.readouterr().out
    assert "0 to 64" in printed and "256 to 300" in printed
    document = read_results(tmp_path / "long_loss.jsonl")
    losses = [t["loss"] for t in document["models"][0]["trials"]]
    assert len(losses) == 2 and all(loss > np.log(257) for loss in losses)  # random weights
    assert (tmp_path / "long_loss.png").stat().st_size > 10_000

"""Passkey evaluation: prompts, scores of known readers, resumption, the results file, errors."""

import dataclasses
import errno
import io
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import grid, plots, runner
from rwkvx_jax.evals.grid import Trial, heat_maps
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.evals.tasks import passkey
from rwkvx_jax.evals.tasks.passkey import PasskeyOptions, evaluate, key_of, passkey_grid, prompt_of
from rwkvx_jax.tasks.passkey import is_eval_key
from rwkvx_jax.tokenizer import load_tokenizer
from tests.evals.eval_models import (
    QUIET,
    TINY,
    FakeReader,
    make_model,
    run_command,
    write_checkpoint,
)


def make_options(output, **flags):
    flags = {"lengths": (128, 300), "depths": 3, "trials": 2, "batch": 2} | flags
    return PasskeyOptions(checkpoint=(Path("model"),), output=output, **flags)


def copy_key(text):
    """The oracle: what the key line says."""
    return " " + re.search(r"The pass key is (\d+)\. Remember it\.", text)[1]


def guess(text):
    return f" {np.random.default_rng(len(text)).integers(10_000, 100_000)}"


@pytest.mark.parametrize("keys", ["random", "official"])
def test_oracle_scores_everything_and_a_guess_nothing(tmp_path, keys):
    for solve, expected in ((copy_key, 12), (guess, 0)):
        options = make_options(tmp_path / solve.__name__, keys=keys)
        results = evaluate(options, [make_model()], QUIET, FakeReader(solve))
        share = results.summary("model")["all"]
        assert (share["correct"], share["trials"]) == (expected, 12)


def test_official_protocol_with_an_oracle(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer")
    options = make_options(tmp_path, protocol="official", lengths=(2000,), depths=10, trials=1)
    assert options.keys == "official"
    assert options.depth_shares == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    tested = make_model(tokenizer="world")
    results = evaluate(options, [tested], QUIET, FakeReader(lambda t: copy_key(t)[1:]))
    assert results.summary("model")["all"]["accuracy"] == 1.0
    trials = results.trials("model")
    assert trials[0]["prompt_tokens"] == 1928  # of the repository, key 2733 at depth 0
    assert {trial["key"] for trial in trials} == {2733}
    third = tested.tokenizer.decode(prompt_of(options, tested.tokenizer, Trial(2000, 0.3, 0)))
    assert [len(line) for line in third.split("\n")][1::2] == [2100, 4900]


def test_a_longer_answer_is_cut_to_the_tokens_it_may_use(tmp_path):
    chatty = FakeReader(lambda text: copy_key(text) + "77")
    options = make_options(tmp_path, keys="official")  # of four and five digits
    results = evaluate(options, [make_model()], QUIET, chatty)
    assert results.summary("model")["all"]["accuracy"] == 1.0


def test_exact_prompts_have_their_length_and_unseen_keys(tmp_path):
    options = make_options(tmp_path, seed=3)
    tokenizer = load_tokenizer("byte")
    trials = passkey_grid(options).plan()
    assert options.depth_shares == (0.0, 0.5, 1.0) and len(trials) == 12
    assert trials == sorted(trials)
    assert [len(prompt_of(options, tokenizer, t)) for t in trials] == [t.length for t in trials]
    keys = [key_of(options, t) for t in trials]
    assert all(map(is_eval_key, keys)) and len(set(keys)) > 8
    assert keys != [key_of(make_options(tmp_path, seed=4), t) for t in trials]
    wider = make_options(tmp_path, seed=3, lengths=(64, 128, 300), trials=9)
    assert keys == [key_of(wider, t) for t in trials]


def test_results_file_holds_everything(tmp_path):
    options = make_options(tmp_path)
    evaluate(options, [make_model()], QUIET, FakeReader(copy_key))
    document = read_results(tmp_path / "passkey.jsonl")
    assert document["task"] == "passkey" and document["format"] == 2
    assert document["command"] and document["versions"]["jax"] == jax.__version__
    assert document["settings"] == {"protocol": "exact", "keys": "random", "seed": 0}
    assert document["plan"] == {
        "lengths": [128, 300],
        "depths": [0.0, 0.5, 1.0],
        "trials": 2,
        "limit": None,
    }
    (shown,) = document["models"]
    assert shown["label"] == "model" and shown["step"] == 70 and shown["checkpoint"] == "runs/model"
    assert shown["model"]["chunk_size"] == 8 and shown["tokenizer"] == "byte"
    assert [(t["length"], t["depth"], t["trial"]) for t in shown["trials"]] == passkey_grid(
        options
    ).plan()
    assert set(shown["trials"][0]) == {
        "length",
        "depth",
        "trial",
        "key",
        "prompt_tokens",
        "answer",
        "correct",
    }
    assert shown["trials"][0]["answer"] == f" {shown['trials'][0]['key']}"
    summary = shown["summary"]
    assert summary["all"]["correct"] == 12 and 0.7 < summary["all"]["low"] < 0.8
    assert [cell["trials"] for cell in summary["by_length"]] == [6, 6]
    assert [cell["trials"] for cell in summary["by_length_and_depth"]] == [2] * 6


def test_interrupted_run_goes_on_where_it_stopped(tmp_path):
    options = make_options(tmp_path, compare_without_attention=True)
    first = FakeReader(copy_key, stop_after=16)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, [make_model()], QUIET, first)
    document = read_results(tmp_path / "passkey.jsonl")
    assert [len(shown["trials"]) for shown in document["models"]] == [12, 4]
    assert document["models"][1]["summary"]["all"]["trials"] == 4
    second = FakeReader(copy_key)
    evaluate(options, [make_model()], QUIET, second)
    assert len(first.read) == 16 and len(second.read) == 8
    assert not set(first.read) & set(second.read)
    third = FakeReader(copy_key)
    results = evaluate(options, [make_model()], QUIET, third)
    assert third.read == []
    undisturbed = evaluate(
        make_options(tmp_path / "x", compare_without_attention=True),
        [make_model()],
        QUIET,
        FakeReader(copy_key),
    )
    assert results.document == undisturbed.document


def test_results_of_version_0_2_0_go_on(tmp_path):
    """Their models lack the fields that ModelConfig has gained since."""
    fields = "vocab_size num_blocks num_attention_blocks width head_size ffn_width attention "
    fields += "chunk_size top_k selector selector_blocks key_conv low_rank low_rank_override init "
    fields += "attention_init init_seed"
    evaluate(make_options(tmp_path, limit=5), [make_model()], QUIET, FakeReader(copy_key))
    path = tmp_path / "passkey.jsonl"
    header, *trials = path.read_text().splitlines()
    header = json.loads(header)
    header["versions"]["rwkvx-jax"] = "0.2.0"
    header["models"][0]["model"] = {name: getattr(TINY, name) for name in fields.split()}
    path.write_text("\n".join([json.dumps(header), *trials, ""]))
    rest = FakeReader(copy_key)
    results = evaluate(make_options(tmp_path), [make_model()], QUIET, rest)
    assert len(rest.read) == 7 and results.summary("model")["all"]["trials"] == 12
    stateful = make_model()._replace(config=dataclasses.replace(TINY, learned_state=True))
    with pytest.raises(ConfigError, match="learned_state"):
        evaluate(make_options(tmp_path), [stateful], QUIET, FakeReader(guess))


def test_limit_takes_the_first_trials_and_the_rest_follows(tmp_path):
    limited = make_options(tmp_path, limit=5)
    results = evaluate(limited, [make_model()], QUIET, FakeReader(copy_key))
    done = [(t["length"], t["depth"], t["trial"]) for t in results.trials("model")]
    assert done == passkey_grid(limited).plan()[:5]
    rest = FakeReader(copy_key)
    evaluate(make_options(tmp_path), [make_model()], QUIET, rest)
    assert len(rest.read) == 7


def test_a_file_grows_by_lengths_trials_and_models(tmp_path):
    evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    more = FakeReader(copy_key)
    options = make_options(tmp_path, lengths=(128, 300, 400), trials=3)
    models = [make_model(), make_model("other", scale=2.0)]
    results = evaluate(options, models, QUIET, more)
    assert len(more.read) == 27 - 12 + 27
    assert [len(results.trials(label)) for label in ("model", "other")] == [27, 27]


def test_two_processes_that_write_one_file_lose_nothing(tmp_path, caplog):
    """The second does all that is left while the first, which stops earlier, is at work."""
    second = FakeReader(copy_key)

    def interrupted_by_another(text):
        if len(first.read) == 4 and not second.read:
            evaluate(make_options(tmp_path), [make_model()], QUIET, second)
        return copy_key(text)

    first = FakeReader(interrupted_by_another)
    limited = make_options(tmp_path, limit=8)
    results = evaluate(limited, [make_model()], QUIET, first)
    assert len(second.read) == 10 and len(first.read) == 8
    assert caplog.text.count("another process writes it too") == 1
    done = [(t["length"], t["depth"], t["trial"]) for t in results.trials("model")]
    assert done == passkey_grid(make_options(tmp_path)).plan()
    (shown,) = read_results(tmp_path / "passkey.jsonl")["models"]
    assert shown == results.document["models"][0]


def test_answers_that_are_not_finite_are_refused_and_the_others_kept(tmp_path):
    class Failing(FakeReader):
        """Gives a sign of logits that are not finite at depth 0."""

        def __call__(self, tested, **sizes):
            reader = super().__call__(tested, **sizes)

            def answer(prompts, *rest):
                answers = reader(prompts, *rest)
                answers[[i for i, _ in enumerate(prompts) if self.number in (0, 3)], 1:] = -2
                self.number += 1
                return answers

            self.number = 0
            return answer

    options = make_options(tmp_path, batch=1)
    with pytest.raises(ConfigError, match="a logit of passkey trial length 128, depth 0.0, "):
        evaluate(options, [make_model()], QUIET, Failing(copy_key))
    assert not (tmp_path / "passkey.jsonl").exists()
    whole = make_options(tmp_path)
    with pytest.raises(ConfigError, match="nothing of it is stored"):
        evaluate(whole, [make_model()], QUIET, Failing(copy_key))
    assert "NaN" not in "".join(p.read_text() for p in tmp_path.glob("*.jsonl"))


def test_a_file_with_nan_is_refused(tmp_path):
    evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    path = tmp_path / "passkey.jsonl"
    path.write_text(path.read_text().replace('"correct": true', '"correct": NaN', 1))
    with pytest.raises(ConfigError, match="passkey.jsonl, line 2: correct is not finite"):
        evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    path.write_text(path.read_text().replace("NaN", "true") + "3\n")
    with pytest.raises(ConfigError, match="another shape than a results file"):
        evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))


def test_a_killed_process_leaves_half_a_line_at_most(tmp_path, caplog):
    """Whatever is cut off is made again; the file as it was stays beside it."""
    evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    path = tmp_path / "passkey.jsonl"
    whole = path.read_bytes()
    middle = whole.index(b"\n", len(whole) // 2) - 7  # of a line, however long the header is
    for number, size in enumerate((len(whole) - 3, middle, 40, 3), 1):
        path.write_bytes(whole[:size])
        reader = FakeReader(copy_key)
        evaluate(make_options(tmp_path), [make_model()], QUIET, reader)
        assert path.read_bytes() == whole
        assert len(reader.read) == 12 - max(0, whole[:size].count(b"\n") - 1)
        assert path.with_name(f"passkey.jsonl.damaged-{number}").read_bytes() == whole[:size]
        assert f"kept as passkey.jsonl.damaged-{number}" in caplog.text


def test_trials_that_stand_twice_are_told(tmp_path, caplog):
    evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    path = tmp_path / "passkey.jsonl"
    path.write_bytes(2 * path.read_bytes())
    results = evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    assert results.summary("model")["all"]["trials"] == 12
    assert "12 trials stand twice" in caplog.text


def test_results_of_other_forms_are_refused(tmp_path):
    for name, message in (("passkey.jsonl.gz", "unpack it with gunzip"), ("passkey.json", "0.1")):
        (tmp_path / name).write_text("")
        with pytest.raises(ConfigError, match=message):
            evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
        (tmp_path / name).unlink()


def test_a_file_system_without_locks_is_said_once(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    results = evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    assert len(results.trials("model")) == 12
    assert caplog.text.count("can't be locked ([Errno 37] no locks available)") == 1


def test_a_process_stops_where_another_wrote_what_it_would_drop(tmp_path):
    other = FakeReader(copy_key)
    models = [make_model(), make_model("other", scale=2.0)]

    def interrupted_by_another(text):
        if not other.read:
            evaluate(make_options(tmp_path), models, QUIET, other)
        return copy_key(text)

    with pytest.raises(ConfigError, match="it also holds 'other'"):
        options = make_options(tmp_path)
        evaluate(options, [make_model()], QUIET, FakeReader(interrupted_by_another))
    models = read_results(tmp_path / "passkey.jsonl")["models"]
    assert [len(shown["trials"]) for shown in models] == [12, 12]


@pytest.mark.parametrize(
    "flags, tested, message",
    [
        ({"seed": 1}, {}, "seed: 0 -> 1"),
        ({"keys": "official"}, {}, "keys: 'random' -> 'official'"),
        ({}, {"scale": 2.0}, "model: parameters: '"),
        ({}, {"label": "other"}, "it also holds 'model', which this command does not name"),
        ({"lengths": (128,)}, {}, "model: 6 of its trials are not part of this command"),
    ],
)
def test_a_file_of_another_evaluation_is_left_alone(tmp_path, flags, tested, message):
    evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    before = (tmp_path / "passkey.jsonl").read_bytes()
    reader = FakeReader(copy_key)
    with pytest.raises(ConfigError, match=re.escape(message)):
        evaluate(make_options(tmp_path, **flags), [make_model(**tested)], QUIET, reader)
    assert reader.read == [] and (tmp_path / "passkey.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content", ["[1]", "[1]\n", "no JSON\n", "\0" * 99, '{"task": "niah", "format": 1}\n']
)
def test_a_foreign_file_is_left_alone(tmp_path, content):
    (tmp_path / "passkey.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="use another --output"):
        evaluate(make_options(tmp_path), [make_model()], QUIET, FakeReader(copy_key))
    assert (tmp_path / "passkey.jsonl").read_text() == content
    assert not list(tmp_path.glob("*.damaged*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lengths": (90, 128)}, "prompt of 90 tokens is too short"),
        ({"lengths": (2**31 - 1,)}, "2 prompts of 2,147,483,647 tokens needs .* GB"),
        ({"lengths": (2**20,), "batch": 10**12, "trials": 10**5}, "a batch of 300,000 prompts"),
        ({"protocol": "official"}, "runs/model uses the byte tokenizer: use --protocol exact"),
    ],
)
def test_errors_come_before_any_prompt_is_read(tmp_path, flags, message):
    reader = FakeReader(copy_key)
    with pytest.raises(ConfigError, match=message):
        evaluate(make_options(tmp_path, **flags), [make_model()], QUIET, reader)
    assert reader.read == [] and not list(tmp_path.iterdir())


def test_official_lengths_below_a_thousand_characters_are_refused(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer")
    options = make_options(tmp_path, protocol="official", lengths=(266, 2000))
    with pytest.raises(ConfigError, match="length 266 is too short"):
        evaluate(options, [make_model(tokenizer="world")], QUIET, FakeReader(copy_key))


def test_nothing_to_take_out(tmp_path):
    plain = make_model().without_attention()
    options = make_options(tmp_path, compare_without_attention=True)
    with pytest.raises(ConfigError, match="no checkpoint here has attention blocks"):
        evaluate(options, [plain], QUIET, FakeReader(copy_key))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"depths": 0}, "--depths is 0"),
        ({"trials": 0}, "--trials is 0"),
        ({"trials": 999_999_999}, "make 5,999,999,994 trials"),
        ({"depths": 10**12}, "lower --depths or --trials"),
        ({"lengths": (-5,)}, r"--lengths is \(-5,\): give numbers"),
        ({"lengths": (10**12,)}, "--lengths has 1,000,000,000,000"),
        ({"keys": "official", "trials": 200}, "may occur in training texts"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        make_options(tmp_path, **flags)


def test_heat_map_counts_and_training_mark(tmp_path):
    options = make_options(tmp_path, limit=7)
    results = evaluate(options, [make_model()], QUIET, FakeReader(copy_key))
    (heat_map,) = heat_maps(passkey_grid(options), results)
    np.testing.assert_array_equal(heat_map.trials, [[2, 2, 2], [1, 0, 0]])
    np.testing.assert_array_equal(heat_map.percent, [[100, 100, 100], [100, np.nan, np.nan]])
    assert heat_map.trained_columns == 1
    assert heat_map.note == "step 70, trained on up to 128 tokens, first 7 of 12 trials"
    text = io.StringIO()
    plots.print_table(Console(file=text, width=100), heat_map, length_header="tokens")
    lines = text.getvalue().splitlines()
    assert lines[4].split() == ["128", "100", "100", "100", "100", "61", "to", "100"]
    assert lines[6].split() == ["300", "100", "–", "–", "100", "21", "to", "100"]
    assert lines[-2].startswith("7 of 7 right: 100.0 % (95 % interval 64.6 to 100.0)")


@pytest.mark.parametrize("count, lengths", [(1, 1), (2, 7), (3, 20)])
def test_figure_of_any_shape_is_written(tmp_path, count, lengths):
    sizes = tuple(1000 * 2**i for i in range(lengths))
    zeros, ones = np.zeros((lengths, 4), int), np.ones((lengths, 4), int)
    maps = [
        plots.HeatMap(f"m{i}", "", sizes, (0.0, 0.1, 0.2, 0.3), i % 2 * ones, ones, trained)
        for i, trained in zip(range(count), (None, 500, 10**9), strict=False)
    ]
    maps[0] = maps[0]._replace(trials=zeros)
    path = tmp_path / "new" / "figure.png"
    plots.draw(maps, path, title="t", x_label="x", y_label="y")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_command_from_checkpoint_to_figure(tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "tiny.safetensors"
    write_checkpoint(checkpoint)
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--lengths", "100,200"]
    flags += ["--depths", 2, "--trials", 2, "--piece", 64]
    run_command(monkeypatch, "passkey", *flags, "--limit", 6)
    run_command(monkeypatch, "passkey", *flags, "--compare-without-attention")
    printed = capsys.readouterr().out
    assert "6 finished trials found" in printed
    assert printed.count("0 of 8 right: 0.0 %") == 2
    assert "RWKV-X: tiny, attention blocks off" in printed
    document = read_results(tmp_path / "passkey.jsonl")
    assert document["command"].startswith("eval.py passkey --checkpoint")
    assert [len(shown["trials"]) for shown in document["models"]] == [8, 8]
    assert (tmp_path / "passkey.png").stat().st_size > 10_000


def test_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "open_models", lambda options: [make_model()])
    monkeypatch.setattr(passkey, "evaluate", stop)
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, "passkey", "--output", tmp_path, "--checkpoint", "x")
    assert stopped.value.code == 130
    assert "the same command continues" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "absent"], "no checkpoint at absent"),
        ([], "no checkpoint given"),
        (["--checkpoint", "absent", "--lengths", "1,x"], "lengths"),
        (["--checkpoint", "absent", "--protocol", "other"], "'exact', 'official'"),
        (["--checkpoint", "absent", "--depths", "0"], "--depths is 0"),
    ],
)
def test_command_errors(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, "passkey", "--output", tmp_path / "out", *flags)
    assert stopped.value.code not in (0, None)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_keys_hidden_in_a_book(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"Line {i} of the book." for i in range(900)))
    flags = {"depths": 2, "lengths": (300, 400)}
    options = make_options(tmp_path / "out", haystack=tmp_path / "book.txt", **flags)
    reader = FakeReader(copy_key)
    results = evaluate(options, [make_model()], QUIET, reader)
    assert results.summary("model")["all"]["accuracy"] == 1.0
    assert len(results.document["settings"]["haystack"]) == 16
    texts = [text for _, text in reader.read]
    assert all("of the book." in text and "The grass" not in text for text in texts)
    assert len({re.search(r"Line (\d+)", text)[1] for text in texts}) == len(texts)  # other pieces
    plain = make_options(tmp_path / "out", **flags)
    with pytest.raises(ConfigError, match="haystack: '[0-9a-f]{16}' -> None"):
        evaluate(plain, [make_model()], QUIET, reader)


def test_unseen_wording_and_key_lengths(tmp_path):
    solve = lambda text: " " + re.search(r"secret code is (\d+), and", text)[1]
    options = make_options(tmp_path, wording="other", digits=7, lengths=(200, 300))
    results = evaluate(options, [make_model()], QUIET, FakeReader(solve))
    assert results.summary("model")["all"]["accuracy"] == 1.0
    assert all(len(str(trial["key"])) == 7 for trial in results.trials("model"))
    assert results.document["settings"] == {
        "protocol": "exact",
        "keys": "random",
        "seed": 0,
        "digits": 7,
        "wording": "other",
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"digits": 2}, "--digits is 2"),
        ({"digits": 7, "keys": "official"}, "--digits goes with --keys random"),
        ({"protocol": "official", "wording": "other"}, "go with --protocol exact"),
        ({"protocol": "official", "haystack": Path("x")}, "go with --protocol exact"),
    ],
)
def test_flags_that_exclude_each_other(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        make_options(tmp_path, **flags)


def test_a_cache_too_large_for_memory_is_refused_unless_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "memory_left", lambda: 1_000_000)
    options = make_options(tmp_path, lengths=(128, 8192), prefill_chunk=64)
    with pytest.raises(ConfigError, match=r"8,192 tokens needs .* GB .*--policy TRIGGER"):
        evaluate(options, [make_model()], QUIET, FakeReader(copy_key))
    bounded = make_options(
        tmp_path, lengths=(128, 8192), prefill_chunk=64, policy=CachePolicy(64, 32, 16)
    )
    results = evaluate(bounded, [make_model()], QUIET, FakeReader(copy_key))
    assert results.document["settings"]["policy"] == {"trigger": 64, "keep": 32, "window": 16}


def test_command_with_a_policy(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--lengths", "200", "--depths", 1]
    run_command(monkeypatch, "passkey", *flags, "--trials", 1, "--policy", "64,32,16")
    assert "0 of 1 right" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "passkey", *flags, "--trials", 1)
    assert "policy: {'trigger': 64, 'keep': 32, 'window': 16} -> None" in capsys.readouterr().err

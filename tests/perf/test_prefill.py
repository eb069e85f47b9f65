"""Prefill times: what is timed, the crossover, resumption, errors, the command."""

from pathlib import Path

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, RunConfig
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.perf import prefill
from rwkvx_jax.perf.prefill import PrefillOptions, crossover, evaluate
from rwkvx_jax.perf.timed import TIMED, Timed
from tests.evals.eval_models import QUIET, TINY, run_command, write_checkpoint

MODEL = Timed(TINY, RunConfig(), {}, {"label": TIMED, "device": "cpu", "cores": 2})


def rows(kind, times):
    return [{"kind": kind, "length": n, "seconds": s} for n, s in times.items()]


def test_crossover():
    full = rows("full", {100: 1.0, 200: 4.0, 400: 16.0})
    assert crossover(full + rows("sparse", {100: 2.0, 200: 4.0, 400: 8.0})) == pytest.approx(200)
    later = crossover(full + rows("sparse", {100: 2.0, 200: 5.0, 400: 8.0}))
    a, b = np.log(4 / 5), np.log(2)
    assert later == pytest.approx(200 * 2 ** (-a / (b - a))) and 200 < later < 400
    assert crossover(full + rows("sparse", {100: 0.5, 200: 1, 400: 2})) == 100
    assert crossover(full + rows("sparse", {100: 2, 200: 5, 400: 17})) is None
    assert crossover(full) is None
    twice = rows("sparse", {100: 0.5, 200: 5.0, 400: 8.0})  # ahead, behind, ahead: the last counts
    assert 200 < crossover(full + twice) < 400


class FakeReader:
    """Notes what is read."""

    def __init__(self):
        self.read = []

    def __call__(self, config, run, params, prefill_chunk, rows):
        kind = "full" if config.attention == "full" else "sparse"
        kind = "rwkv" if not config.num_attention_blocks else kind

        def read(tokens):
            self.read.append((kind, len(tokens)))
            return len(tokens) / 1000

        return read


def test_rows_are_measured_once(tmp_path):
    options = PrefillOptions(output=tmp_path, lengths=(20, 10, 40), repeats=2, full_limit=20)
    run = lambda options, reader: evaluate(options, MODEL, QUIET, reader)
    first = FakeReader()
    results = run(options, first)
    lengths = {"sparse": (10, 20, 40), "rwkv": (10, 20, 40), "full": (10, 20)}
    expected = [(k, n) for k, own in lengths.items() for n in (10, *(n for n in own for _ in "ab"))]
    assert first.read == expected  # the first reading of each model compiles
    (model,) = read_results(tmp_path / "prefill.jsonl")["models"]
    assert model["trials"] == results.trials(TIMED) and len(model["trials"]) == 8
    assert model["trials"][-3] == {
        "kind": "sparse",
        "length": 10,
        "seconds": 0.01,
        "samples": [0.01, 0.01],
    }
    again = FakeReader()
    run(options, again)
    assert again.read == []


def test_nothing_to_measure(tmp_path):
    options = PrefillOptions(output=tmp_path, lengths=(20,), kinds=("full",), full_limit=10)
    with pytest.raises(ConfigError, match="within --full-limit 10"):
        evaluate(options, MODEL, QUIET, FakeReader())


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prefill_chunk": 0}, "--piece is 0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"kinds": ()}, "--kinds"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        PrefillOptions(output=Path("x"), **flags)
    with pytest.raises(ConfigError, match="--lengths is"):
        PrefillOptions(output=Path("x"), lengths=(0, 5))


@pytest.mark.thorough
def test_command(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--lengths", "16,40"]
    flags += ["--piece", 16, "--repeats", 1, "--kinds", "sparse", "full"]
    run_command(monkeypatch, "prefill", *flags)
    assert "full / sparse" in capsys.readouterr().out
    (model,) = read_results(tmp_path / "prefill.jsonl")["models"]
    assert [(r["kind"], r["length"]) for r in model["trials"]] == [
        ("full", 16),
        ("full", 40),
        ("sparse", 16),
        ("sparse", 40),
    ]
    assert (tmp_path / "prefill.png").stat().st_size > 10_000
    monkeypatch.setattr(prefill.Reader, "__call__", lambda *_: pytest.fail("all is there"))
    run_command(monkeypatch, "prefill", *flags)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "prefill", *flags[:-5], "--repeats", 2)
    assert "repeats: 1 -> 2" in capsys.readouterr().err


def test_rows_of_two_processes_are_kept(tmp_path):
    """The second measures all while the first is at work, which then keeps what it finds there."""
    options = PrefillOptions(output=tmp_path, lengths=(10, 20), repeats=1, kinds=("sparse",))
    second = FakeReader()

    class Interrupted(FakeReader):
        def __call__(self, *sizes):
            read = super().__call__(*sizes)

            def after_another(tokens):
                if not second.read:
                    evaluate(options, MODEL, QUIET, second)
                return 7 * read(tokens)

            return after_another

    results = evaluate(options, MODEL, QUIET, Interrupted())
    assert [row["seconds"] for row in results.trials(TIMED)] == [0.01, 0.02]
    with (tmp_path / "prefill.jsonl").open("a") as file:
        file.write("[3]\n")
    with pytest.raises(ConfigError, match="another shape than a results file"):
        evaluate(options, MODEL, QUIET, second)


def test_prompts_beyond_the_memory_are_refused(tmp_path, monkeypatch, capsys):
    flags = ["--output", tmp_path, "--width", 64, "--vocab-size", 99, "--num-blocks", 4]
    for more, message in (
        (["--lengths", 10**12], "a prompt of 1,000,000,000,000 tokens"),
        (["--piece", 10**12], "read 1,000,000,000,000 at once"),
        (["--num-blocks", 10**9], "1,000,000,004 blocks of width 64"),
    ):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, "prefill", *flags, *more)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

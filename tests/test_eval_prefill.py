"""Prefill times: what is timed, the crossover, resumption, errors, the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, RunConfig
from rwkvx_jax.evals import prefill_speed
from rwkvx_jax.evals.prefill_speed import PrefillOptions, crossover, measure
from tests.eval_models import QUIET, TINY, run_command, write_checkpoint


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

    def __call__(self, config, run, params, piece, longest):
        kind = "full" if config.attention == "full" else "sparse"
        kind = "rwkv" if not config.num_attention_blocks else kind

        def read(tokens):
            self.read.append((kind, len(tokens)))
            return len(tokens) / 1000

        return read


def test_rows_are_measured_once(tmp_path):
    options = PrefillOptions(output=tmp_path, lengths=(20, 10, 40), repeats=2, full_limit=20)
    document, path = {"rows": []}, tmp_path / "prefill.json"
    run = lambda options, reader: measure(
        options, TINY, RunConfig(), {}, document, path, QUIET, reader
    )
    first = FakeReader()
    run(options, first)
    lengths = {"sparse": (10, 20, 40), "rwkv": (10, 20, 40), "full": (10, 20)}
    expected = [(k, n) for k, own in lengths.items() for n in (10, *(n for n in own for _ in "ab"))]
    assert first.read == expected  # the first reading of each model compiles
    assert json.loads(path.read_text()) == document and len(document["rows"]) == 8
    assert document["rows"][0] == {
        "kind": "sparse",
        "length": 10,
        "seconds": 0.01,
        "samples": [0.01, 0.01],
    }
    again = FakeReader()
    run(options, again)
    assert again.read == []


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"piece": 0}, "--piece is 0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"kinds": ()}, "--kinds"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        PrefillOptions(output=Path("x"), **flags)
    with pytest.raises(ConfigError, match="--lengths is"):
        PrefillOptions(output=Path("x"), lengths=(0, 5))


def test_command(tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--lengths", "16,40"]
    flags += ["--piece", 16, "--repeats", 1, "--kinds", "sparse", "full"]
    run_command(monkeypatch, "prefill", *flags)
    assert "full / sparse" in capsys.readouterr().out
    document = json.loads((tmp_path / "prefill.json").read_text())
    assert [(r["kind"], r["length"]) for r in document["rows"]] == [
        ("sparse", 16),
        ("sparse", 40),
        ("full", 16),
        ("full", 40),
    ]
    assert (tmp_path / "prefill.png").stat().st_size > 10_000
    monkeypatch.setattr(prefill_speed, "measure", lambda *_: None)
    run_command(monkeypatch, "prefill", *flags)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "prefill", *flags[:-5], "--repeats", 2)
    assert "holds another measurement" in capsys.readouterr().err

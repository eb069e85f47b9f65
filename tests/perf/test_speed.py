"""Decode times: bytes that must be read, contexts that do not fit, errors, the command."""

from dataclasses import replace
from pathlib import Path

import pytest

from rwkvx_jax.config import ConfigError, RunConfig
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.perf import speed
from rwkvx_jax.perf.speed import SpeedOptions, bytes_per_token
from tests.evals.eval_models import TINY, run_command, write_checkpoint


@pytest.mark.parametrize(
    "selector, kept", [("mean", 1), ("bounds", 2), ("max", 4)], ids=["mean", "bounds", "max"]
)
def test_bytes_of_a_token(selector, kept):
    config = replace(TINY, selector=selector, selector_blocks=kept, chunk_size=8, top_k=3)
    run = RunConfig(compute_dtype="bfloat16")
    rest = bytes_per_token(replace(config, num_attention_blocks=0), run, {}, 43)
    # Five chunks are past; two of them and four rows of the own chunk are read.
    attention = TINY.num_attention_blocks * TINY.width * (2 * 20 * 2 + 5 * kept * 4)
    assert bytes_per_token(config, run, {}, 43) == rest + attention
    shared = replace(config, num_kv_heads=1)
    assert bytes_per_token(shared, run, {}, 43) == rest + attention // config.num_heads
    if selector == "bounds":  # bounds of both spans of two chunks, and the chunks of all spans
        spans = replace(config, selection_span=4, selection_spans=2)
        spans_kept = TINY.num_attention_blocks * TINY.width * 2 * 2 * 4
        assert bytes_per_token(spans, run, {}, 43) == rest + attention + spans_kept
    full = TINY.num_attention_blocks * TINY.width * 2 * 44 * 2
    assert bytes_per_token(replace(config, attention="full"), run, {}, 43) == rest + full


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"steps": 0}, "--steps is 0"),
        ({"contexts": (0, 5)}, r"--contexts is \(0, 5\)"),
        ({"kinds": ()}, "--kinds is empty"),
        ({"full_limit": 0}, "--full-limit is 0"),
        ({"memory_gb": float("nan")}, "--memory-gb is nan"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        SpeedOptions(output=Path("out"), **flags)


@pytest.mark.slow
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "_READ_BYTES", 1 << 20)
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--contexts", "40,16,100000"]
    flags += ["--steps", 2, "--full-limit", 20, "--memory-gb", 0.01]
    run_command(monkeypatch, "speed", *flags)
    assert "context 100,000 left out" in capsys.readouterr().out
    document = read_results(tmp_path / "speed.jsonl")
    (before,) = [model["trials"] for model in document["models"]]
    assert [(r["kind"], r["context"]) for r in before] == [
        ("full", 16),
        ("rwkv", 16),
        ("rwkv", 40),
        ("sparse", 16),
        ("sparse", 40),
    ]
    assert all(len(r["samples"]) == 2 and r["milliseconds"] > 0 for r in before)
    assert [left["context"] for left in document["plan"]["left_out"]] == [100_000]
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--steps", 1, "--kinds", "sparse"]
    run_command(monkeypatch, "speed", *flags, "--contexts", "24,16")
    (model,) = read_results(tmp_path / "speed.jsonl")["models"]
    assert [row for row in model["trials"] if row["context"] != 24] == before
    assert [(r["kind"], r["context"]) for r in model["trials"]][4] == ("sparse", 24)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "speed", "--output", tmp_path, "--width", 64, "--num-blocks", 4)
    assert "model: model.width: 32 -> 64" in capsys.readouterr().err

"""Selection: shares and recall equal a plain computation, files, resumption, errors."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.config import ConfigError, RunConfig
from rwkvx_jax.evals.chunk_mass import measure, positions_of, selectors
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.report import read_results
from rwkvx_jax.evals.tasks import selection
from rwkvx_jax.evals.tasks.selection import SelectionOptions, evaluate
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from rwkvx_jax.tokenizer import load_tokenizer
from tests.evals.eval_models import (
    QUIET,
    TINY,
    make_model,
    random_params,
    run_command,
    write_checkpoint,
)
from tests.helpers import assert_close

CONFIG = dataclasses.replace(TINY, top_k=3)  # chunks of 8, two past ones a query


def make_options(output, text, **flags):
    flags = {"length": 60, "skip": 0, "queries": 20, "blocks": 4, "documents": 3} | flags
    return SelectionOptions(checkpoint=(Path("m"),), output=output, text=text, **flags)


def by_hand(q, k, positions, chosen):
    """Share of all mass, of past mass, recall [H, Q] and mass held by distance, plainly in float64.

    chosen: [Q, H, J], or None for the oracle.
    """
    length, heads, size = k.shape
    share, past, recall = np.zeros((3, heads, len(positions)))
    held = np.zeros((heads, len(positions), 3))
    for h in range(heads):
        for i, t in enumerate(positions):
            weights = np.exp(k[: t + 1, h] @ q[t, h] / np.sqrt(size))
            weights /= weights.sum()
            own = t // 8
            mass = [weights[c * 8 : (c + 1) * 8].sum() for c in range(own)]
            oracle = np.argsort(-np.array(mass), kind="stable")[:2]
            picked = oracle if chosen is None else chosen[i, h]
            taken = sum(mass[c] for c in picked)
            share[h, i] = weights[own * 8 :].sum() + taken
            past[h, i] = taken / sum(mass)
            recall[h, i] = len(set(picked) & set(oracle)) / 2
            for c in picked:
                held[h, i, int(np.log2(own - c))] += mass[c]
    return share, past, recall, held


@pytest.mark.thorough
def test_measures_equal_a_plain_computation():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 60, 2, 16)) * 2
    positions = positions_of(CONFIG, 60, 20)
    assert positions[0] == 24 and positions[-1] == 59 and len(positions) == 20
    named = selectors(CONFIG, 4)
    run = jax.jit(lambda q, k: measure(q, k, (q, k), jnp.asarray(positions), CONFIG, named))
    found = run(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))
    own = positions // 8
    octave = np.floor(np.log2(own)).astype(int)
    np.testing.assert_array_equal(found["queries"], [(octave == p).sum() for p in range(3)])
    for name in (*named, "oracle", "recent"):
        if name == "oracle":
            chosen = None
        elif name == "recent":
            chosen = np.broadcast_to((own[:, None] - [1, 2])[:, None], (20, 2, 2))
        else:
            options = {"chunk_size": 8, "top_k": 3, "selector": named[name]}
            q32, k32 = (jnp.asarray(x[None], jnp.float32) for x in (q, k))
            chosen = np.asarray(select_chunks_reference(q32, k32, **options))[0, positions]
        *expected, held = by_hand(q, k, positions, chosen)
        for key, values in zip(("share", "past", "recall"), expected, strict=True):
            sums = np.stack([values[:, octave == p].sum(1) for p in range(3)], axis=1)
            assert_close(found["selectors"][name][key], sums, rel=2e-5, name=f"{name} {key}")
        assert_close(found["selectors"][name]["held"], held.mean(1), rel=2e-5, name=name)
    assert_close(found["mass"].sum(-1), np.ones(2), rel=1e-5)
    assert (found["selectors"]["oracle"]["recall"].sum(-1) == 20).all()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(" ".join(f"Line {i} of the book." for i in range(60)))
    return path


@pytest.mark.thorough
def test_documents_summary_and_resumption(book, tmp_path):
    params, run = random_params(CONFIG), RunConfig(compute_dtype="float32")
    tested = EvalModel("m", CONFIG, run, params, load_tokenizer("byte"), "x", None, None)
    evaluate(make_options(tmp_path, book, limit=1), [tested], QUIET)
    results = evaluate(make_options(tmp_path, book), [tested], QUIET)
    document = read_results(tmp_path / "selection.jsonl")
    (shown,) = document["models"]
    assert len(shown["trials"]) == 3 and document["settings"]["blocks"] == 4
    found = shown["summary"]["selectors"]
    assert set(found) == {"own", "mean", "max", "pooled", "bounds", "recent", "oracle"}
    assert found["own"] == found["mean"] and found["oracle"]["recall"]["mean"] == 1.0
    for record in found.values():
        assert record["past"]["mean"] <= found["oracle"]["past"]["mean"] + 1e-6
        assert 0 < record["share"]["mean"] <= 1 and len(record["held_by_distance"]) == 3
    trials = results.trials("m")
    expected = [np.sum(t["selectors"]["max"]["past"]) / 2 / np.sum(t["queries"]) for t in trials]
    assert found["max"]["past"]["mean"] == pytest.approx(np.mean(expected))
    error = np.std(expected, ddof=1) / 3**0.5
    assert found["max"]["past"]["error"] == pytest.approx(error)

    def fail(*_):
        raise AssertionError("nothing is left to do")

    selection.Observer.__call__, kept = fail, selection.Observer.__call__
    try:
        evaluate(make_options(tmp_path, book), [tested], QUIET)
    finally:
        selection.Observer.__call__ = kept


@pytest.mark.parametrize(
    "config, flags, message",
    [
        ({"num_attention_blocks": 0}, {}, "has no attention blocks"),
        ({"top_k": 1}, {}, "reads its own chunk only"),
        ({}, {"length": 31}, "has a choice from 32 tokens on"),
        ({}, {"blocks": 3}, "--blocks 3 does not divide the chunks of model"),
    ],
)
def test_where_there_is_nothing_to_choose(config, flags, message, book, tmp_path):
    tested = make_model()._replace(config=dataclasses.replace(CONFIG, **config))
    with pytest.raises(ConfigError, match=message):
        evaluate(make_options(tmp_path, book, **flags), [tested], QUIET)


@pytest.mark.thorough
def test_command(book, tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors", CONFIG)
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--text", book, "--length", 60]
    flags += ["--skip", 0, "--queries", 10, "--blocks", 4, "--documents", 2]
    run_command(monkeypatch, "selection", *flags)
    printed = capsys.readouterr().out
    assert "oracle (most mass)" in printed and "100.0" in printed
    assert (tmp_path / "selection.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "selection", *flags, "--queries", 0)
    assert "--queries is 0" in capsys.readouterr().err

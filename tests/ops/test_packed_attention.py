"""Packed documents in attention: no key of another document is read, by any form.

Oracles against loops over single queries, every form against the oracle in values and gradients,
the selection against a loop over a document's own keys, and what crosses a border: exactly nothing.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.ops import blocked_attention, dispatch, selection
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.documents import check_segment_ids, document_starts
from rwkvx_jax.ops.full_attention import _splash_attention, full_attention
from rwkvx_jax.ops.selection import Selector, select_chunks
from tests.helpers import assert_close
from tests.ops.attention_cases import (
    compare,
    queries_for,
    random_qkv,
    random_selection,
    value_and_gradients,
)

LENGTHS = (1, 6, 1, 15, 8, 20, 13, 3)
TIME = sum(LENGTHS)
SPARSE = ("xla", "masked")


def ids_of(*rows):
    """Segment ids [B, T] of rows of lengths; a negative one is padding."""
    ids = []
    for lengths in rows:
        numbers = np.cumsum([n > 0 for n in lengths]) * [n > 0 for n in lengths]
        ids.append(np.repeat(numbers, np.abs(lengths)))
    ids = jnp.asarray(ids, jnp.int32)
    check_segment_ids("test", ids, *ids.shape)
    return ids


IDS = ids_of(LENGTHS, (-3, 6, 14, -9, 30, -1, 4))


def runs_of(ids):
    """The number of the run of equal ids that each token is in."""
    fresh = np.diff(np.asarray(ids), axis=1, prepend=-1) != 0
    return np.cumsum(fresh, axis=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks at small lengths."""
    monkeypatch.setattr(blocked_attention, "MAX_BLOCK", 16)
    monkeypatch.setattr(blocked_attention, "MIN_BLOCK", 4)


def numpy_attention(q, k, v, read):
    """One query at a time; read(b, t, h) lists the positions of its keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        keys = read(b, t, h)
        weight = np.exp(k[b, keys, h] @ q[b, t, h] / np.sqrt(q.shape[3]))
        out[b, t, h] = weight @ v[b, keys, h] / weight.sum()
    return out


def test_oracles_follow_the_definition():
    """Queries in the middle; a selection that names chunks of other documents."""
    offsets, length, chunk = (40, 7), 25, 6
    q, k, v = random_qkv(0, 2, length, TIME, values=5)
    chosen = random_selection(0, 2, length, 2, chunk, 4, offsets)
    runs = runs_of(IDS)

    def read(b, t, h, everything=True):
        at = offsets[b] + t
        chunks = {at // chunk} | set(np.asarray(chosen)[b, t, h].tolist())
        keys = [s for s in range(at + 1) if runs[b, s] == runs[b, at]]
        return [s for s in keys if everything or s // chunk in chunks]

    common = {"q_offset": jnp.array(offsets), "segment_ids": IDS, "implementation": "reference"}
    found = jax.jit(functools.partial(full_attention, **common))(q, k, v)
    assert_close(found, numpy_attention(q, k, v, read), rel=1e-5)
    common |= {"chunk_size": chunk, "top_k": 4, "selection": chosen}
    found = jax.jit(functools.partial(sparse_attention, **common))(q, k, v)
    read = functools.partial(read, everything=False)
    assert_close(found, numpy_attention(q, k, v, read), rel=1e-5)


def test_where_documents_start():
    expected = [[0, 0, 2, 3, 3, 5]]
    assert document_starts(jnp.asarray([[1, 1, 2, 0, 0, 3]])).tolist() == expected


CASES = {  # queries, offset, query and key heads
    "whole": (TIME, 0, 2, 2),
    "piece": (21, 38, 2, 1),
    "rows": (21, (46, 3), 4, 2),
}


@pytest.mark.parametrize(
    "case", ["rows", *(pytest.param(c, marks=pytest.mark.thorough) for c in ("whole", "piece"))]
)
def test_full_attention_matches_its_oracle(small_blocks, case):
    length, offset, heads, groups = CASES[case]
    q = random_qkv(1, 2, length, heads=heads)[0]
    _, k, v = random_qkv(2, 2, TIME, heads=groups, values=12)
    offset = jnp.array(offset) if isinstance(offset, tuple) else offset
    options = {"q_offset": offset, "segment_ids": IDS}
    run = lambda name: value_and_gradients(
        functools.partial(full_attention, implementation=name, **options)
    )
    compare(run("blocked")(q, k, v), run("reference")(q, k, v))


@pytest.mark.parametrize(
    "case, chunk",  # chunks smaller and larger than a block
    [
        ("rows", 6),
        ("piece", 40),
        pytest.param("whole", 6, marks=pytest.mark.thorough),
        pytest.param("whole", 1, marks=pytest.mark.thorough),
        pytest.param("rows", 40, marks=pytest.mark.thorough),
    ],
)
def test_sparse_attention_matches_its_oracle(small_blocks, case, chunk):
    length, offset, heads, groups = CASES[case]
    q = random_qkv(1, 2, length, heads=heads)[0]
    _, k, v = random_qkv(2, 2, TIME, heads=groups, values=12)
    chosen = random_selection(0, 2, length, heads, chunk, 3, offset)
    offset = jnp.array(offset) if isinstance(offset, tuple) else offset
    options = {"chunk_size": chunk, "top_k": 3, "selection": chosen, "q_offset": offset}
    run = lambda name: value_and_gradients(
        functools.partial(sparse_attention, implementation=name, segment_ids=IDS, **options)
    )
    expected = run("reference")(q, k, v)
    for name in SPARSE if chunk <= 16 else SPARSE[:1]:
        compare(run(name)(q, k, v), expected)


@pytest.mark.parametrize(
    "length, keys, offset",
    [(70, 200, 130), pytest.param(256, 256, 0, marks=pytest.mark.thorough)],
)
def test_splash_matches_the_oracle_when_interpreted(length, keys, offset):
    qkv = random_qkv(7, 1, length, keys, heads=1, size=64)
    ids = ids_of((-3, 60, 1, 73, keys - 150, 13))
    starts = document_starts(ids)
    fast = functools.partial(
        _splash_attention, scale=0.125, q_offset=offset, starts=starts, interpret=True
    )
    oracle = functools.partial(
        full_attention, q_offset=offset, segment_ids=ids, implementation="reference"
    )
    compare(value_and_gradients(fast)(*qkv), value_and_gradients(oracle)(*qkv))


# ------------------------------------------------------------------------------------- selection


def numpy_selection(q, k, runs, chunk, top_k, offsets, selector):
    """The rule, one query at a time, over the keys of its own document."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    together = selector.together
    out = np.full((*q.shape[:2], q.shape[2] // together, top_k - 1), -1)

    def score(query, keys):  # keys: of the chunk's places, None where of another document
        found = lambda some: np.array([key for key in some if key is not None])
        if selector.kind == "mean":
            return query @ found(keys).mean(0)
        if selector.kind == "seer":
            keys = found(keys)
            return query @ np.concatenate([keys.min(0), keys.max(0), keys.mean(0)])
        size = chunk // selector.blocks
        parts = [found(keys[i : i + size]) for i in range(0, chunk, size)]
        if selector.kind == "bounds":
            bound = lambda p: np.maximum(query * p.min(0), query * p.max(0)).sum()
            return max(bound(p) for p in parts if len(p))
        means = [(len(p), query @ p.mean(0)) for p in parts if len(p)]
        if selector.kind == "max":
            return max(mean for _, mean in means)
        return np.log(sum(n / size * np.exp(m / np.sqrt(len(query))) for n, m in means))

    for b, t, s in np.ndindex(*out.shape[:3]):
        at, scored = offsets[b] + t, []
        for c in range(min(at // chunk, k.shape[1] // chunk)):
            places = range(c * chunk, (c + 1) * chunk)
            if not any(runs[b, p] == runs[b, at] for p in places):
                continue
            heads = range(s * together, (s + 1) * together)
            scores = [
                score(
                    q[b, t, h], [k[b, p, h] if runs[b, p] == runs[b, at] else None for p in places]
                )
                for h in heads
            ]
            score_of_all = sum(scores) if selector.joined == "sum" else max(scores)
            forced = selector.forced == "both" and (not scored or c == at // chunk - 1)
            scored.append((-np.inf if forced else -score_of_all, c))
        best = [c for _, c in sorted(scored)[: top_k - 1]]
        out[b, t, s, : len(best)] = best
    return out


@pytest.mark.parametrize(
    "selector, blocks",
    [
        (Selector(), "one block"),
        (Selector("pooled", 2, together=2, joined="max"), "many blocks"),
        (Selector("bounds"), "one block"),
        (Selector("max", 3), "one block"),
        (Selector("seer"), "many blocks"),
        (Selector("bounds", 3, forced="both"), "many blocks"),
        pytest.param(Selector("bounds", 6, together=2), "one block", marks=pytest.mark.thorough),
        pytest.param(Selector(), "many blocks", marks=pytest.mark.thorough),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.kind}-{x.blocks}",
)
def test_chunks_are_chosen_by_a_documents_own_keys(selector, blocks, monkeypatch):
    if blocks == "many blocks":
        monkeypatch.setattr(selection, "SCORES_PER_BLOCK", 64)
        monkeypatch.setattr(selection, "MIN_QUERIES_PER_BLOCK", 8)
        monkeypatch.setattr(selection, "MIN_QUERIES_TO_BRANCH", 8)
        monkeypatch.setattr(selection, "MIN_CHUNKS_PER_PREFIX", 2)
    offsets = (7, 27)
    q = queries_for(selector, random_qkv(3, 2, 40)[0])
    _, k, _ = random_qkv(4, 2, TIME, heads=2 if selector.together == 1 else 1)
    options = {"chunk_size": 6, "top_k": 3, "segment_ids": IDS, "selector": selector}
    choose = functools.partial(select_chunks, q_offset=jnp.array(offsets), **options)
    found = jax.jit(choose)(q, k)
    expected = numpy_selection(q, k, runs_of(IDS), 6, 3, offsets, selector)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("forced", ["none", "both"])
def test_no_other_document_decides_into_which_spans_a_query_looks(forced):
    lengths = (23, 60, 37)
    ids = ids_of(lengths, lengths[::-1])
    q, k, _ = random_qkv(3, 2, sum(lengths))
    other = random_qkv(4, 2, sum(lengths))[1]
    selector = Selector("bounds", 2, forced=forced, span=2, spans=3)
    choose = functools.partial(
        select_chunks, chunk_size=4, top_k=4, segment_ids=ids, selector=selector
    )
    found = choose(q, k)
    first = document_starts(ids)[..., None, None] // 4
    assert bool(((found == -1) | (found >= first)).all())
    for document in (1, 2, 3):
        own = (ids == document)[..., None, None]
        same = (choose(q, jnp.where(own, k, other)) == found) | ~own
        assert bool(same.all())


# ------------------------------------------------------------------------ documents by themselves

CHUNK, TOP_K = 8, 3


@functools.cache
def packed(kind, form):
    op = full_attention
    if kind == "sparse":
        op = functools.partial(sparse_attention, chunk_size=CHUNK, top_k=TOP_K)

    @jax.jit
    def run(q, k, v, ids, cotangent):
        attend = functools.partial(op, segment_ids=ids, implementation=form)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    return run


@functools.cache
def alone(kind):
    """The document that begins at `start`, moved to the beginning: what follows it is not seen."""
    op = full_attention
    if kind == "sparse":
        op = functools.partial(sparse_attention, chunk_size=CHUNK, top_k=TOP_K)
    op = functools.partial(op, implementation="reference")

    @jax.jit
    def run(q, k, v, cotangent, start, stop):
        move = lambda x, by: jnp.roll(x, by, axis=1)
        own = jnp.arange(q.shape[1])[None, :, None, None] < stop - start
        out, pull_back = jax.vjp(op, *(move(x, -start) for x in (q, k, v)))
        gradients = pull_back(jnp.where(own, move(cotangent, -start), 0))
        return tuple(move(x, start) for x in (out, *gradients))

    return run


def as_if_alone(start, stop):
    """Whether a document is read as if it were alone: it begins at a chunk, or lies in TOP_K."""
    return start % CHUNK == 0 or (stop - 1) // CHUNK - start // CHUNK < TOP_K


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([1, 2, 7, 8, 9, 16, 31, 40]), min_size=1, max_size=9))
def test_documents_are_read_as_if_alone(lengths):
    total = 72
    borders = [0, *(b for b in np.cumsum(lengths).tolist() if b < total), total]
    ids = ids_of(np.diff(borders))
    q, k, v = random_qkv(5, 1, total)
    cotangent = random_qkv(6, 1, total)[2]
    for kind, form in (("full", "blocked"), ("sparse", "xla")):
        found = packed(kind, form)(q, k, v, ids, cotangent)
        for a, b in itertools.pairwise(borders):
            if kind == "full" or as_if_alone(a, b):
                exact = alone(kind)(q, k, v, cotangent, a, b)
                for x, y in zip(found, map(np.asarray, exact), strict=True):
                    if np.abs(y[:, a:b]).max() > 1e-6:
                        assert_close(x[:, a:b], y[:, a:b], rel=1e-5)


@pytest.mark.parametrize("kind, form", [("full", "blocked"), *(("sparse", f) for f in SPARSE)])
def test_nothing_crosses_a_border(kind, form):
    """Long documents that begin anywhere, and padding before, between and behind."""
    lengths = (-3, 45, 1, -6, 38, 60, -7)
    ids = ids_of(lengths)
    q, k, v = random_qkv(8, 1, ids.shape[1])
    cotangent = random_qkv(9, 1, ids.shape[1])[2]
    runs = runs_of(ids)[0]
    for run in np.unique(runs):
        own = (runs == run)[None, :, None, None]
        out, *gradients = packed(kind, form)(q, k, v, ids, jnp.where(own, cotangent, 0))
        assert np.isfinite(out).all()
        for name, gradient in zip("qkv", gradients, strict=True):
            gradient = np.asarray(gradient)
            assert not np.where(own, 0, gradient).any(), (run, name)
            assert gradient.any() or (runs == run).sum() == 1, (run, name)


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_no_ids_leave_no_trace(kind):
    q, k, v = random_qkv(0, 1, 64)
    op = full_attention
    if kind == "sparse":
        op = functools.partial(sparse_attention, chunk_size=8, top_k=3)
    text = lambda **ids: str(jax.make_jaxpr(lambda *x: op(*x, **ids))(q, k, v))
    one = jnp.ones((1, 64), jnp.int32)
    assert text() == text(segment_ids=None) != text(segment_ids=one)
    with_ids = jax.jit(lambda *x: op(*x, segment_ids=one))
    assert_close(with_ids(q, k, v), jax.jit(op)(q, k, v), rel=1e-6)


def test_what_takes_no_ids_is_passed_over(monkeypatch, caplog):
    q, k, v = random_qkv(0, 1, 16, size=64, dtype=jnp.bfloat16)
    attend = functools.partial(full_attention, segment_ids=jnp.ones((1, 16), jnp.int32))
    monkeypatch.setattr(dispatch, "current_platform", lambda: "gpu")
    dispatch.forget_choices()
    with pytest.raises(ValueError, match="takes no segment_ids yet"):
        attend(q, k, v, implementation="cudnn")
    jax.make_jaxpr(lambda *qkv: attend(*qkv))(q, k, v)  # a new function, traced anew
    assert "falling back" in caplog.text and "takes no segment_ids" in caplog.text


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_kernels_take_ids(monkeypatch, platform):
    """By themselves, where the platform has them."""
    q, k, v = random_qkv(0, 1, 256, size=64, dtype=jnp.bfloat16)
    monkeypatch.setattr(dispatch, "current_platform", lambda: platform)
    options = {"chunk_size": 64, "top_k": 2, "segment_ids": jnp.ones((1, 256), jnp.int32)}
    attend = functools.partial(sparse_attention, **options)
    text = str(jax.make_jaxpr(lambda *qkv: attend(*qkv))(q, k, v))
    names = {"block_sparse_past_forward", "block_sparse_own_forward"}
    names |= {"select_chunks"} if platform == "tpu" else set()
    assert all(f"name={name}" in text for name in names)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[1] * 15], r"segment_ids must be int32 \[1, 16\]"),
        ([[1.0] * 16], "got float32"),
        ([[2] * 8 + [1] * 8], "go from 2 to 1 at token 8"),
        ([[1] * 8 + [3] * 8], "go from 1 to 3 at token 8"),
    ],
)
def test_ids_that_number_no_documents(ids, message):
    q, k, v = random_qkv(0, 1, 16)
    for op in (
        full_attention,
        functools.partial(sparse_attention, chunk_size=8, top_k=2),
        lambda q, k, v, **ids: select_chunks(q, k, chunk_size=8, top_k=2, **ids),
    ):
        with pytest.raises(ValueError, match=message):
            op(q, k, v, segment_ids=jnp.asarray(ids))

"""Chunk selection: against its oracle, the oracle against a NumPy loop, ties, offsets, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops import selection
from rwkvx_jax.ops.attention_inputs import query_positions
from rwkvx_jax.ops.selection import (
    Selector,
    select_chunks,
    select_from_rows,
)
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from rwkvx_jax.ops.selectors import chunk_key_sums
from tests.helpers import assert_close
from tests.ops.attention_cases import jaxpr_shapes, queries_for

reference = jax.jit(select_chunks_reference, static_argnames=("chunk_size", "top_k"))


def random_qk(seed, batch, length, keys, heads=2, size=16, dtype=jnp.float32):
    keys_q, keys_k = jax.random.split(jax.random.key(seed))
    q = jax.random.normal(keys_q, (batch, length, heads, size)).astype(dtype)
    return q, jax.random.normal(keys_k, (batch, keys, heads, size)).astype(dtype)


def numpy_selection(q, k, chunk_size, top_k, offsets):
    """The rule, one query at a time."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    out = np.full((*q.shape[:3], top_k - 1), -1)
    for b, t, h in np.ndindex(*q.shape[:3]):
        own = (offsets[b] + t) // chunk_size
        scored = []
        for c in range(own):
            chunk = k[b, c * chunk_size : (c + 1) * chunk_size, h]
            if len(chunk) == chunk_size:
                scored.append((-q[b, t, h] @ chunk.mean(0), c))
        best = [c for _, c in sorted(scored)[: top_k - 1]]
        out[b, t, h, : len(best)] = best
    return out


@pytest.mark.parametrize(
    "length, keys, chunk_size, top_k, offsets",
    [(37, 37, 5, 3, [0, 0]), (9, 50, 7, 4, [3, 41]), (6, 6, 8, 2, [0, 0]), (12, 12, 1, 20, [0, 0])],
)
def test_oracle_follows_the_rule(length, keys, chunk_size, top_k, offsets):
    q, k = random_qk(0, 2, length, keys)
    expected = numpy_selection(q, k, chunk_size, top_k, offsets)
    actual = reference(q, k, chunk_size=chunk_size, top_k=top_k, q_offset=jnp.array(offsets))
    np.testing.assert_array_equal(actual, expected)


@pytest.fixture(params=["one block", "many blocks"])
def blocks_of_queries(request, monkeypatch):
    """Many blocks: of 8 queries each, scored against one of up to 8 numbers of chunks."""
    if request.param == "many blocks":
        cut_small(monkeypatch)


def cut_small(monkeypatch):
    monkeypatch.setattr(selection, "SCORES_PER_BLOCK", 64)
    monkeypatch.setattr(selection, "MIN_QUERIES_PER_BLOCK", 8)
    monkeypatch.setattr(selection, "MIN_QUERIES_TO_BRANCH", 8)
    monkeypatch.setattr(selection, "MIN_CHUNKS_PER_PREFIX", 2)


@pytest.mark.parametrize(
    "length, keys, chunk_size, top_k, offset",
    [
        (1, 1, 4, 3, 0),
        (7, 7, 1, 1, 0),
        (64, 64, 16, 2, 0),
        (200, 200, 9, 5, 0),
        (1000, 1000, 96, 3, 0),
        (1000, 1000, 96, 32, 0),
        (33, 300, 20, 4, 111),
        (33, 300, 20, 4, [111, 260]),
        (1, 300, 9, 5, [299, 100]),
    ],
)
def test_matches_oracle(blocks_of_queries, length, keys, chunk_size, top_k, offset):
    q, k = random_qk(length, 2, length, keys)
    offset = jnp.array(offset) if isinstance(offset, list) else offset
    options = dict(chunk_size=chunk_size, top_k=top_k, q_offset=offset)
    actual = jax.jit(lambda q, k: select_chunks(q, k, **options))(q, k)
    assert actual.shape == (2, length, 2, top_k - 1) and actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, reference(q, k, **options))


def test_bfloat16_keys_are_summed_in_float32():
    q, k = random_qk(3, 1, 512, 512, dtype=jnp.bfloat16)
    options = dict(chunk_size=64, top_k=3)
    expected = reference(q.astype(jnp.float32), k.astype(jnp.float32), **options)
    np.testing.assert_array_equal(select_chunks(q, k, **options), expected)


@pytest.mark.parametrize("passes", [0, selection.MAX_PASSES])
def test_ties_go_to_the_lower_index(monkeypatch, passes):
    """By passes for the maximum and by `top_k` alike."""
    monkeypatch.setattr(selection, "MAX_PASSES", passes)
    chunk = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
    k = jnp.concatenate([-chunk, chunk, chunk, -chunk, chunk, chunk], axis=1)
    q = jnp.broadcast_to(chunk.mean(1, keepdims=True), (1, 24, 1, 8))
    actual = select_chunks(q, k, chunk_size=4, top_k=4)
    np.testing.assert_array_equal(actual[0, -1, 0], [1, 2, 4])
    np.testing.assert_array_equal(actual[0, 13, 0], [1, 2, 0])
    np.testing.assert_array_equal(actual, reference(q, k, chunk_size=4, top_k=4))


def test_zero_keys_choose_the_first_chunks():
    q, k = random_qk(1, 1, 30, 30)
    actual = select_chunks(q, jnp.zeros_like(k), chunk_size=5, top_k=3)
    for t in range(30):
        expected = [c if c < t // 5 else -1 for c in (0, 1)]
        np.testing.assert_array_equal(actual[0, t], [expected, expected])


def test_only_complete_past_chunks_are_chosen():
    q, k = random_qk(2, 2, 103, 103)
    chosen = np.asarray(select_chunks(q, k, chunk_size=10, top_k=20))
    own = np.arange(103) // 10
    assert (chosen < own[None, :, None, None]).all()
    counts = (chosen >= 0).sum(-1)
    np.testing.assert_array_equal(counts, np.broadcast_to(own[None, :, None], counts.shape))
    assert (np.diff(np.sort(chosen, -1), axis=-1)[np.sort(chosen, -1)[..., 1:] >= 0] > 0).all()


def test_pieces_choose_what_the_whole_chooses():
    q, k = random_qk(4, 2, 60, 60)
    whole = select_chunks(q, k, chunk_size=7, top_k=3)
    starts = jnp.array([11, 29])
    piece = jnp.stack([q[0, 11:31], q[1, 29:49]])
    step = jax.jit(lambda q, k, o: select_chunks(q, k, chunk_size=7, top_k=3, q_offset=o))
    expected = jnp.stack([whole[0, 11:31], whole[1, 29:49]])
    np.testing.assert_array_equal(step(piece, k, starts), expected)
    np.testing.assert_array_equal(step(q[:, 5:25], k, jnp.int32(5)), whole[:, 5:25])


def test_running_sums_select_like_keys():
    """As decoding does: sums kept for the chunks so far, garbage behind them."""
    q, k = random_qk(5, 2, 50, 50)
    sums = chunk_key_sums(k, 8)
    assert sums.shape == (2, 7, 2, 16) and sums.dtype == jnp.float32
    assert_close(sums[:, 6], np.asarray(k)[:, 48:].sum(1), rel=1e-6)
    stale = jnp.concatenate([sums[:, :6], jnp.full((2, 4, 2, 16), jnp.nan)], axis=1)
    actual = select_from_rows(q, stale, query_positions(0, 2, 50), chunk_size=8, count=2)
    np.testing.assert_array_equal(actual, select_chunks(q, k, chunk_size=8, top_k=3))


OTHERS = [Selector("max", 4), Selector("pooled", 2), Selector("bounds"), Selector("max", 8)]
OTHERS.append(Selector("seer"))  # as all here with queries of a model without learned maps


@pytest.mark.parametrize("selector", OTHERS, ids=str)
@pytest.mark.parametrize("length", [61, 8, 1])
def test_other_selectors_equal_their_oracle(selector, length, blocks_of_queries):
    q, k = random_qk(11, 2, length, 77)
    options = {"chunk_size": 8, "top_k": 4, "q_offset": jnp.asarray([3, 16]), "selector": selector}
    means, q = functools.partial(select_chunks, q), queries_for(selector, q)
    actual = jax.jit(lambda q, k: select_chunks(q, k, **options))(q, k)
    np.testing.assert_array_equal(actual, select_chunks_reference(q, k, **options))
    if length == 61:  # it is another choice than by means
        assert (actual != means(k, **options | {"selector": selection.MEAN})).any()


@pytest.mark.parametrize("selector", OTHERS, ids=str)
def test_ties_of_other_selectors_go_to_the_lower_index(selector):
    q, k = random_qk(3, 1, 48, 48)
    q = queries_for(selector, q)
    actual = select_chunks(q, jnp.ones_like(k), chunk_size=8, top_k=3, selector=selector)
    for position, chosen in enumerate(np.asarray(actual)[0]):
        past = list(range(position // 8))[:2]
        assert (chosen == [*past, *[-1] * (2 - len(past))]).all()


@pytest.mark.parametrize("selector", [selection.MEAN, *OTHERS], ids=str)
def test_rows_of_garbage_behind_are_ignored(selector):
    q, k = random_qk(5, 2, 50, 50)
    q = queries_for(selector, q)
    rows = selector.rows_of(k, 8)
    assert rows.shape == (2, 7 * selector.rows, 2, 16) and rows.dtype == jnp.float32
    garbage = jnp.full((2, 4 * selector.rows, 2, 16), jnp.nan)
    stale = jnp.concatenate([rows[:, : 6 * selector.rows], garbage], axis=1)
    options = {"chunk_size": 8, "selector": selector}
    positions = query_positions(0, 2, 50)
    actual = select_from_rows(q, stale, positions, count=2, **options)
    np.testing.assert_array_equal(actual, select_chunks(q, k, top_k=3, **options))
    for t in (0, 13, 49):  # single queries, as in decoding
        one = select_from_rows(q[:, t, None], stale, positions[:, t, None], count=2, **options)
        np.testing.assert_array_equal(one, actual[:, t, None])


def all_scores(selector, q, k, chunk_size):
    """[B, T, H, N]."""
    rows = selector.rows_of(k, chunk_size).swapaxes(1, 2)
    keys = selector.keys(rows, chunk_size)
    products = jnp.einsum("bthf,bhnf->bthn", selector.queries(q, 2), keys)
    return selector.combine(products.swapaxes(1, 2), k.shape[-1]).swapaxes(1, 2)


def test_bounds_are_never_below_any_score():
    q, k = random_qk(12, 1, 10, 40)
    scores = all_scores(Selector("bounds"), q, k, 8)
    best = jnp.einsum("bthk,bshk->bths", q, k).reshape(1, 10, 2, 5, 8).max(-1)
    assert (np.asarray(scores - best) >= -1e-5).all()


def test_one_block_is_the_mean_and_single_keys_the_best_key():
    q, k = random_qk(13, 1, 64, 64)
    options = {"chunk_size": 8, "top_k": 3}
    by_mean = select_chunks(q, k, **options)
    for kind in ("max", "pooled"):
        other = select_chunks(q, k, **options, selector=Selector(kind, 1))
        np.testing.assert_array_equal(other, by_mean)
    best = jnp.einsum("bthk,bshk->bths", q, k).reshape(1, 64, 2, 8, 8).max(-1)
    scores = all_scores(Selector("max", 8), q, k, 8)
    assert_close(scores, best, rel=1e-6)


def test_no_gradient_flows():
    q, k = random_qk(6, 1, 20, 20)

    def use(q, k):
        chosen = select_chunks(q, k, chunk_size=4, top_k=3)
        return jnp.sum(q) + jnp.sum(chosen.astype(jnp.float32))

    dq, dk = jax.grad(use, (0, 1))(q, k)
    np.testing.assert_array_equal(dq, np.ones_like(dq))
    np.testing.assert_array_equal(dk, np.zeros_like(dk))


@pytest.mark.thorough
def test_a_block_is_scored_against_the_chunks_before_it(monkeypatch):
    cut_small(monkeypatch)
    best, widths = selection._best, []
    note = lambda scores, count: widths.append(scores.shape[-1]) or best(scores, count)
    monkeypatch.setattr(selection, "_best", note)
    q, k = random_qk(9, 1, 32, 32)
    with jax.disable_jit():  # runs the branch that is taken, and no other
        select_chunks(q, k, chunk_size=4, top_k=3)
    assert widths == [2, 4, 6, 8]


def test_scores_are_never_held_in_full():
    q, k = random_qk(7, 1, 8192, 8192, size=4)
    shapes = jaxpr_shapes(lambda q, k: select_chunks(q, k, chunk_size=16, top_k=3), q, k)
    largest = max(np.prod(shape) for shape in shapes)
    assert largest <= selection.SCORES_PER_BLOCK < 8192 * 2 * 512


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(selector=Selector("best")), "selector 'best' is unknown"),
        (dict(selector=Selector("seer")), "same batch and key size .in q 3 times it, by 'seer'"),
        (dict(selector=Selector("max", 3)), "4 tokens can't be cut into 3 equal blocks"),
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(top_k=0), "top_k is 0"),
        (dict(chunk_size=2.0), "chunk_size is 2.0"),
        (dict(q_offset=-1), "q_offset is -1"),
        (dict(q_offset=jnp.zeros(3, jnp.int32)), r"q_offset is int32\[3\]"),
        (dict(q_offset=jnp.float32(1)), "q_offset is float32"),
        (dict(k=jnp.zeros((2, 8, 3, 4))), "2 query heads can't share 3 key"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(q=jnp.zeros((2, 8, 2, 4)), k=jnp.zeros((2, 8, 2, 4)), chunk_size=4, top_k=2)
    arguments.update(change)
    q, k = arguments.pop("q"), arguments.pop("k")
    with pytest.raises(ValueError, match=message):
        select_chunks(q, k, **arguments)

"""Sparse attention: the XLA forms against the reference with a given selection, the oracle
against a NumPy loop, equality with full attention, causality, memory, transforms, errors."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops import block_sparse
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.block_sparse_xla import order_queries, sort_pairs
from rwkvx_jax.ops.dispatch import forget_choices
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.selection import Selector, select_chunks
from tests.helpers import assert_close
from tests.ops.attention_cases import (
    compare,
    jaxpr_shapes,
    random_qkv,
    random_selection,
    value_and_gradients,
)

FORMS = "xla", "masked"


@functools.cache
def compiled(implementation, chunk_size, top_k):
    """(q, k, v, selection, q_offset) -> (out, dq, dk, dv), compiled once a shape."""

    def attend(q, k, v, selection, q_offset):
        return sparse_attention(
            q,
            k,
            v,
            chunk_size=chunk_size,
            top_k=top_k,
            selection=selection,
            q_offset=q_offset,
            implementation=implementation,
        )

    return value_and_gradients(attend)


def check(qkv, selection, chunk_size, q_offset=0, **tolerances):
    """The XLA forms against the reference."""
    top_k = selection.shape[3] + 1
    expected = compiled("reference", chunk_size, top_k)(*qkv, selection, q_offset)
    for form in FORMS if chunk_size <= 512 else FORMS[:1]:
        actual = compiled(form, chunk_size, top_k)(*qkv, selection, q_offset)
        compare(actual, expected, **tolerances)


FULL_ORACLE = value_and_gradients(lambda *qkv: full_attention(*qkv, implementation="reference"))


def numpy_attention(q, k, v, selection, chunk_size, offsets, scale):
    """One query at a time over an explicit list of keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        position = offsets[b] + t
        own = position // chunk_size
        keys = list(range(own * chunk_size, position + 1))
        for c in selection[b, t, h]:
            if 0 <= c < own:
                keys += range(c * chunk_size, (c + 1) * chunk_size)
        score = k[b, keys, h] @ q[b, t, h] * scale
        weight = np.exp(score - score.max())
        out[b, t, h] = weight @ v[b, keys, h] / weight.sum()
    return out


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
@pytest.mark.parametrize(
    "length, keys, offsets, chunk_size, top_k",
    [(23, 23, [0, 0], 5, 3), (9, 40, [2, 31], 6, 4), (5, 5, [0, 0], 1, 2)],
)
def test_follows_the_definition(implementation, length, keys, offsets, chunk_size, top_k):
    q, k, v = random_qkv(0, 2, length, keys, size=8, values=5)
    chosen = random_selection(0, 2, length, 2, chunk_size, top_k, offsets)
    expected = numpy_attention(q, k, v, np.asarray(chosen), chunk_size, offsets, 0.4)
    actual = sparse_attention(
        q,
        k,
        v,
        chunk_size=chunk_size,
        top_k=top_k,
        selection=chosen,
        q_offset=jnp.array(offsets),
        scale=0.4,
        implementation=implementation,
    )
    assert_close(actual, expected, rel=1e-6)


@pytest.mark.parametrize(
    "length, chunk_size, top_k",
    [
        (1, 3, 2),
        (7, 3, 2),
        (64, 9, 3),
        (200, 24, 3),
        (1000, 96, 4),
        pytest.param(1000, 700, 2, marks=pytest.mark.slow),
        pytest.param(1000, 33, 32, marks=pytest.mark.slow),
        pytest.param(200, 1, 5, marks=pytest.mark.slow),
        pytest.param(2100, 1030, 3, marks=pytest.mark.slow),
    ],
)
def test_matches_oracle(length, chunk_size, top_k):
    chosen = random_selection(length, 1, length, 2, chunk_size, top_k)
    check(random_qkv(length, 1, length), chosen, chunk_size)


@pytest.mark.parametrize("length, chunk_size", [(200, 24), (1000, 96)])
@pytest.mark.parametrize("target", [0, 3])
def test_all_queries_may_choose_one_chunk(length, chunk_size, target):
    """The worst skew: one chunk gets a pair from every later query, the others none."""
    own = np.arange(length) // chunk_size
    chosen = np.full((1, length, 2, 2 if length == 200 else 3), -1, np.int32)
    chosen[..., 1] = np.where(own > target, target, -1)[None, :, None]
    check(random_qkv(1, 1, length), jnp.asarray(chosen), chunk_size)


def test_a_chunk_nobody_chooses():
    chosen = random_selection(2, 1, 200, 2, 24, 3, skip=(2, 5))
    assert not np.isin(np.asarray(chosen), (2, 5)).any()
    check(random_qkv(2, 1, 200), chosen, 24)


@pytest.mark.parametrize("offset", [37, 48, [0, 100]])
def test_queries_in_the_middle(offset):
    """Pieces of a prompt: queries begin anywhere, per row, and inside a chunk."""
    offsets = np.broadcast_to(offset, 2)
    chosen = random_selection(3, 2, 45, 2, 16, 3, offsets)
    check(random_qkv(3, 2, 45, 150, values=8), chosen, 16, jnp.asarray(offsets))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [64, 1300])
@pytest.mark.parametrize("chunk_size", [64, 600, 1030])
def test_queries_in_the_middle_of_long_keys(offset, chunk_size):
    chosen = random_selection(3, 1, 700, 1, chunk_size, 3, offset)
    check(random_qkv(3, 1, 700, 2050, heads=1), chosen, chunk_size, jnp.int32(offset))


def test_own_chunk_only():
    check(random_qkv(4, 2, 100), jnp.zeros((2, 100, 2, 0), jnp.int32), 24)


def test_bfloat16():
    """bfloat16 in and out; the oracle computes in float32 from the same bfloat16 inputs."""
    qkv = random_qkv(5, 1, 200, dtype=jnp.bfloat16)
    chosen = random_selection(5, 1, 200, 2, 24, 3)
    check(qkv, chosen, 24, forward=1e-2, gradient=2e-2)


def test_large_scores_stay_finite():
    """Scores of some hundreds, whose exponentials overflow."""
    q, k, v = random_qkv(10, 1, 200)
    check((10 * q, 10 * k, v), random_selection(0, 1, 200, 2, 24, 3), 24)


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
@pytest.mark.parametrize("length, chunk_size, top_k", [(96, 32, 3), (90, 7, 32)])
def test_equals_full_attention_while_everything_fits(implementation, length, chunk_size, top_k):
    qkv = random_qkv(6, 2, length)
    chosen = select_chunks(*qkv[:2], chunk_size=chunk_size, top_k=top_k)
    actual = compiled(implementation, chunk_size, top_k)(*qkv, chosen, 0)
    compare(actual, FULL_ORACLE(*qkv))


def test_differs_from_full_attention_beyond():
    qkv = random_qkv(6, 1, 97)
    sparse = sparse_attention(*qkv, chunk_size=32, top_k=3)
    dense = full_attention(*qkv, implementation="reference")
    assert_close(sparse[:, :96], dense[:, :96], rel=1e-5)
    assert np.abs(np.asarray(sparse - dense)[:, 96:]).max() > 1e-3


@functools.partial(jax.jit, static_argnums=4)
def gradients_at(t, q, k, v, implementation):
    def output(q, k, v):
        out = sparse_attention(q, k, v, chunk_size=8, top_k=3, implementation=implementation)
        return jnp.sum(jax.lax.dynamic_index_in_dim(out, t, axis=1))

    return jax.grad(output, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("t", [0, 17, 31, 32, 60])
def test_causality_by_gradient(t, implementation):
    dq, dk, dv = map(np.asarray, gradients_at(t, *random_qkv(7, 1, 64), implementation))
    for gradient in (dk, dv):
        assert np.abs(gradient[:, t + 1 :]).max(initial=0) == 0
    assert np.abs(dv[:, t]).min() > 0
    assert np.abs(np.delete(dq, t, axis=1)).max() == 0


@pytest.mark.parametrize("implementation", ["reference", *FORMS])
def test_entries_that_are_not_past_are_ignored(implementation):
    qkv = random_qkv(8, 1, 40)
    good = random_selection(8, 1, 40, 2, 8, 2)
    own = (jnp.arange(40, dtype=jnp.int32) // 8)[None, :, None, None]
    bad = jnp.concatenate([good, jnp.broadcast_to(own, good.shape), good + 1000], axis=3)
    options = dict(chunk_size=8, implementation=implementation)
    actual = sparse_attention(*qkv, top_k=4, selection=bad, **options)
    assert_close(actual, sparse_attention(*qkv, top_k=2, selection=good, **options), rel=1e-6)


def test_selects_by_itself():
    q, k, v = random_qkv(9, 1, 80)
    chosen = select_chunks(q, k, chunk_size=8, top_k=4)
    expected = sparse_attention(q, k, v, chunk_size=8, top_k=4, selection=chosen)
    np.testing.assert_array_equal(sparse_attention(q, k, v, chunk_size=8, top_k=4), expected)


@pytest.mark.parametrize(
    "queries, keys, chunk_size, top_k, form",
    [
        (1024, 1024, 32, 64, "masked"),
        (8192, 8192, 32, 64, "masked"),
        (16384, 16384, 32, 64, "xla"),
        (4096, 8192, 32, 64, "xla"),  # the last ones read least of what is before them
        (4096, 4096, 512, 4, "xla"),
        (2048, 2048, 512, 4, "masked"),
        (65536, 65536, 512, 200, "masked"),
        (6144, 6144, 2048, 3, "xla"),  # larger than a block
    ],
)
def test_form_by_shapes(queries, keys, chunk_size, top_k, form, caplog):
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (queries, keys))
    chosen = jax.ShapeDtypeStruct((1, queries, 1, top_k - 1), jnp.int32)
    run = functools.partial(sparse_attention, chunk_size=chunk_size, top_k=top_k)
    forget_choices()
    with caplog.at_level(logging.INFO, "rwkvx_jax.ops"):
        jax.eval_shape(lambda q, k, s: run(q, k, k, selection=s), q, k, chosen)
    assert caplog.messages == [f"sparse_attention: using '{form}' on cpu"]


@pytest.mark.parametrize("offset", [0, 5])
def test_nothing_is_chosen_where_everything_is_read(offset, monkeypatch):
    q, k, v = random_qkv(6, 2, 70, 75)
    options = dict(chunk_size=25, top_k=3, q_offset=offset)
    chosen = select_chunks(q, k, **options)
    expected = sparse_attention(q, k, v, **options, selection=chosen, implementation="xla")
    monkeypatch.setattr(block_sparse, "select_chunks", None)
    assert_close(sparse_attention(q, k, v, **options), expected, rel=1e-5)
    with pytest.raises(ValueError, match="can't be cut into 2 equal blocks"):
        sparse_attention(q, k, v, **options, selector=Selector("max", 2))
    with pytest.raises(TypeError, match="not callable"):
        sparse_attention(q, k, v, **{**options, "top_k": 2})


@pytest.mark.parametrize("implementation", FORMS)
def test_narrow_integers(implementation):
    """300 chunks, more than an int8 can count."""
    qkv = random_qkv(6, 1, 600)
    chosen = random_selection(6, 1, 600, 2, 2, 2)
    chosen = jnp.where(chosen < 100, chosen, -1)
    wide, narrow = (
        compiled(implementation, 2, 2)(*qkv, chosen.astype(dtype), 0)
        for dtype in (jnp.int32, jnp.int8)
    )
    jax.tree.map(np.testing.assert_array_equal, wide, narrow)


def test_sorting_pairs():
    chosen = jnp.array([[-1, -1], [0, 5], [1, 0], [1, -1], [0, 1]], jnp.int32)
    # One choice a token, positions 6..10, own chunks 1, 2.
    queries, starts = sort_pairs(chosen[:, None], jnp.int32(6), 4, 2)
    np.testing.assert_array_equal(starts, [0, 3, 6])
    np.testing.assert_array_equal(queries[:6], [1, 2, 4, 2, 3, 4])
    chunk = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(9), (50, 1)), axis=1))
    single, pairs = order_queries(chunk[:, :3], 9), order_queries(chunk[:, :3], 2**30)
    np.testing.assert_array_equal(single, pairs)


@functools.partial(jax.jit, static_argnums=3)
def loss_gradients(q, k, v, implementation=None):
    def loss(q, k, v):
        options = dict(chunk_size=64, top_k=3, implementation=implementation)
        return jnp.sum(sparse_attention(q, k, v, **options) ** 2)

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize(
    "form, chunk_size, top_k",
    [("xla", 64, 3), ("xla", 64, 32), ("masked", 64, 3), ("masked", 300, 9), (None, 5461, 4)],
)
def test_no_quadratic_array(form, chunk_size, top_k):
    """No array is larger than the inputs, the selection, a boolean a query and chunk, or one block
    of scores."""
    length = 16384
    qkv = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3
    chosen = jax.ShapeDtypeStruct((1, length, 1, top_k - 1), jnp.int32)

    def run(q, k, v, chosen):
        return compiled(form, chunk_size, top_k)(q, k, v, chosen, 0)

    largest = max(np.prod(shape) for shape in jaxpr_shapes(run, *qkv, chosen))
    chunks = length // chunk_size + 8 if form == "masked" else 0
    assert largest <= max(length * (top_k + 7), length * chunks, 512 * 512)


@pytest.mark.slow
def test_memory_is_linear():
    def temporaries(length):
        qkv = [jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)] * 3
        memory = loss_gradients.lower(*qkv).compile().memory_analysis()
        return memory.temp_size_in_bytes

    small, large = temporaries(1 << 15), temporaries(1 << 17)
    assert large < 4.2 * small


@pytest.mark.parametrize("implementation", FORMS)
def test_under_vmap(implementation):
    """Over everything, and with keys and values shared by the mapped rows."""
    run = compiled(implementation, 16, 3)
    rows = [
        (*random_qkv(i, 2, 70), random_selection(i, 2, 70, 2, 16, 3), jnp.int32(0))
        for i in range(3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    actual = jax.vmap(run)(*stacked)
    q, _, _, chosen, offset = stacked
    shared = jax.vmap(run, (0, None, None, 0, 0))(q, *rows[0][1:3], chosen, offset)
    for i, row in enumerate(rows):
        compare([x[i] for x in actual], run(*row))
        compare([x[i] for x in shared], run(row[0], *rows[0][1:3], *row[3:]))


@pytest.mark.parametrize("implementation", FORMS)
def test_under_scan_and_checkpoint(implementation):
    q, k, v = random_qkv(12, 1, 60, heads=1)
    attend = functools.partial(sparse_attention, chunk_size=16, top_k=2)
    layer = jax.checkpoint(lambda x: x + attend(x, k, v, implementation=implementation))

    def scanned(x):
        return jnp.sum(jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)[0] ** 2)

    def unrolled(x):
        return jnp.sum(layer(layer(layer(x))) ** 2)

    assert_close(jax.jit(jax.grad(scanned))(q), jax.grad(unrolled)(q), rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(chunk_size=0), "chunk_size is 0"),
        (dict(top_k=-2), "top_k is -2"),
        (dict(scale=-1.0), "scale is -1.0"),
        (dict(q_offset=5), "positions 5..12"),
        (dict(v=jnp.zeros((2, 7, 2, 4))), "one value row per key row"),
        (dict(k=jnp.zeros((2, 8, 2, 5)), v=jnp.zeros((2, 8, 2, 5))), "key size"),
        (dict(q=jnp.zeros((2, 8, 4))), r"must be \[B, T, H, K\]"),
        (dict(q=jnp.zeros((2, 0, 2, 4))), "no tokens"),
        (dict(q=jnp.zeros((2, 8, 2, 4), jnp.bfloat16)), "one floating dtype"),
        (dict(selection=jnp.zeros((2, 8, 2, 3), jnp.int32)), r"expected int32 \[2, 8, 2, 1\]"),
        (dict(selection=jnp.zeros((2, 8, 2, 1))), "selection is float32"),
        (dict(implementation="fast"), "unknown implementation 'fast'"),
        (dict(implementation="pallas"), "platform is cpu; use"),
        (
            dict(implementation="masked", chunk_size=600),
            "larger than a block of 512; use 'full' or",
        ),
        (dict(implementation="full", top_k=1), "unknown implementation 'full'"),
    ],
)
def test_bad_arguments(change, message):
    x = jnp.zeros((2, 8, 2, 4))
    arguments = dict(q=x, k=x, v=x, chunk_size=4, top_k=2)
    arguments.update(change)
    qkv = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=message):
        sparse_attention(*qkv, **arguments)

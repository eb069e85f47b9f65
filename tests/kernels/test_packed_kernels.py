"""Packed documents in the kernels for TPU and GPU, interpreted on a CPU.

Sparse attention against the reference on the same selection and WKV-7 against its oracle, in values
and all gradients, and what one document owes to another: exactly nothing. The gate against the
choice in XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_gpu, block_sparse_tpu, wkv7_gpu, wkv7_tpu
from rwkvx_jax.ops.attention_reference import sparse_attention_reference
from rwkvx_jax.ops.documents import beginnings, document_starts
from rwkvx_jax.ops.recurrence import wkv7_sequential
from rwkvx_jax.ops.selection import Selector, _select_by_kernel, select_chunks
from tests.helpers import assert_close
from tests.kernels import test_wkv7_kernels as wkv7_cases
from tests.kernels.test_block_sparse_kernels import GPU, SMALL
from tests.ops.attention_cases import compare, random_qkv, random_selection
from tests.ops.test_packed_attention import ids_of, runs_of

# Borders at 63, 64, 65, within chunks and at the last token; padding around and between; nothing
# but padding; one document.
ROWS = (63, 1, 1, 85, 149, 1), (-3, 60, 1, 200, -35, 1), (-300,), (300,)
TIME = 300
CORES = dataclasses.replace(SMALL, cores=2)  # which share the heads of a pack
PIECE = ROWS[:2], 130, (40, 133)  # queries in the middle, of each row somewhere else


def chosen_of(ids, queries, heads, chunk, slots, offset):
    """A random selection without chunks that end before their query's document begins."""
    chosen = random_selection(1, ids.shape[0], queries, heads, chunk, slots + 1, offset)
    place = np.broadcast_to(offset, ids.shape[0])[:, None] + np.arange(queries)
    first = np.take_along_axis(np.asarray(document_starts(ids)), place, axis=1) // chunk
    return jnp.where(chosen >= first[:, :, None, None], chosen, -1)


def gradients_of(attend, **options):
    """(cotangent, q, k, v, *more) -> (out, dq, dk, dv)."""

    @jax.jit
    def run(cotangent, q, k, v, *more):
        out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *more, **options), q, k, v)
        return out, *pull_back(cotangent)

    return run


@pytest.mark.parametrize(
    "tile, dtype, size, chunk, slots, heads, key_heads, rows, queries, offset",
    [
        pytest.param(tile, *case, marks=mark, id=f"{name}-{'gpu' if tile is GPU else 'tpu'}")
        for name, tile, mark, case in (
            ("float32", SMALL, pytest.mark.thorough, (jnp.float32, 64, 64, 4, 1, 1, ROWS, TIME, 0)),
            ("float32", GPU, pytest.mark.thorough, (jnp.float32, 64, 64, 4, 1, 1, ROWS, TIME, 0)),
            ("bfloat16", SMALL, pytest.mark.slow, (jnp.bfloat16, 64, 64, 4, 2, 2, ROWS, TIME, 0)),
            ("128", SMALL, pytest.mark.slow, (jnp.float32, 128, 64, 4, 1, 1, ROWS[:2], TIME, 0)),
            ("128", GPU, pytest.mark.slow, (jnp.bfloat16, 128, 64, 4, 1, 1, ROWS[:2], TIME, 0)),
            ("groups", SMALL, pytest.mark.slow, (jnp.float32, 64, 32, 7, 4, 2, ROWS[:2], TIME, 0)),
            ("chunk 32", GPU, pytest.mark.slow, (jnp.float32, 64, 32, 7, 1, 1, ROWS[:2], TIME, 0)),
            ("256", SMALL, pytest.mark.slow, (jnp.float32, 64, 256, 1, 1, 1, ROWS[:2], TIME, 0)),
            ("cores", CORES, pytest.mark.slow, (jnp.float32, 64, 64, 4, 2, 2, ROWS[:2], TIME, 0)),
            ("rows", SMALL, pytest.mark.slow, (jnp.float32, 64, 64, 4, 1, 1, *PIECE)),
            ("rows", GPU, pytest.mark.slow, (jnp.float32, 64, 64, 4, 1, 1, *PIECE)),
        )
    ],
)
def test_sparse_attention(tile, dtype, size, chunk, slots, heads, key_heads, rows, queries, offset):
    ids = ids_of(*rows)
    starts, batch = document_starts(ids), len(rows)
    q = random_qkv(1, batch, queries, heads=heads, size=size, dtype=dtype)[0]
    _, k, v = random_qkv(2, batch, TIME, heads=key_heads, size=size, dtype=dtype)
    cotangent = random_qkv(3, batch, queries, heads=heads, size=size, dtype=dtype)[0]
    chosen = chosen_of(ids, queries, key_heads, chunk, slots, offset)
    place = np.broadcast_to(offset, batch)[:, None] + np.arange(queries)
    known = offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)
    options = {"chunk_size": chunk, "scale": size**-0.5, "q_offset": known, "starts": starts}
    module = block_sparse_gpu if tile is GPU else block_sparse_tpu
    kernel = gradients_of(module.block_sparse_attention, tile=tile, interpret=True, **options)
    found = kernel(cotangent, q, k, v, chosen)
    exact = [x.astype(jnp.float32) for x in (cotangent, q, k, v)]
    expected = gradients_of(sparse_attention_reference, **options)(*exact, chosen)
    tight = dtype == jnp.float32
    forward, gradient = (1e-5, 1e-4) if tight else (5e-3, 2e-2)
    found = [x.astype(jnp.float32) for x in found]
    compare(found, expected, forward=forward, gradient=gradient)

    # Outputs of every second document alone: nothing flows into the others.
    runs = runs_of(ids)
    ours = runs % 2 == 1
    ours_of_queries = np.take_along_axis(ours, place, axis=1)
    masks = [x[..., None, None] for x in (ours_of_queries, ours, ours)]
    _, *gradients = kernel(jnp.where(masks[0], cotangent, 0), q, k, v, chosen)
    for name, gradient, mask in zip("qkv", gradients, masks, strict=True):
        gradient = np.asarray(gradient, np.float32)
        assert not np.where(mask, 0, gradient).any() and gradient.any(), name


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind, chunk, size, offset, queries",
    [
        ("bounds", 6, 64, (7, 77), 200),
        pytest.param("mean", 2, 128, 0, TIME, marks=pytest.mark.slow),
    ],
)
def test_the_gate(kind, chunk, size, offset, queries):
    """Small integers: scores are exact, and ties are many."""
    rng = np.random.default_rng(chunk)
    ids, heads = ids_of(*ROWS[:2]), 3
    q = jnp.asarray(rng.integers(-2, 3, (2, queries, heads, size)), jnp.float32)
    k = jnp.asarray(rng.integers(-1, 2, (2, TIME, heads, size)), jnp.float32)
    known = offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)
    options = {"chunk_size": chunk, "q_offset": known, "selector": Selector(kind)}
    by_kernel = jax.jit(functools.partial(_select_by_kernel, count=3, interpret=True, **options))
    found = by_kernel(q, k, starts=document_starts(ids))
    choose = jax.jit(functools.partial(select_chunks, top_k=4, implementation="xla", **options))
    np.testing.assert_array_equal(found, choose(q, k, segment_ids=ids))
    assert len(np.unique(found)) > 10


@pytest.mark.parametrize(
    "module, dtype, size",
    [
        pytest.param(wkv7_tpu, jnp.float32, 64, marks=pytest.mark.thorough),
        pytest.param(wkv7_gpu, jnp.float32, 64, marks=pytest.mark.thorough),
        pytest.param(wkv7_tpu, jnp.bfloat16, 64, marks=pytest.mark.slow),
        pytest.param(wkv7_tpu, jnp.float32, 128, marks=pytest.mark.slow),
        pytest.param(wkv7_gpu, jnp.bfloat16, 128, marks=pytest.mark.slow),
    ],
)
def test_wkv7(module, dtype, size):
    """Chunks of 64 tokens (16 on a GPU) with several borders, none, and one at either end."""
    ids = ids_of((63, 1, 1, 20, -15, 60, 39, 1), (-3, 61, 64, 1, 71))
    inputs, cotangents = wkv7_cases.make_inputs("random", dtype, 200, 1, size, batch=2)
    fresh = beginnings(ids)
    tile = wkv7_cases.SMALL if module is wkv7_tpu else None
    settings = {"fresh": fresh[..., 0, 0] > 0, "tile": tile, "interpret": True}

    def results(op, options):
        @jax.jit
        def run(inputs, cotangents):
            outputs, pull_back = jax.vjp(functools.partial(op, **options), *inputs)
            return (*outputs, *pull_back(cotangents))

        return run

    kernel = results(module.wkv7, settings)
    found = kernel(inputs, cotangents)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
    expected = results(wkv7_sequential, {"fresh": fresh})(*exact)
    forward, gradient = (1e-5, 1e-4) if dtype == jnp.float32 else (1e-2, 4e-2)
    names = "y", "end", *wkv7_cases.NAMES
    for i, (name, x, y) in enumerate(zip(names, found, expected, strict=True)):
        assert_close(x.astype(jnp.float32), y, rel=forward if i < 2 else gradient, name=name)

    dy, dend = cotangents
    for document in (1, 4, 5):  # longer than a token
        own = np.asarray(ids == document)[..., None, None]
        _, _, *gradients = kernel(inputs, (jnp.where(own, dy, 0), jnp.zeros_like(dend)))
        *gradients, dstart = (np.asarray(x, np.float32) for x in gradients)
        for name, x in zip(wkv7_cases.NAMES[:-1], gradients, strict=True):
            assert not np.where(own, 0, x).any() and x.any(), (document, name)
        assert dstart[0].any() == (document == 1) and not dstart[1].any()


@pytest.mark.parametrize("module", [block_sparse_tpu, block_sparse_gpu], ids=["tpu", "gpu"])
def test_documents_of_another_shape_are_refused(module):
    x, selection = jnp.zeros((1, 128, 2, 64)), jnp.zeros((1, 128, 2, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"starts \(1, 64\) must be \[B, Tk\]"):
        module.block_sparse_attention(
            x, x, x, selection, chunk_size=64, scale=1.0, starts=jnp.zeros((1, 64), jnp.int32)
        )


@pytest.mark.parametrize("module", [wkv7_tpu, wkv7_gpu], ids=["tpu", "gpu"])
def test_beginnings_of_another_shape_are_refused(module):
    x = jnp.zeros((1, 128, 2, 64))
    with pytest.raises(ValueError, match=r"fresh has shape \(1, 64\), not \[B, T\]"):
        module.wkv7(x, x, x, x, x, x, fresh=jnp.zeros((1, 64), bool))

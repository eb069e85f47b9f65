"""The block-sparse kernels for TPU with query heads that share a key head and a choice of chunks,
interpreted on a CPU, against the reference; what they refuse; and compiled for TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import block_sparse_gpu, block_sparse_tpu, selection_tpu
from rwkvx_jax.ops.attention_reference import sparse_attention_reference
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.selection import (
    Selector,
    kernel_factors,
    select_chunks,
)
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from rwkvx_jax.perf import topology
from tests.kernels.test_block_sparse_kernels import SMALL as UNGROUPED
from tests.kernels.test_block_sparse_kernels import assert_no_races, interpreted_by_cores
from tests.ops.attention_cases import compare, random_qkv, random_selection, value_and_gradients

SMALL = dataclasses.replace(UNGROUPED, shared_rows=128)


@pytest.fixture(autouse=True)
def forget_programs():
    """Interpreted kernels make large programs, each of thousands of memory maps."""
    yield
    jax.clear_caches()


def grouped_qkv(seed, heads, key_heads, length, keys, size=64, dtype=jnp.float32, batch=1):
    q, _, _ = random_qkv(seed, batch, length, heads=heads, size=size, dtype=dtype)
    _, k, v = random_qkv(seed + 1, batch, length, keys, heads=key_heads, size=size, dtype=dtype)
    return q, k, v


def check(qkv, selection, chunk_size, offset=0, tile=SMALL, interpret=True):
    """offset: a Python int for a known one, an array for a traced one."""
    options = dict(chunk_size=chunk_size, scale=0.125, q_offset=offset)
    kernel = functools.partial(
        block_sparse_tpu.block_sparse_attention,
        selection=selection,
        tile=tile,
        interpret=interpret,
        **options,
    )
    actual = value_and_gradients(kernel)(*qkv)
    assert all(x.dtype == qkv[0].dtype for x in actual)
    oracle = functools.partial(sparse_attention_reference, selection=selection, **options)
    expected = value_and_gradients(oracle)(*(x.astype(jnp.float32) for x in qkv))
    forward, gradient = (1e-5, 1e-4) if qkv[0].dtype == jnp.float32 else (5e-3, 2e-2)
    actual = [x.astype(jnp.float32) for x in actual]
    compare(actual, expected, forward=forward, gradient=gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, key_heads, chunk_size, offset",
    [
        (4, 2, 32, 0),
        (4, 1, 32, [37]),
        (12, 3, 64, 0),
        (2, 1, 32, 0),
        (16, 1, 32, 5),
        (8, 1, 192, [40]),
    ],
)
def test_groups_equal_the_oracle(heads, key_heads, chunk_size, offset):
    """Groups of 2, 4, 8 and 16, an odd number of key heads and one, unround lengths, queries in the
    middle of chunks; chunks that are larger than a cell of the own part."""
    qkv = grouped_qkv(0, heads, key_heads, 150, 190)
    selection = random_selection(2, 1, 150, key_heads, chunk_size, 4, offset)
    check(qkv, selection, chunk_size, offset if isinstance(offset, int) else jnp.array(offset))


@pytest.mark.slow
@pytest.mark.parametrize("group, key_heads, rows", [(2, 1, 256), (4, 3, 128), (16, 1, 256)])
def test_bfloat16(group, key_heads, rows):
    """Both heads of a pack, and tiles of one strip and of several."""
    qkv = grouped_qkv(3, group * key_heads, key_heads, 203, 203, dtype=jnp.bfloat16)
    tile = dataclasses.replace(SMALL, shared_rows=rows)
    check(qkv, random_selection(4, 1, 203, key_heads, 32, 4), 32, tile=tile)


@pytest.mark.slow
@pytest.mark.parametrize("group, size", [(4, 64), (2, 128)])
def test_all_choose_one_chunk(group, size):
    """Over several segments, of which some rows fill tiles and others do not; heads of 128."""
    qkv = grouped_qkv(5, group, 1, 300, 300, size=size)
    own = np.arange(300) // 64
    selection = np.full((1, 300, 1, 3), -1, np.int32)
    selection[..., 2] = np.where(own > 1, 1, -1)[None, :, None]
    check(qkv, jnp.asarray(selection), 64)


@pytest.mark.slow
@pytest.mark.parametrize("group", [2, 4, 16])
def test_tpu_semantics(group):
    """Memory that is not a number until it is written, and no two accesses that race."""
    qkv = grouped_qkv(7, group, 1, 130, 130)
    selection = random_selection(6, 1, 130, 1, 32, 3)
    check(qkv, selection, 32, interpret=interpreted_by_cores(1))
    assert_no_races()


def structs(heads, key_heads, length=1024, dtype=jnp.bfloat16):
    x = lambda n: jax.ShapeDtypeStruct((1, length, n, 64), dtype)
    return x(heads), x(key_heads), x(key_heads)


@pytest.mark.parametrize(
    "heads, key_heads, chunk_size, message",
    [
        (8, 2, 2048, None),
        (16, 1, 64, None),
        (6, 2, 64, "3 query heads share a key head and 64 and smaller powers of two can"),
        (128, 1, 64, "128 query heads share a key head"),
        (32, 1, 64, "512 tokens at once may have 8192 queries"),
        (16, 1, 2048, "2048 tokens at once may have 8192 queries"),
    ],
)
def test_groups_that_do_not_fit_are_named(heads, key_heads, chunk_size, message):
    tile = block_sparse_tpu.TILES["v5e"]
    reason = block_sparse_tpu.unsupported_reason(*structs(heads, key_heads), 2, chunk_size, 0, tile)
    assert reason is None if message is None else message in reason


def test_a_gpu_takes_no_groups():
    reason = block_sparse_gpu.unsupported_reason(*structs(4, 2), 2, 64)
    assert "4 query heads share 2 key heads" in reason


def test_a_choice_a_query_head_is_refused():
    q, k, v = (jnp.zeros(x.shape) for x in structs(4, 2, 16))
    selection = jnp.zeros((1, 16, 4, 1), jnp.int32)
    with pytest.raises(ValueError, match="one choice a key head"):
        block_sparse_tpu.block_sparse_attention(q, k, v, selection, chunk_size=64, scale=1.0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "selector", [Selector(), Selector(together=4), Selector("bounds", together=4)], ids=str
)
def test_the_gate_chooses_as_the_reference(selector):
    """Choices of 4 query heads, and of each for itself, from one key head's chunks."""
    q, k, _ = grouped_qkv(9, 8, 2, 200, 230)
    factors = kernel_factors(q, k, 32, selector)
    chosen = selection_tpu.select_by_keys(*factors, 30, chunk_size=32, count=3, interpret=True)
    options = dict(chunk_size=32, top_k=4, q_offset=30, selector=selector)
    np.testing.assert_array_equal(chosen, select_chunks_reference(q, k, **options))
    np.testing.assert_array_equal(chosen, select_chunks(q, k, **options))


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.skipif(
    not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
)
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize(
    "heads, key_heads, chunk_size, top_k", [(16, 4, 128, 16), (16, 4, 32, 64), (16, 1, 128, 16)]
)
def test_groups_compile(chip, heads, key_heads, chunk_size, top_k):
    """Gate, routing, attention and all gradients of 131,072 tokens."""
    mesh = topology.topology_mesh(topology.smallest(chip), {"device": 1})
    everywhere = PartitionSpec()
    q, k, v = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, everywhere))
        for x in structs(heads, key_heads, 131072)
    )

    def loss(q, k, v):
        return sparse_attention(
            q,
            k,
            v,
            chunk_size=chunk_size,
            top_k=top_k,
            selector=Selector(together=heads // key_heads),
            implementation="pallas",
        ).astype(jnp.float32).sum()  # fmt: skip

    gradients = jax.grad(loss, (0, 1, 2))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            gradients, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )
        text = jax.jit(mapped).lower(q, k, v).compile().as_text()
    for name in ("select_chunks", "routing_emit", "past_forward", "past_backward", "own_backward"):
        assert name in text

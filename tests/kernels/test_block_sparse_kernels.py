"""The block-sparse kernels for TPU and GPU, interpreted on a CPU, against the reference.

Same selection on both sides. The oracle runs in float32 on the very inputs the kernel gets (rounded
to bfloat16 where those are). Lengths are deliberately unround: a ragged last chunk, an odd number
of heads, several segments of queries. Tiles are small, so that every chunk fills several.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    alignment,
    block_sparse_gpu,
    block_sparse_tpu,
    routing,
    selection_tpu,
)
from pallas_kernels.block_sparse_tpu import TileConfig
from rwkvx_jax.ops.attention_reference import sparse_attention_reference
from rwkvx_jax.ops.selection import (
    Selector,
    kernel_factors,
)
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from rwkvx_jax.ops.selectors import chunk_key_sums
from tests.helpers import assert_close
from tests.ops.attention_cases import compare, random_qkv, random_selection, value_and_gradients


@pytest.fixture(autouse=True)
def forget_programs(request):
    """Drops the compiled programs of a slow test: each keeps up to thousands of memory maps, of
    which Linux gives a process 65,530, and a process that kept all of them died while compiling."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


# Tiles of 128 rows against 128 keys at once; some 200 queries a segment.
SMALL = TileConfig(rows=128, keys=128, joined=256, diagonal=128, segment_bytes=400 * 1024)
GPU = block_sparse_gpu.TileConfig(segment=192)
V5E = block_sparse_tpu.TILES["v5e"]


@functools.cache
def compiled(kernel, chunk_size, tile=SMALL, interpret=True, offset=None):
    """(q, k, v, selection, q_offset) -> (out, dq, dk, dv), compiled once a shape.

    Args:
      kernel: whether the kernel or the oracle.
      offset: q_offset as a Python int; None: the traced argument.
    """

    def attend(q, k, v, selection, q_offset):
        settings = dict(chunk_size=chunk_size, scale=q.shape[-1] ** -0.5)
        if not kernel:
            return sparse_attention_reference(q, k, v, selection, q_offset=q_offset, **settings)
        on_gpu = isinstance(tile, block_sparse_gpu.TileConfig)
        module = block_sparse_gpu if on_gpu else block_sparse_tpu
        return module.block_sparse_attention(
            q,
            k,
            v,
            selection,
            q_offset=q_offset if offset is None else offset,
            tile=tile,
            interpret=interpret,
            **settings,
        )

    return value_and_gradients(attend)


def check(qkv, selection, chunk_size, offset=0, **options):
    """offset: a Python int for a known one, an array for a traced one."""
    known = offset if isinstance(offset, int) else None
    rows = jnp.asarray(offset, jnp.int32)
    actual = compiled(True, chunk_size, offset=known, **options)(*qkv, selection, rows)
    assert all(x.dtype == qkv[0].dtype for x in actual)
    exact = [x.astype(jnp.float32) for x in qkv]
    expected = compiled(False, chunk_size)(*exact, selection, rows)
    tight = qkv[0].dtype == jnp.float32
    forward, gradient = (1e-5, 1e-4) if tight else (5e-3, 2e-2)
    actual = [x.astype(jnp.float32) for x in actual]
    compare(actual, expected, forward=forward, gradient=gradient)


def choose_one(length, heads, slots, chunk_size, target, batch=1):
    """Every later query chooses chunk `target` and nothing else."""
    own = np.arange(length) // chunk_size
    chosen = np.full((batch, length, heads, slots), -1, np.int32)
    chosen[..., slots - 1] = np.where(own > target, target, -1)[None, :, None]
    return jnp.asarray(chosen)


# One shape serves several selections: 4 whole chunks, and more slots than there are past chunks.
LENGTH, HEADS, CHUNK, TOP_K = 300, 3, 64, 7


@pytest.mark.thorough
@pytest.mark.parametrize("tile", [SMALL, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize(
    "kind", ["random", "first chunk", "last chunk", "nobody", "skip", "future"]
)
def test_selections(kind, tile):
    qkv = random_qkv(0, 1, LENGTH, heads=HEADS, size=64)
    chosen = random_selection(
        1, 1, LENGTH, HEADS, CHUNK, TOP_K, skip=(1, 3) if kind == "skip" else ()
    )
    if kind == "first chunk":
        chosen = choose_one(LENGTH, HEADS, TOP_K - 1, CHUNK, 0)
    if kind == "last chunk":
        chosen = choose_one(LENGTH, HEADS, TOP_K - 1, CHUNK, 3)
    if kind == "nobody":
        chosen = jnp.full_like(chosen, -1)
    if kind == "future":  # own and later chunks are no past chunks: ignored
        later = jnp.arange(LENGTH, dtype=jnp.int32)[None, :, None] // CHUNK
        chosen = chosen.at[..., -1].set(later + 1).at[..., -2].set(later)
    check(qkv, chosen, CHUNK, tile=tile)


def test_the_own_chunk_alone():
    qkv = random_qkv(2, 2, 200, heads=1, size=64)
    check(qkv, jnp.zeros((2, 200, 1, 0), jnp.int32), 64)


@pytest.mark.slow
def test_bfloat16():
    qkv = random_qkv(3, 1, LENGTH, heads=2, size=64, dtype=jnp.bfloat16)
    check(qkv, random_selection(4, 1, LENGTH, 2, CHUNK, 3), CHUNK)


@pytest.mark.parametrize(
    "tile", [pytest.param(SMALL, marks=pytest.mark.slow), GPU], ids=["tpu", "gpu"]
)
def test_the_smallest_chunks(tile):
    """Chunks of 32, as configs/recall_64k.py has them: less than a GPU program's 64 rows."""
    qkv = random_qkv(16, 1, 203, heads=1, size=64)
    check(qkv, random_selection(17, 1, 203, 1, 32, 5), 32, tile=tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [SMALL, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("offset", [32, 233, [40, 233]])
def test_the_smallest_chunks_at_an_offset(offset, tile):
    batch = np.size(offset)
    qkv = random_qkv(18, batch, 100, 345, heads=1, size=64)
    check(qkv, random_selection(19, batch, 100, 1, 32, 4, offset), 32, offset, tile=tile)


def test_programs_of_a_gpu_stay_within_the_keys():
    """Queries begin on a multiple of 64 and may lie beyond the last key; chunks may be smaller."""
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 64), jnp.float32) for n in (128, 96))
    selection = jax.ShapeDtypeStruct((1, 128, 1, 2), jnp.int32)
    plan = block_sparse_gpu._make_plan(q, k, selection, 32, 1.0, GPU, None, False)
    first = alignment.first_block(jnp.asarray([168]), 1, 64, 96)
    assert int(first[0]) * 64 + plan.queries <= plan.keys


def plan_for(chip, length, heads, size, chunk_size, slots):
    x = jax.ShapeDtypeStruct((1, length, heads, size), jnp.bfloat16)
    tile = block_sparse_tpu.TILES[chip]
    return block_sparse_tpu._plan_of(x, x, slots, chunk_size, 1.0, 0, tile)


@pytest.mark.parametrize(
    "chip, length, heads, size, chunk_size, slots",
    [
        ("v5e", 131072, 12, 64, 2048, 2),
        ("v5p", 1 << 20, 12, 64, 512, 15),
        ("v5p", 1 << 20, 1, 128, 2048, 31),
        ("v5e", 1 << 19, 2, 64, 32, 63),
    ],
)
def test_all_tables_of_a_call_fit_scalar_memory(chip, length, heads, size, chunk_size, slots):
    """Both tables and the scalar blocks; every tile is in one call, a segment's in the same."""
    plan = plan_for(chip, length, heads, size, chunk_size, slots)
    routes, together = plan.routing, plan.packs_together
    assert plan.problem is None and plan.all_packs % together == 0
    assert together % plan.tile.cores == 0 or plan.all_packs == 1
    segments = np.asarray(routes.segment_of_tile())
    stop = 0
    for part in plan.parts(together):
        assert part.start == stop
        stop = part.stop
        assert stop == routes.all_tiles or segments[stop - 1] != segments[stop]
        chunks = together * plan.shape.heads * (part.stop - part.start)
        steps = (part.stop - part.start) // routes.together
        rows = 2 * routes.together * routes.rows  # of this step and the next
        assert chunks + steps + 1 + rows <= 150_000  # of 2^18, or the compiler spills its own
    assert stop == routes.all_tiles


def test_too_many_tiles_are_named():
    """The tables of one pack and one segment must fit, wherever they are cut."""
    x = lambda length: jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
    reason = functools.partial(block_sparse_tpu.unsupported_reason, chunk_size=32, tile=V5E)
    assert reason(*[x(524288)] * 3, 63) is None
    assert "4194304 queries that choose 7 chunks of 32" in reason(*[x(1 << 22)] * 3, 7)
    assert "pairs a segment" in reason(*[x(4096)] * 3, 8191)


def test_chunks_that_cannot_be_cut_into_cells_are_named():
    """Those that are refused do not compile, and all others do (compiled: 192, 640)."""
    x = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.bfloat16)
    taken = [
        chunk
        for chunk in (32, *range(64, 2049, 64))
        if block_sparse_tpu.unsupported_reason(x, x, x, 1, chunk, tile=V5E) is None
    ]
    assert taken == [32, 64, 128, 192, *range(256, 2049, 128)]
    reason = block_sparse_tpu.unsupported_reason(x, x, x, 1, 576, tile=V5E)
    assert "chunk size 576" in reason and "take 32, 64 or a multiple of 128" in reason


@pytest.mark.slow
def test_head_size_128_with_queries_in_the_middle():
    """Queries begin inside a chunk, one position a batch row, known only when running."""
    offsets = np.array([40, 333])
    qkv = random_qkv(5, 2, 150, 500, heads=1, size=128)
    check(qkv, random_selection(6, 2, 150, 1, CHUNK, 3, offsets), CHUNK, jnp.asarray(offsets))


@pytest.mark.slow
@pytest.mark.parametrize("tile", [SMALL, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("offset", [64, 233, [40, 233]])
def test_an_offset(offset, tile):
    """dK and dV of keys that are no query's own chunk come from the past part alone."""
    batch = np.size(offset)
    qkv = random_qkv(7, batch, 200, 700, heads=2, size=64)
    chosen = random_selection(8, batch, 200, 2, CHUNK, 4, offset)
    check(qkv, chosen, CHUNK, offset, tile=tile)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [SMALL, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    "length, chunk_size, top_k",
    [
        (1, 64, 3),
        (64, 64, 2),
        (700, 64, 9),
        (333, 32, 13),
        (1000, 128, 3),
        (777, 256, 2),
        (1500, 384, 3),
    ],
)
def test_any_length_and_chunk(length, chunk_size, top_k, size, dtype, tile):
    qkv = random_qkv(length, 1, length, heads=2, size=size, dtype=dtype)
    chosen = random_selection(length, 1, length, 2, chunk_size, top_k)
    check(qkv, chosen, chunk_size, tile=tile)


@pytest.mark.slow
@pytest.mark.parametrize(
    "length, chunk_size, top_k", [(4200, 2048, 3), (2100, 64, 32), (1300, 192, 4)]
)
def test_default_tile(length, chunk_size, top_k):
    qkv = random_qkv(9, 1, length, heads=2, size=64, dtype=jnp.bfloat16)
    chosen = random_selection(10, 1, length, 2, chunk_size, top_k)
    check(qkv, chosen, chunk_size, tile=TileConfig())


@pytest.mark.thorough
@pytest.mark.parametrize("heads", [2, 5])
def test_cores_share_the_heads_of_odd_packs(heads):
    """Each head adds to dK and dV of its own."""
    tile = dataclasses.replace(SMALL, cores=2)
    qkv = random_qkv(22, 1, LENGTH, heads=heads, size=64)
    check(qkv, random_selection(23, 1, LENGTH, heads, CHUNK, 3), CHUNK, tile=tile)
    q, chosen = jax.ShapeDtypeStruct((1, LENGTH, heads, 64), jnp.float32), 2
    plan = block_sparse_tpu._plan_of(q, q, chosen, CHUNK, 1.0, 0, tile)
    assert plan.packs_together % 2 == 1 and plan.sums == 2


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fewer_tiles_a_step_of_joined_chunks(together):
    """A tile's chunk lies anywhere in the block of keys, however many tiles share the step."""
    tile = dataclasses.replace(SMALL, together=together)
    qkv = random_qkv(20, 1, LENGTH, heads=1, size=64)
    check(qkv, random_selection(21, 1, LENGTH, 1, CHUNK, 3), CHUNK, tile=tile)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 4])
@pytest.mark.parametrize("size", [64, 128])
def test_skewed_over_segments(size, target):
    """Chunks that many tiles of every segment add to, and chunks nobody chooses."""
    qkv = random_qkv(11, 2, 900, heads=3, size=size)
    check(qkv, choose_one(900, 3, 2, CHUNK, target, batch=2), CHUNK)


@pytest.mark.slow
def test_tables_in_several_calls(monkeypatch):
    """More tiles than scalar memory has room for: one pack and one segment at a time."""
    monkeypatch.setattr(block_sparse_tpu, "SCALAR_WORDS", 1061)
    qkv = random_qkv(12, 2, 310, heads=5, size=64)
    check(qkv, random_selection(13, 2, 310, 5, CHUNK, 3), CHUNK)


def interpreted_by_cores(cores):
    return pltpu.InterpretParams(
        uninitialized_memory="nan", detect_races=True, num_cores_or_threads=cores
    )


def assert_no_races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races.races_found  # pytest would print the whole
    assert not found, "races: see the captured output"


@pytest.mark.slow
@pytest.mark.parametrize("dtype, size", [(jnp.float32, 128), (jnp.bfloat16, 64)])
def test_tpu_semantics(dtype, size):
    """DMA, semaphores, NaN in memory nobody wrote, and no two accesses that race."""
    qkv = random_qkv(14, 1, 290, heads=1, size=size, dtype=dtype)
    chosen = random_selection(15, 1, 290, 1, CHUNK, 3)
    check(qkv, chosen, CHUNK, interpret=interpreted_by_cores(1))
    assert_no_races()


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, size, packs", [(jnp.float32, 128, 2), (jnp.bfloat16, 64, 2), (jnp.float32, 64, 1)]
)
def test_two_cores(dtype, size, packs, monkeypatch):
    """Forward and backward on the two cores of a v5p: two packs, or one whose heads they share, of
    several steps of tiles and two blocks of queries. Routing has a test of its own, and is
    interpreted plainly here."""
    route = routing.route
    plainly = lambda *tables, interpret: route(*tables, interpret=True)
    monkeypatch.setattr(routing, "route", plainly)
    heads = packs * 128 // size
    qkv = random_qkv(16, 1, 130, heads=heads, size=size, dtype=dtype)
    chosen = random_selection(17, 1, 130, heads, CHUNK, 3)
    tile = dataclasses.replace(SMALL, cores=2, together=1)  # a quarter of the rows a step
    check(qkv, chosen, CHUNK, tile=tile, interpret=interpreted_by_cores(2))
    assert_no_races()


@pytest.mark.slow
def test_two_cores_route():
    """Two heads, each of two segments of queries."""
    plan = routing.make_plan(
        queries=256, segment=128, rows=128, chunks=3, slots=2, chunk_size=64, first=0
    )
    own = jnp.arange(256, dtype=jnp.int32)[None] // 64
    chosen = random_selection(19, 1, 256, 2, 64, 3)

    def run(interpret):
        route = lambda *x: dataclasses.astuple(routing.route(*x, plan, interpret=interpret))
        return jax.jit(route)(chosen, own)

    found = run(interpreted_by_cores(2))
    assert_no_races()
    for name, x, y in zip(("rows", "chunk", "count"), found, run(True), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.slow
def test_two_cores_choose():
    q, k, _ = random_qkv(18, 2, 300, heads=2, size=64)
    keys, options = chunk_key_sums(k, 64), {"chunk_size": 64, "count": 2}
    found = selection_tpu.select_by_keys(q, keys, 0, **options, interpret=interpreted_by_cores(2))
    assert_no_races()
    expected = selection_tpu.select_by_keys(q, keys, 0, **options, interpret=True)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(size=32), "head size 32"),
        (dict(dtype=jnp.float16), "dtype float16"),
        (dict(chunk_size=100), "chunk size 100"),
        (dict(slots_of=4), "selection"),
    ],
)
def test_bad_inputs_are_named(change, message):
    size, dtype = change.get("size", 64), change.get("dtype", jnp.float32)
    q, k, v = random_qkv(0, 1, 70, heads=2, size=size, dtype=dtype)
    chosen = jnp.full((1, change.get("slots_of", 70), 2, 2), -1, jnp.int32)
    chunk_size = change.get("chunk_size", 64)
    for module in (block_sparse_tpu, block_sparse_gpu):
        with pytest.raises(ValueError, match=message):
            module.block_sparse_attention(q, k, v, chosen, chunk_size=chunk_size, scale=1.0)


@pytest.mark.parametrize(
    "field", [{"rows": 100}, {"keys": 0}, {"diagonal": 64}, {"segment_bytes": 0}, {"cores": 0}]
)
def test_bad_tiles_are_named(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TileConfig(**field)


@pytest.mark.parametrize("field", [{"rows": 128}, {"keys": 8}, {"segment": 100}, {"warps": 3}])
def test_bad_gpu_tiles_are_named(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        block_sparse_gpu.TileConfig(**field)


# --------------------------------------------------------------------------------------------
# The gate
# --------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    "length, keys, chunk_size, count, offset, size, kind",
    [
        (300, 400, 4, 5, [0, 77], 64, "mean"),
        (150, 230, 8, 3, [0, 77], 64, "bounds"),
        pytest.param(140, 1100, 64, 3, 900, 64, "mean", marks=pytest.mark.slow),
        pytest.param(700, 700, 2, 17, 0, 128, "mean", marks=pytest.mark.slow),
        pytest.param(1100, 1100, 4, 6, 0, 64, "bounds", marks=pytest.mark.slow),
    ],
)
def test_the_gate_chooses_as_the_reference(length, keys, chunk_size, count, offset, size, kind):
    """Small integers: scores are exact, and ties are many. Blocks of chunks are merged."""
    rng = np.random.default_rng(length)
    batch, heads = np.size(offset), 3
    q = jnp.asarray(rng.integers(-2, 3, (batch, length, heads, size)), jnp.float32)
    k = jnp.asarray(rng.integers(-1, 2, (batch, keys, heads, size)), jnp.float32)
    first = offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)
    selector, options = Selector(kind), {"chunk_size": chunk_size}
    actual = selection_tpu.select_by_keys(
        *kernel_factors(q, k, chunk_size, selector), first, **options, count=count, interpret=True
    )
    options |= {"top_k": count + 1, "q_offset": first, "selector": selector}
    expected = select_chunks_reference(q, k, **options)
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, expected)
    assert len(np.unique(expected)) > count + 1


@pytest.mark.thorough
def test_the_gate_takes_fewer_queries_where_its_tables_are_long(monkeypatch):
    q, k, _ = random_qkv(2, 2, 1200, heads=1, size=64)
    rows = chunk_key_sums(k, 4), jnp.asarray([0, 7])
    choose = functools.partial(selection_tpu.select_by_keys, chunk_size=4, count=2, interpret=True)
    whole = choose(q, *rows)
    monkeypatch.setattr(selection_tpu, "SCALAR_WORDS", 10)
    np.testing.assert_array_equal(choose(q, *rows), whole)


@pytest.mark.thorough
def test_the_gate_reads_bfloat16_exactly():
    q, k, _ = random_qkv(1, 1, 200, heads=2, size=64, dtype=jnp.bfloat16)
    means = chunk_key_sums(k[:, :192], 32) / 32
    choose = functools.partial(selection_tpu.select_by_keys, chunk_size=32, count=3, interpret=True)
    chosen = choose(q, means, 0)
    np.testing.assert_array_equal(chosen, choose(q.astype(jnp.float32), means, 0))
    scores = np.einsum("bthk,bnhk->bthn", *(np.asarray(x, np.float64) for x in (q, means)))
    best = np.take_along_axis(scores, np.maximum(chosen, 0), axis=-1)
    assert_close(best[0, 192:, :, 0], scores[0, 192:, :, :6].max(axis=-1), rel=1e-6)


def test_the_gate_refuses_other_head_sizes():
    q, k, _ = random_qkv(1, 1, 20, heads=2, size=32)
    with pytest.raises(ValueError, match="head size 32"):
        selection_tpu.select_by_keys(q, chunk_key_sums(k, 4) / 4, 0, chunk_size=4, count=1)

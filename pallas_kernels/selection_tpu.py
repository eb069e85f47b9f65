"""The gate of sparse attention on a TPU: the past chunks with the highest q . mean key.

Scores exist for one block of queries and one block of chunks at a time; the best chunks so far stay
in VMEM, so that [T, N] never reaches HBM. Scores are transposed, chunks down the sublanes and
queries along the lanes: finding a maximum is then a chain of elementwise operations. Scores are
float32, ties go to the lower chunk, as in every implementation of the choice.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.routing import in_main_memory

_LANES, _SUBLANES = 128, 8
_QUERIES = 512  # queries a grid step
_CHUNKS = 128  # chunks scored at once
_F32 = jnp.float32
_NONE = jnp.iinfo(jnp.int32).max


def unsupported_reason(head_size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why this kernel cannot take such inputs; None if it can."""
    if head_size not in (64, 128):
        return f"head size {head_size} is not 64 or 128"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(_F32)):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16 or float32"
    return None


def _some_past(first, step, block, queries: int, chunks: int, chunk_size: int):
    """Whether any chunk of a block of chunks ends before any query of a block of queries."""
    return (block * chunks + 1) * chunk_size <= first + (step + 1) * queries - 1


def _kernel(
    query_ref, block_ref,  # SMEM [steps]: block of queries, block of chunks
    first_ref,  # SMEM [B]: position of the first query
    q_ref,  # [1, queries, 128]
    means_ref,  # [1, chunks, 128] float32
    chosen_ref,  # [1, heads, J, queries] int32
    scores_ref,  # VMEM [heads, J', queries] float32: best scores so far, descending
    chunks_ref,  # VMEM [heads, J', queries] int32: their chunks
    *,
    head: int,
    packs: int,
    chunk_size: int,
    slots: int,
):  # fmt: skip
    step = pl.program_id(1)
    block = block_ref[step]
    queries, heads = q_ref.shape[1], _LANES // head
    count = means_ref.shape[1]
    first = first_ref[pl.program_id(0) // packs] + query_ref[step] * queries
    last = step == pl.num_programs(1) - 1
    last = last | (query_ref[jnp.minimum(step + 1, pl.num_programs(1) - 1)] != query_ref[step])

    @pl.when(block == 0)
    def _():
        scores_ref[...] = jnp.full(scores_ref.shape, -jnp.inf, _F32)
        chunks_ref[...] = jnp.full(chunks_ref.shape, -1, jnp.int32)

    @pl.when(_some_past(first, 0, block, queries, count, chunk_size))
    def _():
        number = block * count + lax.broadcasted_iota(jnp.int32, (count, queries), 0)
        own = (first + lax.broadcasted_iota(jnp.int32, (1, queries), 1)) // chunk_size
        past = number < own
        for h in range(heads):
            q = q_ref[0].astype(_F32)
            if heads > 1:
                q = jnp.where(lax.broadcasted_iota(jnp.int32, q.shape, 1) // head == h, q, 0.0)
            scores = lax.dot_general(
                means_ref[0],
                q,
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=_F32,
            )
            scores = jnp.where(past, scores, -jnp.inf)
            for start in range(0, queries, _LANES):  # one register wide: more would spill
                lanes = slice(start, start + _LANES)
                best = scores_ref.at[h, :, lanes], chunks_ref.at[h, :, lanes]
                _merge(*best, scores[:, lanes], number[:, lanes], slots)

    @pl.when(last)
    def _():
        chosen_ref[0] = chunks_ref[:, :slots]


def _merge(scores_ref, chunks_ref, scores, numbers, slots: int) -> None:
    """Takes a block of scores [N, queries] into the best so far, by `slots` passes for the maximum.

    The best so far come from lower chunks, so they win ties; within the block the lower row wins.
    """
    scores = jnp.concatenate([scores_ref[...], scores], axis=0)
    numbers = jnp.concatenate([chunks_ref[...], numbers], axis=0)
    for j in range(slots):
        best = jnp.max(scores, axis=0, keepdims=True)
        found = jnp.where(scores == best, numbers, _NONE)
        chunk = jnp.min(found, axis=0, keepdims=True)
        exists = best > -jnp.inf
        scores_ref[j : j + 1] = best
        chunks_ref[j : j + 1] = jnp.where(exists, chunk, -1)
        scores = jnp.where(found == chunk, -jnp.inf, scores)


def _walk(first, steps: int, blocks: int, queries: int, chunks: int, chunk_size: int):
    """Block of queries and block of chunks of every grid step, int32 each.

    Blocks of chunks past to no query are left out where the positions are known, and skipped by the
    kernel otherwise; the first block of chunks always comes, to begin and end the queries'.
    """
    known = isinstance(first, int)
    walk = [
        (t, c)
        for t in range(steps)
        for c in range(blocks)
        if not c or not known or _some_past(first, t, c, queries, chunks, chunk_size)
    ]
    return tuple(jnp.asarray(x, jnp.int32) for x in zip(*walk, strict=True))


def select_from_means(
    q: jax.Array,  # [B, T, H, K]
    means: jax.Array,  # [B, N, H, K]
    first: int | jax.Array,  # [B]
    *,
    chunk_size: int,
    count: int,
    interpret=False,
) -> jax.Array:
    """The `count` past chunks with the highest q . mean, as `rwkvx_jax.ops.selection` defines it.

    Args:
      q: bfloat16 or float32, head size 64 or 128.
      means: float32 mean keys of the complete chunks, N at least 1.
      first: position of the first query, an int or int32 [B].
      chunk_size: tokens in a chunk.
      count: how many chunks to choose, at least 1.
      interpret: True or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      int32 [B, T, H, count], by descending score, ties to the lower chunk, padded with -1.

    Raises:
      ValueError: unsupported head size or dtype.
    """
    batch, length, heads, head = q.shape
    reason = unsupported_reason(head, q.dtype)
    if reason:
        raise ValueError(f"select_from_means on TPU: {reason}")
    each = _LANES // head
    packs, chunks = -(-heads // each), means.shape[1]
    queries = min(_QUERIES, -(-length // _LANES) * _LANES)
    block = min(_CHUNKS, -(-chunks // _SUBLANES) * _SUBLANES)
    blocks, steps = -(-chunks // block), -(-length // queries)

    def pack(x, time):
        more = ((0, 0), (0, time - x.shape[1]), (0, packs * each - heads), (0, 0))
        return jnp.pad(x, more).reshape(batch, time, packs * _LANES)

    query, chunk = _walk(first, steps, blocks, queries, block, chunk_size)
    first = jnp.broadcast_to(jnp.asarray(first, jnp.int32), (batch,))
    arrays = pack(q, steps * queries), pack(means.astype(_F32), blocks * block)
    arrays = in_main_memory(interpret, *arrays)
    room = -(-count // _SUBLANES) * _SUBLANES
    chosen = pl.pallas_call(
        functools.partial(_kernel, head=head, packs=packs, chunk_size=chunk_size, slots=count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch * packs, query.size),
            in_specs=[
                pl.BlockSpec(
                    (1, queries, _LANES), lambda g, t, q, c, first: (g // packs, q[t], g % packs)
                ),
                pl.BlockSpec(
                    (1, block, _LANES), lambda g, t, q, c, first: (g // packs, c[t], g % packs)
                ),
            ],
            out_specs=pl.BlockSpec(
                (1, each, count, queries), lambda g, t, q, c, first: (g, 0, 0, q[t])
            ),
            scratch_shapes=[
                pltpu.VMEM((each, room, queries), _F32),
                pltpu.VMEM((each, room, queries), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch * packs, each, count, steps * queries), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(q.shape) * chunks,
            transcendentals=0,
            bytes_accessed=q.size * q.dtype.itemsize + 4 * (means.size + heads * length * count),
        ),
        interpret=interpret,
        name="select_chunks",
    )(query, chunk, first, *arrays)
    chosen = chosen.reshape(batch, packs * each, count, steps * queries)
    return chosen[:, :heads, :, :length].transpose(0, 3, 1, 2)

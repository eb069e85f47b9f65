"""The gate of sparse attention on a TPU: the past chunks with the highest q . key of the chunk.

Scores exist for one block of queries and one block of chunks at a time; the best chunks so far stay
in VMEM, so that [T, N] never reaches HBM. A chunk's scores of 1024 queries and heads fill a vector
register, and one chunk after the other is inserted into the sorted list of the best: elementwise
operations without a reduction. Scores are float32, ties go to the lower chunk, as in every
implementation of the choice.

Sizes: a block of queries is as many as make 8 x 128 with the heads of a pack; a block of chunks is
up to 128 of them, scored at once. The grid walks pairs of the two.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common
from pallas_kernels.common import F32, LANES, NT, SCALAR_WORDS, SUBLANES, dot, grid_options, iota
from pallas_kernels.routing import in_main_memory

_CHUNKS = 128  # chunks scored at once


def unsupported_reason(head_size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why this kernel cannot take such inputs; None if it can."""
    return common.unsupported_reason(head_size, head_size, dtype)


def _some_past(first, step, block, queries: int, chunks: int, chunk_size: int):
    """Whether any chunk of a block of chunks ends before any query of a block of queries."""
    return (block * chunks + 1) * chunk_size <= first + (step + 1) * queries - 1


def _kernel(
    query_ref, block_ref,  # SMEM [steps]: block of queries, block of chunks
    first_ref,  # SMEM [B]: position of the first query
    q_ref,  # [1, queries, 128]
    keys_ref,  # [1, chunks, 128] float32
    *refs,  # where documents are packed, [1, 1, 8, 128] int32: each query's first chunk, as scores
    # lie; the choices [1, heads, J, queries] int32; and in VMEM
    # scores [8 * chunks, 128] float32: row g * chunks + c, g numbers (head, 128 queries);
    # best [J, 8, 128] float32: best scores so far, descending; and their chunks [J, 8, 128] int32
    head: int,
    packs: int,
    chunk_size: int,
    slots: int,
):  # fmt: skip
    *lowest_ref, chosen_ref, scores_ref, best_ref, chunks_ref = refs
    step = pl.program_id(1)
    block = block_ref[step]
    queries, heads = q_ref.shape[1], LANES // head
    count = keys_ref.shape[1]
    first = first_ref[pl.program_id(0) // packs] + query_ref[step] * queries
    last = step == pl.num_programs(1) - 1
    last = last | (query_ref[jnp.minimum(step + 1, pl.num_programs(1) - 1)] != query_ref[step])

    @pl.when(block == 0)
    def _():
        best_ref[...] = jnp.full(best_ref.shape, -jnp.inf, F32)
        chunks_ref[...] = jnp.full(chunks_ref.shape, -1, jnp.int32)

    @pl.when(_some_past(first, 0, block, queries, count, chunk_size))
    def _():
        keys = _terms(keys_ref[0], q_ref.dtype)
        for i in range(queries // LANES):  # one register wide: more would spill
            for h in range(heads):
                q = q_ref[0, i * LANES : (i + 1) * LANES].astype(F32)
                if heads > 1:
                    q = jnp.where(iota(q.shape, 1) // head == h, q, 0.0)
                start = (h * queries // LANES + i) * count
                scores_ref[start : start + count, :] = _scores(keys, q.astype(q_ref.dtype))
        row, lane = iota((SUBLANES, LANES), 0), iota((SUBLANES, LANES), 1)
        own = (first + row % (queries // LANES) * LANES + lane) // chunk_size

        def some(i, best):
            for c in range(SUBLANES):
                chunk = i * SUBLANES + c
                scores = scores_ref[pl.ds(chunk, SUBLANES, stride=count), :]
                number = block * count + chunk
                past = number < own
                if lowest_ref:
                    past &= number >= lowest_ref[0][0, 0]
                best = _insert(best, jnp.where(past, scores, -jnp.inf), number)
            return best

        best = [best_ref[j] for j in range(slots)], [chunks_ref[j] for j in range(slots)]
        best = lax.fori_loop(0, count // SUBLANES, some, best)
        for j in range(slots):
            best_ref[j], chunks_ref[j] = best[0][j], best[1][j]

    @pl.when(last)
    def _():
        for j in range(slots):
            for h in range(heads):
                for i in range(queries // LANES):
                    row = h * queries // LANES + i
                    lanes = slice(i * LANES, (i + 1) * LANES)
                    chosen_ref[0, h, j : j + 1, lanes] = chunks_ref[j, row : row + 1]


def _terms(keys: jax.Array, dtype) -> list[jax.Array]:
    """Terms in the dtype whose sum is the float32 keys; three bfloat16 ones hold a key exactly."""
    terms = []
    for _ in range(1 if dtype == F32 else 3):
        terms.append(keys.astype(dtype))
        keys = keys - terms[-1].astype(F32)
    return terms


def _scores(keys: list[jax.Array], q: jax.Array) -> jax.Array:
    """keys, the sum of terms [N, 128], times q [queries, 128], as [N, queries], in full float32.

    With bfloat16 queries that takes three passes of the matrix unit, with float32 ones six.
    """
    return functools.reduce(jnp.add, [dot(term, q, NT) for term in reversed(keys)])


def _insert(best, scores: jax.Array, number) -> tuple[list, list]:
    """Takes one more chunk, which comes after all others, into the best scores and their chunks.

    Best scores descend, so the places that a score moves down are those after its own: each place
    keeps its entry, takes the one before it, or the new one. Equal scores stay before it.
    """
    values, chunks = best
    above = [scores > x for x in values]
    new_values, new_chunks = [], []
    for j, (value, chunk) in enumerate(zip(values, chunks, strict=True)):
        next_value, next_chunk = scores, jnp.full(chunk.shape, number, jnp.int32)
        if j:
            next_value = jnp.where(above[j - 1], values[j - 1], next_value)
            next_chunk = jnp.where(above[j - 1], chunks[j - 1], next_chunk)
        new_values.append(jnp.where(above[j], next_value, value))
        new_chunks.append(jnp.where(above[j], next_chunk, chunk))
    return new_values, new_chunks


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


def select_by_keys(
    q: jax.Array,  # [B, T, H, K]
    keys: jax.Array,  # [B, N, H, K]
    first: int | jax.Array,  # [B]
    *,
    chunk_size: int,
    count: int,
    lowest: jax.Array | None = None,  # [B, T]
    interpret=False,
) -> jax.Array:
    """The `count` past chunks with the highest q . key, past as `rwkvx_jax.ops.selection` has it.

    Args:
      q: bfloat16 or float32, head size 64 or 128.
      keys: float32, one for each complete chunk, N at least 1: its mean key, or whatever else a
        selector scores with.
      first: position of the first query, an int or int32 [B].
      chunk_size: tokens in a chunk.
      count: how many chunks to choose, at least 1.
      lowest: int32, the first chunk that each query may choose: that in which its document begins,
        where documents are packed.
      interpret: True or `pltpu.InterpretParams` to run on a CPU.

    Returns:
      int32 [B, T, H, count], by descending score, ties to the lower chunk, padded with -1.

    Raises:
      ValueError: unsupported head size or dtype.
    """
    batch, length, heads, head = q.shape
    reason = unsupported_reason(head, q.dtype)
    if reason:
        raise ValueError(f"select_by_keys on TPU: {reason}")
    each = LANES // head
    packs, chunks = -(-heads // each), keys.shape[1]
    queries = SUBLANES * LANES // each
    block = min(_CHUNKS, -(-chunks // SUBLANES) * SUBLANES)
    blocks, steps = -(-chunks // block), -(-length // queries)

    def pack(x, time):
        more = ((0, 0), (0, time - x.shape[1]), (0, packs * each - heads), (0, 0))
        return jnp.pad(x, more).reshape(batch, time, packs * LANES)

    query, chunk = _walk(first, steps, blocks, queries, block, chunk_size)
    if (
        2 * query.size + batch > SCALAR_WORDS and steps > 1
    ):  # the tables of the walk must fit its memory
        half = steps // 2 * queries
        options = dict(chunk_size=chunk_size, count=count, interpret=interpret)
        parts = (slice(None, half), first), (slice(half, None), first + half)
        some = lambda x, part: None if x is None else x[:, part]
        chosen = [
            select_by_keys(q[:, part], keys, first, lowest=some(lowest, part), **options)
            for part, first in parts
        ]
        return jnp.concatenate(chosen, axis=1)
    first = jnp.broadcast_to(jnp.asarray(first, jnp.int32), (batch,))
    arrays = pack(q, steps * queries), pack(keys.astype(F32), blocks * block)
    arrays = in_main_memory(interpret, *arrays)
    lowest_spec = []
    if lowest is not None:  # as the scores of a block of queries lie: the same for each head
        lowest = jnp.pad(lowest, ((0, 0), (0, steps * queries - length)))
        lowest = lowest.reshape(batch, steps, queries // LANES, LANES)
        arrays += (jnp.tile(lowest, (1, 1, each, 1)),)
        index = lambda g, t, q, c, first: (g // packs, q[t], 0, 0)
        lowest_spec.append(pl.BlockSpec((1, 1, SUBLANES, LANES), index))
    chosen = pl.pallas_call(
        functools.partial(_kernel, head=head, packs=packs, chunk_size=chunk_size, slots=count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch * packs, query.size),
            in_specs=[
                pl.BlockSpec(
                    (1, queries, LANES), lambda g, t, q, c, first: (g // packs, q[t], g % packs)
                ),
                pl.BlockSpec(
                    (1, block, LANES), lambda g, t, q, c, first: (g // packs, c[t], g % packs)
                ),
                *lowest_spec,
            ],
            out_specs=pl.BlockSpec(
                (1, each, count, queries), lambda g, t, q, c, first: (g, 0, 0, q[t])
            ),
            scratch_shapes=[
                pltpu.VMEM((SUBLANES * block, LANES), F32),
                pltpu.VMEM((count, SUBLANES, LANES), F32),
                pltpu.VMEM((count, SUBLANES, LANES), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch * packs, each, count, steps * queries), jnp.int32),
        **grid_options((batch * packs, query.size), 1),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(q.shape) * chunks,
            transcendentals=0,
            bytes_accessed=q.size * q.dtype.itemsize + 4 * (keys.size + heads * length * count),
        ),
        interpret=interpret,
        name="select_chunks",
    )(query, chunk, first, *arrays)
    chosen = chosen.reshape(batch, packs * each, count, steps * queries)
    return chosen[:, :heads, :, :length].transpose(0, 3, 1, 2)

"""Forward pass of top-k chunk sparse attention for Hopper GPUs, through Pallas' Mosaic GPU backend.

The successor of Triton in Pallas. Same contract and the same two steps as block_sparse_gpu.py,
which does the routing and the backward pass:

* past forward: a program a tile of up to 64 pairs of one chunk. TMA gathers their queries row by
  row, brings the chunk's keys and values block by block while the block before is multiplied
  (`wgmma`), and scatters a partial result a pair, again row by row;
* own forward: a program a block of queries; the causal pass over the own chunk, then the merge with
  the partial results of the block's pairs, which lie slot by slot.

A program is one warpgroup, and so its products have 64 rows, whatever a tile holds: of smaller
tiles the rest is computed from whatever the memory holds, and never stored. Weights pass through
shared memory on their way to the second product, since the interpreter multiplies nothing else.
Layouts are given, not inferred ("Lane"): only so may a single warp copy rows at numbers it reads.

Everything that names Mosaic GPU is in this file, and imported where a kernel is built. It exists
in usable form from jax 0.12 on; its names still change.

Sizes: see `common` and block_sparse_gpu; query head h reads key head h // (H / G).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import alignment, block_sparse_gpu, common
from pallas_kernels.block_sparse_gpu import NO_SCORE, Plan, TileConfig
from pallas_kernels.common import F32

_ROWS = 64  # of a product
_WARPS = 4  # of a warpgroup
_BUFFERS = 2  # blocks of keys in shared memory: one is multiplied, the next one arrives
_HOPPER = ("h100", "h200")
_SINCE = (0, 12)


def _plgpu():
    from jax.experimental.pallas import mosaic_gpu as module

    return module


def unsupported_reason(
    q: jax.Array,  # [B, Tq, H, K]
    k: jax.Array,  # [B, Tk, G, K]
    v: jax.Array,  # [B, Tk, G, V]
    slots: int,
    chunk_size: int,
    q_offset=0,
) -> str | None:
    """Why these kernels cannot take such inputs; None if they can. As in block_sparse_tpu.py."""
    del slots, q_offset  # any length, position and number of chunks will do
    if jax.__version_info__[:2] < _SINCE:
        return f"jax {jax.__version__} is older than 0.12, whose Mosaic GPU these kernels need"
    if q.shape[2] % k.shape[2]:
        return f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads"
    if q.dtype != jnp.bfloat16:
        return f"dtype {q.dtype} is not bfloat16, the only one that these kernels multiply"
    return alignment.unsupported_reason(q.shape[3], v.shape[3], chunk_size, q.dtype)


def unsupported_chip() -> str | None:
    """Why the GPU at hand cannot run these kernels; None if it can."""
    chip = common.current_chip()
    if chip in _HOPPER:
        return None
    return f"its `wgmma` instructions need a Hopper GPU ({' or '.join(_HOPPER)}), found {chip}"


# --------------------------------------------------------------------------------------------
# Inside a kernel
# --------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Shared memory of products with blocks of keys, and barriers passed once a copy is there."""

    q: jax.Array  # [64, K]
    weights: jax.Array  # [64, keys]
    k: jax.Array  # [2, keys, K]
    v: jax.Array  # [2, keys, K]
    k_ready: jax.Array  # [2]
    v_ready: jax.Array  # [2]


def _matrix(*shape: int, swizzle: int = 128):
    """Shared memory in the layout of a product's operand: rows of `swizzle` bytes."""
    plgpu = _plgpu()
    tiling = plgpu.TilingTransform((8, swizzle // 2))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _blocks(plan: Plan, head: int) -> _Blocks:
    barriers = _plgpu().Barrier(num_barriers=_BUFFERS)
    keys = plan.tile.keys
    swizzle = min(128, 2 * keys)  # both operands of a product must have the same
    return _Blocks(
        q=_matrix(_ROWS, head),
        weights=_matrix(_ROWS, keys, swizzle=swizzle),
        k=_matrix(_BUFFERS, keys, head),
        v=_matrix(_BUFFERS, keys, head, swizzle=swizzle),
        k_ready=barriers,
        v_ready=barriers,
    )


def _buffer(i):
    return lax.rem(i, jnp.int32(_BUFFERS))


def _product(x, y, columns: int) -> jax.Array:
    """x [64, K] times y [K, columns], both in shared memory, float32."""
    plgpu = _plgpu()

    def multiply(total):
        plgpu.wgmma(total, x, y)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((_ROWS, columns), F32))


def _across(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [64] along the columns of `like`."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _start(head: int):
    """Maximum, sum and values of no scores, see `_add_block`."""
    layout = _plgpu().Layout
    rows, cast = layout.WGMMA.reduce(1), _plgpu().layout_cast
    return (
        cast(jnp.full((_ROWS,), NO_SCORE, F32), rows),
        cast(jnp.zeros((_ROWS,), F32), rows),
        cast(jnp.zeros((_ROWS, head), F32), layout.WGMMA),
    )


def _add_block(carry, i, count, blocks: _Blocks, fetch, plan: Plan, seen=None):
    """Takes the keys of block i into (maximum, sum, values); exponents are of 2.

    Args:
      count: of all blocks; the next one is asked for beforehand.
      fetch: starts the copy of a block.
      seen: of block i, which queries see which keys, bool [64, keys]; None: all.
    """
    plgpu = _plgpu()
    largest, total, acc = carry
    pl.when(i + 1 < count)(lambda: fetch(i + 1))
    buffer = _buffer(i)
    plgpu.barrier_wait(blocks.k_ready.at[buffer])
    scores = _product(blocks.q, blocks.k.at[buffer].transpose((1, 0)), plan.tile.keys)
    scores = scores * plan.log2_scale
    if seen is not None:
        scores = jnp.where(seen(i), scores, NO_SCORE)
    new = jnp.maximum(largest, jnp.max(scores, axis=1))
    weights, shrink = jnp.exp2(scores - _across(new, scores)), jnp.exp2(largest - new)
    blocks.weights[...] = weights.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_wait(blocks.v_ready.at[buffer])
    acc = acc * _across(shrink, acc) + _product(blocks.weights, blocks.v.at[buffer], acc.shape[1])
    return new, total * shrink + jnp.sum(weights, axis=1), acc


def _fetch(k_ref, v_ref, at, first, blocks: _Blocks, plan: Plan):
    """A function that starts the copy of block i of the keys from `first` on.

    Args:
      at: batch row and query head.
    """
    plgpu = _plgpu()
    batch, head = at

    def fetch(i):
        rows, buffer = pl.ds(first + i * plan.tile.keys, plan.tile.keys), _buffer(i)
        copy = lambda x, to, ready: plgpu.copy_gmem_to_smem(
            x.at[batch, rows, head], to.at[buffer], ready.at[buffer]
        )
        copy(k_ref, blocks.k, blocks.k_ready)
        copy(v_ref, blocks.v, blocks.v_ready)

    return fetch


def _each_row(rows: int, do) -> None:
    """`do(row)` for the rows of a tile, a quarter by each warp, at the same time."""

    @_plgpu().warp_map
    def _(warp):
        @pl.loop(0, rows // _WARPS)
        def _(i):
            do(warp * (rows // _WARPS) + i)

        _plgpu().wait_smem_to_gmem(0)  # a warp waits for the copies that it started itself


def _past_kernel(
    chunk_ref, count_ref,  # [B, G, tiles]
    target_ref,  # [B, G, tiles, rows], see `_targets`
    q_ref, k_ref, v_ref,  # [B, T, H, K], [B, Tk, G, K]
    out_ref,  # [B, H, J * T, K] normalized result of each pair
    lse_ref,  # [B, H, tiles * rows] log-sum-exp of each row of a tile, base 2
    blocks: _Blocks,
    rows_s,  # [64, K] rows one after the other
    target_s, lse_s,  # [rows]
    q_ready, target_ready,
    *,
    plan: Plan,
    group: int,
):  # fmt: skip
    plgpu = _plgpu()
    batch, head, tile = (lax.axis_index(x) for x in ("batch", "head", "step"))
    key_head, rows = lax.div(head, jnp.int32(group)), plan.tile.rows
    count = count_ref[batch, key_head, tile]
    fetch = _fetch(
        k_ref, v_ref, (batch, key_head), chunk_ref[batch, key_head, tile] * plan.chunk, blocks, plan
    )

    @pl.when(count > 0)
    def _():
        plgpu.copy_gmem_to_smem(target_ref.at[batch, key_head, tile], target_s, target_ready)
        fetch(jnp.int32(0))
        plgpu.barrier_wait(target_ready)

        def gather(i):
            query = lax.rem(target_s[i], jnp.int32(plan.queries))
            source = q_ref.at[batch, pl.ds(query, 1), head]
            plgpu.copy_gmem_to_smem(source, rows_s.at[pl.ds(i, 1)], q_ready)

        _each_row(rows, gather)
        plgpu.barrier_wait(q_ready)
        blocks.q[...] = plgpu.load(rows_s, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()
        steps = plan.chunk // plan.tile.keys
        step = lambda i, carry: _add_block(carry, i, steps, blocks, fetch, plan)
        largest, total, acc = lax.fori_loop(0, steps, step, _start(q_ref.shape[3]))
        out = (acc / _across(total, acc)).astype(jnp.bfloat16)
        plgpu.store(rows_s, out, optimized=False)
        lse_s[...] = largest + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            lse_s.at[pl.ds(0, rows)], lse_ref.at[batch, head, pl.ds(tile * rows, rows)]
        )

        def scatter(i):
            target = out_ref.at[batch, head, pl.ds(target_s[i], 1)]
            pl.when(i < count)(lambda: plgpu.copy_smem_to_gmem(rows_s.at[pl.ds(i, 1)], target))

        _each_row(rows, scatter)
        plgpu.wait_smem_to_gmem(0)


def _own_kernel(
    first_ref,  # [B, 1] block of keys that the first query stands at
    q_ref, k_ref, v_ref,  # [B, T, H, K], [B, Tk, G, K]
    *refs,  # if there are pairs: out [B, H, J * T, K], lse [B, H, J * T]; then out, lse, shared
    plan: Plan,
    group: int,
):  # fmt: skip
    plgpu = _plgpu()
    *pair_refs, out_ref, lse_ref, blocks, lse_s, q_ready, pairs = refs
    batch, head, block = (lax.axis_index(x) for x in ("batch", "head", "step"))
    rows, keys = plan.tile.rows, plan.tile.keys
    index = block * rows
    position = first_ref[batch, 0] * block_sparse_gpu.BLOCK + index
    first = lax.div(position, jnp.int32(plan.chunk)) * plan.chunk  # of the own chunk
    count = lax.div(position + rows - first + keys - 1, jnp.int32(keys))
    fetch = _fetch(k_ref, v_ref, (batch, lax.div(head, jnp.int32(group))), first, blocks, plan)
    at, top = pl.ds(index, rows), pl.ds(0, rows)
    plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], blocks.q.at[top], q_ready)
    fetch(jnp.int32(0))
    plgpu.barrier_wait(q_ready)

    def seen(i):
        number = lambda axis: plgpu.broadcasted_iota(
            jnp.int32, (_ROWS, keys), axis, layout=plgpu.Layout.WGMMA
        )
        return number(1) + (first + i * keys) <= number(0) + position

    add = lambda i, carry, seen=None: _add_block(carry, i, count, blocks, fetch, plan, seen)
    whole = lax.div(position - first + 1, jnp.int32(keys))  # blocks that all queries see
    carry = lax.fori_loop(0, whole, add, _start(q_ref.shape[3]))
    carry = lax.fori_loop(whole, count, functools.partial(add, seen=seen), carry)
    if pair_refs:
        carry = _merge(carry, pair_refs, (batch, head), index, pairs, plan)
    largest, total, acc = carry
    blocks.q[...] = (acc / _across(total, acc)).astype(jnp.bfloat16)
    lse_s[...] = largest + jnp.log2(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(blocks.q.at[top], out_ref.at[batch, at, head])
    plgpu.copy_smem_to_gmem(lse_s.at[top], lse_ref.at[batch, head, at])
    plgpu.wait_smem_to_gmem(0)


class _Pairs(NamedTuple):
    """Shared memory of the results of pairs, and barriers passed once a copy is there."""

    out: jax.Array  # [2, 64, K]
    lse: jax.Array  # [2, 64]
    out_ready: jax.Array  # [2]
    lse_ready: jax.Array  # [2]


def _merge(carry, pair_refs, at, index, pairs: _Pairs, plan: Plan):
    """Takes the results of a block's pairs into (maximum, sum, values), slot after slot."""
    plgpu = _plgpu()
    out_ref, lse_ref = pair_refs
    rows, layout = plan.tile.rows, plgpu.Layout.WGMMA
    top = pl.ds(0, rows)

    def fetch(j):
        source, buffer = (*at, pl.ds(j * plan.queries + index, rows)), _buffer(j)
        copy = plgpu.copy_gmem_to_smem
        copy(out_ref.at[source], pairs.out.at[buffer, top], pairs.out_ready.at[buffer])
        copy(lse_ref.at[source], pairs.lse.at[buffer, top], pairs.lse_ready.at[buffer])

    def step(j, carry):
        largest, total, acc = carry
        pl.when(j + 1 < plan.routing.slots)(lambda: fetch(j + 1))
        buffer = _buffer(j)
        plgpu.barrier_wait(pairs.lse_ready.at[buffer])
        lse = plgpu.load(pairs.lse.at[buffer], layout=layout.reduce(1))
        plgpu.barrier_wait(pairs.out_ready.at[buffer])
        out = plgpu.load(pairs.out.at[buffer], layout=layout).astype(F32)
        plgpu.commit_smem()  # read, before a copy may write there again
        out = jnp.where(_across(lse, out) > NO_SCORE, out, 0.0)  # memory that nobody wrote
        new = jnp.maximum(largest, lse)
        weight, shrink = jnp.exp2(lse - new), jnp.exp2(largest - new)
        return new, total * shrink + weight, acc * _across(shrink, acc) + _across(weight, out) * out

    fetch(jnp.int32(0))
    return lax.fori_loop(0, plan.routing.slots, step, carry)


# --------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------


def _call(plan: Plan, interpret, q, k, kernel, steps, inputs, outputs, scratch, scores, name):
    """Runs `steps` programs a batch row and query head of q and k. Two products of `scores` scores
    a head with the head size are its useful work."""
    plgpu = _plgpu()
    batch, _, heads, head = q.shape
    return plgpu.kernel(
        functools.partial(kernel, plan=plan, group=heads // k.shape[2]),
        out_type=outputs,
        grid=(batch, heads, steps),
        grid_names=("batch", "head", "step"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 2 * batch * heads * scores * head,
            transcendentals=batch * heads * scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs)),
        ),
        interpret=interpret,
        kernel_name=name,
    )(*inputs)


def _targets(plan: Plan, routed) -> jax.Array:
    """Where the result of each tile's row goes, slot * T + query, int32 [B, G, tiles, rows]; rows
    without a pair have J * T, which is query 0's number and nobody's place."""
    pairs, _, segment, _, start, count = routed
    queries, slots = plan.routing.segment, plan.routing.slots

    def of_head(pairs, start, count):  # [segments * J * S], [tiles], [tiles]
        row, first = jnp.arange(plan.tile.rows, dtype=jnp.int32)[None], segment[:, None]
        number = pairs.at[first * slots * queries + start[:, None] + row].get(mode="clip")
        target = number // queries * plan.queries + first * queries + number % queries
        return jnp.where(row < count[:, None], target, plan.pairs)

    return jax.vmap(jax.vmap(of_head))(pairs, start, count)


def _lse_of_places(lse: jax.Array, targets: jax.Array, plan: Plan) -> jax.Array:
    """Log-sum-exps [B, H, tiles * rows] put where the results lie, [B, H, J * T]; NO_SCORE where
    there is no pair."""
    batch, key_heads = targets.shape[:2]
    lse = lse.reshape(batch, key_heads, -1, lse.shape[2])
    none = jnp.full((lse.shape[2], plan.pairs), NO_SCORE, F32)
    scatter = lambda target, lse: none.at[:, target].set(lse, mode="drop")
    lse = jax.vmap(jax.vmap(scatter))(targets.reshape(batch, key_heads, -1), lse)
    return lse.reshape(batch, -1, plan.pairs)


def _forward(plan: Plan, interpret, q, k, v, selection, first):
    """See `forward` in `block_sparse_gpu.attend`."""
    plgpu = _plgpu()
    batch, time, heads, head = q.shape
    own, past = block_sparse_gpu.useful_scores(plan)
    call = functools.partial(_call, plan, interpret, q, k)
    blocks, lse_s, barrier = _blocks(plan, head), plgpu.SMEM((_ROWS,), F32), plgpu.Barrier()
    routed, pairs = None, ()
    if plan.routing is not None:
        routed = block_sparse_gpu.route(plan, selection, first)
        targets, tiles = _targets(plan, routed), plan.routing.all_tiles
        out, lse = call(
            kernel=_past_kernel,
            steps=tiles,
            inputs=(routed[3], routed[5], targets, q, k, v),
            outputs=(
                jax.ShapeDtypeStruct((batch, heads, plan.pairs, head), q.dtype),
                jax.ShapeDtypeStruct((batch, heads, tiles * plan.tile.rows), F32),
            ),
            scratch=(
                blocks,
                plgpu.SMEM((_ROWS, head), q.dtype),
                plgpu.SMEM((plan.tile.rows,), jnp.int32),
                lse_s,
                plgpu.Barrier(num_arrivals=plan.tile.rows),
                barrier,
            ),
            scores=past,
            name="block_sparse_past_forward",
        )
        pairs = out, _lse_of_places(lse, targets, plan)
    buffers = plgpu.Barrier(num_barriers=_BUFFERS)
    results = _Pairs(
        _matrix(_BUFFERS, _ROWS, head), plgpu.SMEM((_BUFFERS, _ROWS), F32), buffers, buffers
    )
    out, lse = call(
        kernel=_own_kernel,
        steps=time // plan.tile.rows,
        inputs=(first, q, k, v, *pairs),
        outputs=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, time), F32),
        ),
        scratch=(blocks, lse_s, barrier, results),
        scores=own,
        name="block_sparse_own_forward",
    )
    return out, lse, routed


# --------------------------------------------------------------------------------------------
# The op
# --------------------------------------------------------------------------------------------


def block_sparse_attention(
    q: jax.Array,  # [B, Tq, H, K]
    k: jax.Array,  # [B, Tk, G, K]
    v: jax.Array,  # [B, Tk, G, K]
    selection: jax.Array,  # [B, Tq, G, J]
    *,
    chunk_size: int,
    scale: float,
    q_offset=0,
    tile: TileConfig | None = None,
    interpret=False,
) -> jax.Array:
    """Causal attention to the own chunk and the selected past chunks on a Hopper GPU.

    Arguments, results and errors are those of
    `pallas_kernels.block_sparse_tpu.block_sparse_attention`, but for these: the arrays are
    bfloat16; `tile.rows` is at least 32 and `tile.warps` holds for the backward pass only, which is
    Triton's; `interpret` is a `mosaic_gpu.InterpretGPUParams`.
    """
    alignment.check(q, k, v, selection)
    reason = unsupported_reason(q, k, v, selection.shape[3], chunk_size)
    if reason:
        raise ValueError(f"block_sparse on GPU by Mosaic: {reason}")
    tile = TileConfig() if tile is None else tile
    if tile.rows < 32:
        raise ValueError(f"rows must be 32 or 64 for Mosaic GPU, got {tile.rows}")
    return block_sparse_gpu.attend(
        _forward,
        q,
        k,
        v,
        selection,
        chunk_size=chunk_size,
        scale=scale,
        q_offset=q_offset,
        tile=tile,
        interpret=interpret,
    )

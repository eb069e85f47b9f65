"""Top-k chunk sparse attention for NVIDIA GPUs, through Pallas' Triton backend.

Same contract as block_sparse_tpu.py, laid out for a GPU, where rows are gathered by address and
programs run in any order. Pairs of a query and a chunk are sorted by chunk (`routing`):

* past forward: a program a tile of pairs of one chunk; writes a partial result a pair;
* own forward: a program a block of queries; the causal pass over the own chunk, then the merge with
  the partial results of the block's pairs, which lie slot by slot, so that it reads whole blocks;
* past dQ and own dQ: the same two shapes; dQ of a pair is written, then added to its query's;
* dK and dV: a program a block of keys, which walks the later queries of its own chunk and the pairs
  that chose it: no atomic additions.

Everything that names Triton is in this file and wkv7_gpu.py. The backend is deprecated from jax
0.11 on, but still what runs on Ampere and Hopper alike; it is imported where a kernel is built.
block_sparse_mosaic_gpu.py has the same forward pass for its successor, and takes routing, backward
pass and the op's frame (`attend`) from here.

Sizes: see `common`; a tile is `rows` pairs (16 to 64), a block of queries as many queries, a block
of keys `keys` keys of one chunk; a place holds the result of one pair.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import alignment, routing
from pallas_kernels.common import F32, LOG2_E, NT, TN, dot, iota, missing_triton, triton

NO_SCORE = -1e30  # finite, so that differences of it are numbers
BLOCK = 64  # queries begin on a multiple of this; a tile's rows divide it


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a program works.

    Attributes:
      rows: queries a program, 16, 32 or 64; cut down to a chunk where that is smaller.
      keys: keys met at once, likewise.
      segment: largest number of queries whose pairs are sorted together.
      warps: warps a program.
    """

    rows: int = 64
    keys: int = 64
    segment: int = 16384
    warps: int = 4

    def __post_init__(self):
        for name in ("rows", "keys"):
            if getattr(self, name) not in (16, 32, 64):
                raise ValueError(f"{name} must be 16, 32 or 64, got {getattr(self, name)}")
        if self.segment < 64 or self.segment % 64:
            raise ValueError(f"segment must be a positive multiple of 64, got {self.segment}")
        if self.warps not in (1, 2, 4, 8):
            raise ValueError(f"warps must be 1, 2, 4 or 8, got {self.warps}")


def unsupported_reason(
    q: jax.Array,  # [B, Tq, H, K]
    k: jax.Array,  # [B, Tk, H, K]
    v: jax.Array,  # [B, Tk, H, V]
    slots: int,
    chunk_size: int,
    q_offset=0,
) -> str | None:
    """Why these kernels cannot take such inputs; None if they can. As in block_sparse_tpu.py."""
    del slots, q_offset  # any length, position and number of chunks will do
    if q.shape[2] != k.shape[2]:
        return f"{q.shape[2]} query heads share {k.shape[2]} key heads, the kernels' have their own"
    reason = alignment.unsupported_reason(q.shape[3], v.shape[3], chunk_size, q.dtype)
    return reason or missing_triton()


# --------------------------------------------------------------------------------------------
# Inside a kernel
# --------------------------------------------------------------------------------------------


def _iota(size: int) -> jax.Array:
    return iota((size,), 0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a call: q [B, T, H, K], k and v [B, Tk, G, K].

    Attributes:
      queries, keys: T and Tk, multiples of 64; T whole segments, Tk whole chunks.
      chunk: tokens in a chunk.
      scale: factor on q . k.
      tile: see there.
      routing: of the past part; None where no query can choose anything.
      documents: arrays of packed documents that kernels read: 1 (`alignment.document_ends`) or 0.
    """

    queries: int
    keys: int
    chunk: int
    scale: float
    tile: TileConfig
    routing: routing.Plan | None
    documents: int = 0

    @property
    def log2_scale(self) -> float:
        return self.scale * LOG2_E

    @property
    def pairs(self) -> int:
        """Pairs of a sequence and head."""
        return self.queries * self.routing.slots

    @property
    def places(self) -> int:
        """Results that the past part writes: one a pair, and a tile's worth that nobody reads."""
        return self.pairs + self.tile.rows


def _softmax_add(carry, scores, v):
    """Takes scores [R, C] (exponents of 2) of values [C, K] into (maximum, sum, values)."""
    largest, total, acc = carry
    new = jnp.maximum(largest, jnp.max(scores, axis=1))
    weights, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
    acc = acc * shrink[:, None] + dot(weights.astype(v.dtype), v)
    return new, total * shrink + jnp.sum(weights, axis=1), acc


def _start(rows: int, head: int):
    return (
        jnp.full((rows,), NO_SCORE, F32),
        jnp.zeros((rows,), F32),
        jnp.zeros((rows, head), F32),
    )


def _score_gradients(q, k, do, v, lse, delta, log2_scale, seen=None):
    """Weights and gradients of the scores, without the scale, [R, C] in the inputs' dtype."""
    exponents = dot(q, k, NT) * log2_scale - lse[:, None]
    if seen is not None:
        exponents = jnp.where(seen, exponents, NO_SCORE)
    weights = jnp.exp2(exponents)
    gradient = weights * (dot(do, v, NT) - delta[:, None])
    return weights.astype(q.dtype), gradient.astype(q.dtype)


def _pairs_of_tile(tables, plan: Plan):
    """Of this program's tile: its chunk; of each pair the place of its results, its query, and
    whether there is one, [R]; and the blocks of keys to meet."""
    pairs_ref, segment_ref, chunk_ref, start_ref, count_ref = tables
    tile, rows, sorted_ = pl.program_id(2), plan.tile.rows, plan.routing
    segment = segment_ref[tile]
    used = _iota(rows) < count_ref[tile]
    index = segment * sorted_.slots * sorted_.segment + start_ref[tile] + _iota(rows)
    number = triton().load(pairs_ref.at[index], mask=used, other=0)
    query = segment * sorted_.segment + number % sorted_.segment
    # Results of a pair lie at slot * T + query; of no pair, behind them all.
    target = number // sorted_.segment * plan.queries + query
    target = jnp.where(used, target, plan.pairs + _iota(rows))
    blocks = jnp.minimum(count_ref[tile], 1) * (plan.chunk // plan.tile.keys)
    return chunk_ref[tile], target, query, used, blocks


def _readable(ends_ref, at, chunk, plan: Plan):
    """Which keys of a chunk those behind it may read, [1, keys]: whoever chose it is of the
    document that it ends with. None: all, no documents are packed."""
    return (ends_ref[0][at] >= (chunk + 1) * plan.chunk - 1)[None, :] if ends_ref else None


def _rows_at(ref, rows, mask):
    shape = rows.shape[0], ref.shape[1]
    mask = jnp.broadcast_to(mask[:, None], shape)
    return triton().load(ref.at[_elements(rows, shape)], mask=mask, other=0)


def _elements(rows, shape):
    """Indices of all elements of some rows, [R, K] each."""
    column = iota(shape, 1)
    return jnp.broadcast_to(rows[:, None], shape), column


# --------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------


def _past_forward_kernel(
    pairs_ref,  # [segments * J * S]
    segment_ref, chunk_ref, start_ref, count_ref,  # [tiles]
    q_ref, k_ref, v_ref,  # [T, K], [Tk, K]
    *refs,  # if documents are packed: ends [Tk]; normalized result of each pair [places, K]; its
    # log-sum-exp [places], base 2
    plan: Plan,
):  # fmt: skip
    *ends_ref, out_ref, lse_ref = refs
    tables = pairs_ref, segment_ref, chunk_ref, start_ref, count_ref
    chunk, target, query, used, blocks = _pairs_of_tile(tables, plan)
    q, keys = _rows_at(q_ref, query, used), plan.tile.keys

    def step(i, carry):
        at = pl.ds(chunk * plan.chunk + i * keys, keys)
        scores = dot(q, k_ref[at, :], NT) * plan.log2_scale
        if ends_ref:
            scores = jnp.where(_readable(ends_ref, at, chunk, plan), scores, NO_SCORE)
        return _softmax_add(carry, scores, v_ref[at, :])

    largest, total, acc = lax.fori_loop(0, blocks, step, _start(plan.tile.rows, q.shape[1]))
    out = (acc / total[:, None]).astype(out_ref.dtype)
    triton().store(out_ref.at[_elements(target, out.shape)], out)
    triton().store(lse_ref.at[target], largest + jnp.log2(total))


def _own_blocks(first_ref, plan: Plan):
    """Of this program's block of queries: the first; its own chunk; positions; blocks of keys."""
    rows, keys = plan.tile.rows, plan.tile.keys
    index = pl.program_id(2) * rows
    position = first_ref[0] * BLOCK + index
    own = position // plan.chunk
    # From the chunk's beginning to the block's own diagonal.
    blocks = (position + rows - own * plan.chunk + keys - 1) // keys
    return index, own, position + _iota(rows), blocks


def _own_keys(own, i, position, plan: Plan, ends_ref):
    """Rows of block i of keys of the own chunk, and which of them each query may see."""
    first = own * plan.chunk + i * plan.tile.keys
    at = pl.ds(first, plan.tile.keys)
    seen = (first + _iota(plan.tile.keys))[None, :] <= position[:, None]
    if ends_ref:
        seen &= position[:, None] <= ends_ref[0][at][None, :]
    return at, seen


def _slot(selection_ref, j, index, own, plan: Plan):
    """Where the results of the block's pairs in slot j lie, and which pairs there are."""
    chosen = selection_ref[pl.ds(index, plan.tile.rows), j]
    chosen = (chosen >= 0) & (chosen < jnp.minimum(own, plan.routing.chunks))
    return j * plan.queries + index + _iota(plan.tile.rows), chosen


def _own_forward_kernel(
    first_ref,  # [1] block of keys that the first query stands at
    q_ref, k_ref, v_ref,  # [T, K], [Tk, K]
    *refs,  # if documents are packed: ends [Tk]; if there are pairs: selection [T, J], their out
    # [places, K], lse [places]; out, lse
    plan: Plan,
):  # fmt: skip
    ends_ref, (*pair_refs, out_ref, lse_ref) = refs[: plan.documents], refs[plan.documents :]
    index, own, position, blocks = _own_blocks(first_ref, plan)
    rows = pl.ds(index, plan.tile.rows)
    q = q_ref[rows, :]

    def step(i, carry):
        at, seen = _own_keys(own, i, position, plan, ends_ref)
        scores = dot(q, k_ref[at, :], NT) * plan.log2_scale
        return _softmax_add(carry, jnp.where(seen, scores, NO_SCORE), v_ref[at, :])

    def merge(j, carry):
        selection_ref, out_pairs_ref, lse_pairs_ref = pair_refs
        at, chosen = _slot(selection_ref, j, index, own, plan)
        lse = triton().load(lse_pairs_ref.at[at], mask=chosen, other=NO_SCORE)
        largest, total, acc = carry
        new = jnp.maximum(largest, lse)
        weight, shrink = jnp.exp2(lse - new), jnp.exp2(largest - new)
        pair = _rows_at(out_pairs_ref, at, chosen).astype(F32)
        return new, total * shrink + weight, acc * shrink[:, None] + weight[:, None] * pair

    carry = lax.fori_loop(0, blocks, step, _start(plan.tile.rows, q.shape[1]))
    if pair_refs:
        carry = lax.fori_loop(0, plan.routing.slots, merge, carry)
    largest, total, acc = carry
    out_ref[rows, :] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[rows] = largest + jnp.log2(total)


def _past_dq_kernel(
    pairs_ref,  # [segments * J * S]
    segment_ref, chunk_ref, start_ref, count_ref,  # [tiles]
    q_ref, k_ref, v_ref, do_ref,  # [T, K], [Tk, K], [Tk, K], [T, K]
    lse_ref, delta_ref,  # [T]
    *refs,  # if documents are packed: ends [Tk]; dQ [places, K] of each pair, without the scale
    plan: Plan,
):  # fmt: skip
    *ends_ref, dq_ref = refs
    tables = pairs_ref, segment_ref, chunk_ref, start_ref, count_ref
    chunk, target, query, used, blocks = _pairs_of_tile(tables, plan)
    q, do, lse, delta = _queries(q_ref, do_ref, lse_ref, delta_ref, query, used)
    keys = plan.tile.keys

    def step(i, dq):
        at = pl.ds(chunk * plan.chunk + i * keys, keys)
        k, seen = k_ref[at, :], _readable(ends_ref, at, chunk, plan)
        _, gradient = _score_gradients(q, k, do, v_ref[at, :], lse, delta, plan.log2_scale, seen)
        return dq + dot(gradient, k)

    dq = lax.fori_loop(0, blocks, step, jnp.zeros(q.shape, F32))
    triton().store(dq_ref.at[_elements(target, dq.shape)], dq.astype(dq_ref.dtype))


def _queries(q_ref, do_ref, lse_ref, delta_ref, at, mask):
    """q, dO and the statistics of some queries; those masked out contribute nothing."""
    lse = triton().load(lse_ref.at[at], mask=mask, other=-NO_SCORE)
    delta = triton().load(delta_ref.at[at], mask=mask, other=0.0)
    return _rows_at(q_ref, at, mask), _rows_at(do_ref, at, mask), lse, delta


def _own_dq_kernel(
    first_ref,  # [1]
    q_ref, k_ref, v_ref, do_ref,  # [T, K], [Tk, K], [Tk, K], [T, K]
    lse_ref, delta_ref,  # [T]
    *refs,  # if documents are packed: ends [Tk]; if there are pairs: selection [T, J], their dQ
    # [places, K]; dQ [T, K]
    plan: Plan,
):  # fmt: skip
    ends_ref, (*pair_refs, dq_ref) = refs[: plan.documents], refs[plan.documents :]
    index, own, position, blocks = _own_blocks(first_ref, plan)
    rows = pl.ds(index, plan.tile.rows)
    q, do, lse, delta = q_ref[rows, :], do_ref[rows, :], lse_ref[rows], delta_ref[rows]

    def step(i, dq):
        at, seen = _own_keys(own, i, position, plan, ends_ref)
        k = k_ref[at, :]
        _, gradient = _score_gradients(q, k, do, v_ref[at, :], lse, delta, plan.log2_scale, seen)
        return dq + dot(gradient, k)

    def add(j, dq):
        selection_ref, dq_pairs_ref = pair_refs
        return dq + _rows_at(dq_pairs_ref, *_slot(selection_ref, j, index, own, plan)).astype(F32)

    dq = lax.fori_loop(0, blocks, step, jnp.zeros(q.shape, F32))
    if pair_refs:
        dq = lax.fori_loop(0, plan.routing.slots, add, dq)
    dq_ref[rows, :] = (dq * plan.scale).astype(dq_ref.dtype)


def _dkv_kernel(
    first_ref,  # [1]
    q_ref, k_ref, v_ref, do_ref,  # [T, K], [Tk, K], [Tk, K], [T, K]
    lse_ref, delta_ref,  # [T]
    *refs,  # if documents are packed: ends [Tk]; if there are pairs: pairs [segments * J * S],
    # starts [segments * (N + 1)]; dK, dV
    plan: Plan,
):  # fmt: skip
    ends_ref, (*pair_refs, dk_ref, dv_ref) = refs[: plan.documents], refs[plan.documents :]
    rows, keys = plan.tile.rows, plan.tile.keys
    first_key = pl.program_id(2) * keys
    at = pl.ds(first_key, keys)
    k, v = k_ref[at, :], v_ref[at, :]
    chunk = first_key // plan.chunk
    position = first_ref[0] * BLOCK

    def add(carry, query, mask, seen=None):
        dk, dv = carry
        q, do, lse, delta = _queries(q_ref, do_ref, lse_ref, delta_ref, query, mask)
        weights, gradient = _score_gradients(q, k, do, v, lse, delta, plan.log2_scale, seen)
        return dk + dot(gradient, q, TN), dv + dot(weights, do, TN)

    def own(i, carry):
        query = first_key // rows * rows + i * rows + _iota(rows)
        seen = (first_key + _iota(keys))[None, :] <= query[:, None]
        if ends_ref:
            seen &= query[:, None] <= ends_ref[0][at][None, :]
        query = query - position
        return add(carry, query, (query >= 0) & (query < plan.queries), seen)

    blocks = (chunk + 1) * plan.chunk // rows - first_key // rows
    zeros = jnp.zeros(k.shape, F32)
    carry = lax.fori_loop(0, blocks, own, (zeros, zeros))
    if pair_refs:
        pairs_ref, starts_ref = pair_refs
        sorted_ = plan.routing
        exists, seen = chunk < sorted_.chunks, _readable(ends_ref, at, chunk, plan)
        place = jnp.minimum(chunk, sorted_.chunks - 1)

        def segment(s, carry):
            start = starts_ref[s * (sorted_.chunks + 1) + place]
            end = starts_ref[s * (sorted_.chunks + 1) + place + 1]
            end = jnp.where(exists, end, start)

            def past(i, carry):
                index = start + i * rows + _iota(rows)
                used = index < end
                base = s * sorted_.slots * sorted_.segment
                number = triton().load(pairs_ref.at[base + index], mask=used, other=0)
                query = s * sorted_.segment + number % sorted_.segment
                return add(carry, query, used, seen)

            return lax.fori_loop(0, (end - start + rows - 1) // rows, past, carry)

        carry = lax.fori_loop(0, sorted_.segments, segment, carry)
    dk, dv = carry
    dk_ref[at, :] = (dk * plan.scale).astype(dk_ref.dtype)
    dv_ref[at, :] = dv.astype(dv_ref.dtype)


# --------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------


def _tokens(x: jax.Array) -> pl.BlockSpec:  # [B, T, H, K] -> [T, K]
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda b, h, i: (b, 0, h, 0))


def _per_head(x: jax.Array) -> pl.BlockSpec:  # [B, H, ...] -> [...]
    more = (0,) * (x.ndim - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, h, *more))


def _table(x: jax.Array) -> pl.BlockSpec:  # [tiles]
    return pl.BlockSpec(x.shape, lambda b, h, i: (0,))


def _per_row(x: jax.Array) -> pl.BlockSpec:  # [B, n] -> [n]
    return pl.BlockSpec((None, x.shape[1]), lambda b, h, i: (b, 0))


def _call(
    plan: Plan, kernel, steps: int, inputs, outputs, products, scores, interpret, name, widened=1
):
    """inputs: (array, its block spec maker); outputs the same with shapes. `products` products of
    `scores` scores with the head size are its useful work. A program has `widened` times the
    tile's warps, up to 8."""
    arrays = [x for x, _ in (*inputs, *outputs)]
    batch, _, heads, head = inputs[[spec for _, spec in inputs].index(_tokens)][0].shape
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(batch, heads, steps),
        in_specs=[spec(x) for x, spec in inputs],
        out_specs=[spec(x) for x, spec in outputs],
        out_shape=[x for x, _ in outputs],
        compiler_params=triton().CompilerParams(
            num_warps=min(8, widened * plan.tile.warps), num_stages=1
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * heads * scores * head,
            transcendentals=batch * heads * scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpret,
        name=name,
    )(*(x for x, _ in inputs))


def route(plan: Plan, selection, first):
    """Sorted pairs [B, H, segments * J * S], bounds of chunks, and the tables of tiles."""
    batch, _, heads, _ = selection.shape
    position = first * BLOCK + jnp.arange(plan.queries, dtype=jnp.int32)[None]
    pairs, starts = routing.sort_pairs(selection, position // plan.chunk, plan.routing)
    tables = routing.tile_tables(starts[..., 1:] - starts[..., :-1], plan.routing)
    per_head = lambda x: x.reshape(batch, heads, -1)
    segment = jnp.asarray(plan.routing.segment_of_tile(), jnp.int32)
    return per_head(pairs), per_head(starts), segment, *map(per_head, tables)


def _tile_inputs(routed):
    pairs, _, segment, chunk, start, count = routed
    return [(pairs, _per_head), (segment, _table)] + [(x, _per_head) for x in (chunk, start, count)]


def useful_scores(plan: Plan) -> tuple[int, int]:
    """Scores of the own chunks and of the past ones, every slot taken."""
    own = plan.queries * (plan.chunk + 1) // 2
    return own, plan.pairs * plan.chunk if plan.routing else 0


def _forward(plan: Plan, interpret, q, k, v, selection, first, *ends):
    batch, time, heads, head = q.shape
    own, past = useful_scores(plan)
    call = functools.partial(_call, plan, interpret=interpret)
    routed, pairs, documents = None, [], [(x, _per_row) for x in ends]
    if plan.routing is not None:
        routed = route(plan, selection, first)
        shape = (batch, heads, plan.places)
        outputs = [jax.ShapeDtypeStruct((*shape, head), q.dtype), jax.ShapeDtypeStruct(shape, F32)]
        results = call(
            kernel=_past_forward_kernel,
            steps=plan.routing.all_tiles,
            inputs=[*_tile_inputs(routed), *((x, _tokens) for x in (q, k, v)), *documents],
            outputs=[(x, _per_head) for x in outputs],
            products=2,
            scores=past,
            name="block_sparse_past_forward",
        )
        pairs = [(selection, _tokens), *((x, _per_head) for x in results)]
    out, lse = call(
        kernel=_own_forward_kernel,
        steps=time // plan.tile.rows,
        inputs=[(first, _per_row), *((x, _tokens) for x in (q, k, v)), *documents, *pairs],
        outputs=[
            (jax.ShapeDtypeStruct(q.shape, q.dtype), _tokens),
            (jax.ShapeDtypeStruct((batch, heads, time), F32), _per_head),
        ],
        products=2,
        scores=own,
        name="block_sparse_own_forward",
    )
    return out, lse, routed


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, k, v, selection, first, ends, plan, interpret, forward):
    return forward(plan, interpret, q, k, v, selection, first, *ends)[0]


def _attention_forward(q, k, v, selection, first, ends, plan, interpret, forward):
    out, lse, routed = forward(plan, interpret, q, k, v, selection, first, *ends)
    return out, (q, k, v, selection, first, ends, out, lse, routed)


def _attention_backward(plan, interpret, forward, saved, do):
    del forward
    if reason := missing_triton():
        raise ValueError(f"the gradient of block_sparse on GPU: {reason}")
    q, k, v, selection, first, ends, out, lse, routed = saved
    group = q.shape[2] // k.shape[2]
    if group > 1:  # the kernels know no groups: every query head gets its own copies
        k, v, selection = (jnp.repeat(x, group, axis=2) for x in (k, v, selection))
        routed = routed and [x if x.ndim == 1 else jnp.repeat(x, group, axis=1) for x in routed]
    dq, dk, dv = _gradients(
        plan, bool(interpret), (q, k, v, selection, first, *ends), out, lse, routed, do
    )
    if group > 1:
        dk, dv = (
            jnp.sum(x.reshape(*x.shape[:2], -1, group, x.shape[3]), axis=3, dtype=F32).astype(
                x.dtype
            )
            for x in (dk, dv)
        )
    return dq, dk, dv, None, None, None


def _gradients(plan: Plan, interpret: bool, arrays, out, lse, routed, do):
    """dq, dk, dv of the arrays that `_attention` takes, from its result and log-sum-exp."""
    q, k, v, selection, first, *ends = arrays
    batch, time, heads, head = q.shape
    own, past = useful_scores(plan)
    delta = jnp.sum(do.astype(F32) * out.astype(F32), axis=-1).transpose(0, 2, 1)
    inputs = [(x, _tokens) for x in (q, k, v, do)] + [(lse, _per_head), (delta, _per_head)]
    inputs += [(x, _per_row) for x in ends]
    call = functools.partial(_call, plan, interpret=interpret)
    of_pairs, of_keys = [], []
    if plan.routing is not None:
        (dq_pairs,) = call(
            kernel=_past_dq_kernel,
            steps=plan.routing.all_tiles,
            inputs=[*_tile_inputs(routed), *inputs],
            outputs=[(jax.ShapeDtypeStruct((batch, heads, plan.places, head), q.dtype), _per_head)],
            products=3,
            scores=past,
            name="block_sparse_past_dq",
        )
        of_pairs = [(selection, _tokens), (dq_pairs, _per_head)]
        of_keys = [(x, _per_head) for x in routed[:2]]
    (dq,) = call(
        kernel=_own_dq_kernel,
        steps=time // plan.tile.rows,
        inputs=[(first, _per_row), *inputs, *of_pairs],
        outputs=[(jax.ShapeDtypeStruct(q.shape, q.dtype), _tokens)],
        products=3,
        scores=own,
        name="block_sparse_own_dq",
    )
    dk, dv = call(
        kernel=_dkv_kernel,
        steps=plan.keys // plan.tile.keys,
        inputs=[(first, _per_row), *inputs, *of_keys],
        outputs=[(jax.ShapeDtypeStruct(x.shape, x.dtype), _tokens) for x in (k, v)],
        products=4,
        scores=own + past,
        name="block_sparse_dkv",
        widened=head // 64,  # both sums are [keys, K] in float32: four warps spill those of 128
    )
    return dq, dk, dv


_attention.defvjp(_attention_forward, _attention_backward)


# --------------------------------------------------------------------------------------------
# The op
# --------------------------------------------------------------------------------------------


def _make_plan(
    q, k, selection, chunk_size, scale, tile: TileConfig, first: int | None, documents: bool
) -> Plan:
    """Sizes for aligned queries that begin at block `first` (None: known when running)."""
    length, slots = q.shape[1], selection.shape[3]
    chunks = k.shape[1] // chunk_size
    limit = min(tile.segment, routing.largest_segment(chunks, slots, numbered=True))
    segments = -(-length // max(BLOCK, limit // BLOCK * BLOCK))
    segment = -(-length // segments // BLOCK) * BLOCK
    queries = segment * segments
    whole = max(chunk_size, BLOCK)  # where queries begin, and where chunks end
    keys = -(-k.shape[1] // whole) * whole
    room = queries if first is None else first * BLOCK + queries - keys
    keys += -(-max(room, 0) // whole) * whole
    if first is not None:
        chunks = min(chunks, (first * BLOCK + length - 1) // chunk_size)
    routed = None
    if slots and chunks:
        routed = routing.make_plan(
            queries=queries,
            segment=segment,
            rows=tile.rows,
            chunks=chunks,
            slots=slots,
            chunk_size=chunk_size,
            first=None if first is None else first * BLOCK,
            numbered=True,
        )
    return Plan(queries, keys, chunk_size, scale, tile, routed, int(documents))


def attend(
    forward: Callable,
    q: jax.Array,  # [B, Tq, H, K]
    k: jax.Array,  # [B, Tk, G, K]
    v: jax.Array,  # [B, Tk, G, K]
    selection: jax.Array,  # [B, Tq, G, J]
    *,
    chunk_size: int,
    scale: float,
    q_offset,
    tile: TileConfig | None,
    interpret,
    starts: jax.Array | None = None,  # [B, Tk]
) -> jax.Array:
    """Checked arguments through a forward pass, with the backward pass of this file.

    Args:
      forward: (plan, interpret, q, k, v, selection, first, *ends) -> out [B, T, H, K], its
        log-sum-exp [B, H, T] (base 2) and what `route` returned, None where no query can choose.
        Its arrays have the plan's sizes; `first` [B, 1] is the block of 64 that the queries begin
        at; ends [B, Tk] (`alignment.document_ends`) comes where documents are packed.
      interpret: handed to `forward`; where it is true the backward pass is interpreted too.
      others: as in `block_sparse_attention`; G divides H.
    """
    tile = TileConfig() if tile is None else tile
    fit = lambda size: min(size, chunk_size)
    tile = dataclasses.replace(tile, rows=fit(tile.rows), keys=fit(tile.keys))
    batch, length = q.shape[:2]
    known = isinstance(q_offset, int)
    q, shift = alignment.align(q, q_offset, BLOCK)
    selection, _ = alignment.align(selection, q_offset, BLOCK, fill=-1)
    first = alignment.first_block(q_offset, batch, BLOCK, k.shape[1])
    plan = _make_plan(
        *(q, k, selection, chunk_size, float(scale), tile),
        q_offset // BLOCK if known else None,
        starts is not None,
    )
    pad = lambda x, time, fill=0: jnp.pad(
        x, ((0, 0), (0, time - x.shape[1]), (0, 0), (0, 0)), constant_values=fill
    )
    out = _attention(
        pad(q, plan.queries),
        *(pad(x, plan.keys) for x in (k, v)),
        pad(selection, plan.queries, -1),
        first[:, None],
        () if starts is None else (alignment.document_ends(starts, plan.keys),),
        plan,
        interpret,
        forward,
    )
    return alignment.cut(out, shift, length)


def block_sparse_attention(
    q: jax.Array,  # [B, Tq, H, K]
    k: jax.Array,  # [B, Tk, H, K]
    v: jax.Array,  # [B, Tk, H, K]
    selection: jax.Array,  # [B, Tq, H, J]
    *,
    chunk_size: int,
    scale: float,
    q_offset=0,
    starts: jax.Array | None = None,  # [B, Tk]
    tile: TileConfig | None = None,
    interpret=False,
) -> jax.Array:
    """Causal attention to the own chunk and the selected past chunks on an NVIDIA GPU.

    Arguments, results and errors are those of
    `pallas_kernels.block_sparse_tpu.block_sparse_attention`, but that chunk_size is 32 or any
    multiple of 64 up to 2048.
    """
    alignment.check(q, k, v, selection, starts)
    reason = unsupported_reason(q, k, v, selection.shape[3], chunk_size)
    if reason:
        raise ValueError(f"block_sparse on GPU: {reason}")
    return attend(
        _forward,
        q,
        k,
        v,
        selection,
        chunk_size=chunk_size,
        scale=scale,
        q_offset=q_offset,
        starts=starts,
        tile=tile,
        interpret=interpret,
    )

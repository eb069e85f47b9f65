"""WKV-7 for TPU: the chunked recurrence and its gradient as two Pallas kernels.

The recurrence S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T, y_t = S_t r_t is solved a
chunk of C tokens at a time with matrix products; the state crosses chunks in VMEM. A pack is two
heads of K = V = 64 channels or one of 128; wide, stacked and the other words for forms and sizes
are those of recurrence_tpu.py. Decays inside a chunk are scaled by at most exp(0.6065 * C / 2),
which float32 holds.

Where documents are packed, decays go on across their borders, and what would cross one is masked:
scores, reads of the state before the chunk, and writes to the state after it.

docs/kernels.md derives the products and records what each choice cost or saved.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import common
from pallas_kernels.common import F32, LANES, LOG2_E, NT, TN, dot, iota
from pallas_kernels.recurrence_tpu import (
    TILES,
    Carried,
    Item,
    Plan,
    Shape,
    Stages,
    TileConfig,
    crop,
    default_tile,
    interleave,
    inverse,
    pack_state,
    pad,
    rows,
    unpack_state,
)

__all__ = ["TILES", "TileConfig", "default_tile", "unsupported_reason", "wkv7"]


def unsupported_reason(head_size: int, value_size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels cannot take such inputs; None if they can."""
    return common.unsupported_reason(head_size, value_size, dtype)


# --------------------------------------------------------------------------------------------
# Inside a kernel
# --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Decay:
    """Cumulated decay of a chunk in base-2 logarithms, relative to its middle row."""

    step: jax.Array  # [C, 128] log2 w
    inclusive: jax.Array  # [C, 128] sum up to and with each row
    middle: jax.Array  # [1, 128] the reference: inclusive at the middle row
    last: jax.Array  # [1, 128] inclusive at the last row

    @classmethod
    def of(cls, shape: Shape, log_w: jax.Array) -> "_Decay":
        step = log_w * LOG2_E
        inclusive = shape.cumulate(step)
        half, end = shape.chunk // 2, shape.chunk
        return cls(step, inclusive, inclusive[half - 1 : half], inclusive[end - 1 : end])

    def exclusive_scale(self) -> jax.Array:  # of a: sees the state before this row's decay
        return jnp.exp2(self.inclusive - self.middle - self.step)

    def inclusive_scale(self) -> jax.Array:  # of r
        return jnp.exp2(self.inclusive - self.middle)

    def inverse_scale(self) -> jax.Array:  # of b and k: undoes the decay before they were added
        return jnp.exp2(self.middle - self.inclusive)

    def state_to_middle(self) -> jax.Array:
        return jnp.exp2(self.middle)

    def middle_to_end(self) -> jax.Array:
        return jnp.exp2(self.last - self.middle)


class _Borders(NamedTuple):
    """Borders of packed documents in a chunk, rows [1, lanes] int32; no rows where there is one
    text, and then everything is kept as it is.

    `begins` and `ends`, of each token (of each head): the first and last token of its document in
    the chunk. `first` and `last`: where the first and the last document begins that does so in the
    chunk, else C and 0; the same number in all lanes.
    """

    begins: jax.Array | None = None
    ends: jax.Array | None = None
    first: jax.Array | None = None
    last: jax.Array | None = None

    @classmethod
    def read(cls, borders_ref: tuple, shape: Shape, chunk: int) -> "_Borders":
        """Of a chunk of a block; borders_ref: nothing, or [1, J, 4, lanes]."""
        if not borders_ref:
            return cls()
        begins, ends, first, last = (borders_ref[0][0, chunk, i : i + 1] for i in range(4))
        return cls(begins, ends[:, : shape.wide], first[:, :LANES], last[:, :LANES])

    def sources(self, shape: Shape) -> jax.Array | None:
        """First source that each target reads, as `Shape.earlier` takes it."""
        return None if self.begins is None else self.begins[:, : shape.wide]

    def reading(self, x: jax.Array, chunk: int) -> jax.Array:
        """x [n C, 128] without rows of targets that do not read the state before the chunk."""
        if self.first is None:
            return x
        return jnp.where(iota(x.shape, 0) % chunk < self.first, x, jnp.zeros_like(x))

    def writing(self, x: jax.Array, chunk: int) -> jax.Array:
        """x [n C, 128] without rows of sources that do not reach the state after the chunk."""
        if self.last is None:
            return x
        return jnp.where(iota(x.shape, 0) % chunk >= self.last, x, jnp.zeros_like(x))

    def crossing(self, state: jax.Array, chunk: int) -> jax.Array:
        """What of the state before the chunk [V, 128] is left after it: all or nothing."""
        if self.first is None:
            return state
        return jnp.where(self.first == chunk, state, jnp.zeros_like(state))


def _borders(fresh: jax.Array | None, chunk: int) -> list[jax.Array]:
    """The rows of `_Borders` of all chunks, int32 [B, N, 4, lanes], as a list of one; nothing
    without `fresh`, [B, T] bool, which says where documents begin."""
    if fresh is None:
        return []
    fresh = jnp.pad(fresh, ((0, 0), (0, -fresh.shape[1] % chunk)))
    fresh = fresh.reshape(fresh.shape[0], -1, chunk)
    token = iota(fresh.shape, 2)
    after = jnp.where(fresh, token, chunk)
    begins = lax.cummax(jnp.where(fresh, token, 0), axis=2)
    following = jnp.pad(after[..., 1:], ((0, 0), (0, 0), (0, 1)), constant_values=chunk)
    ends = lax.cummin(following, axis=2, reverse=True) - 1
    wide = lambda x: jnp.broadcast_to(x, fresh.shape)
    rows = begins, ends, wide(after.min(2, keepdims=True)), wide(begins[..., -1:])
    rows = jnp.stack(rows, axis=2)
    return [jnp.tile(rows, (1, 1, 1, max(2, LANES // chunk)))]


# --------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------


def _forward_kernel(
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref,  # [1, J C, G 128]
    start_ref,  # [1, G, V, 128] state before the first token
    *refs,  # if packed: borders, see `_Borders.read`; y [1, J C, G 128]; state after the last token
    # [1, G, V, 128]; if residuals: states [1, J, G, V, 128], inverse [1, J, G, C, wide],
    # u [1, J C, G 128]; and VMEM [G, V, 128]: the state, carried over the grid's last axis
    shape: Shape,
    packs: int,
    chunks: int,
    residuals: bool,
    packed: int,  # arrays of borders: 1 where documents are packed, else 0
):  # fmt: skip
    borders_ref, (y_ref, end_ref, *refs) = refs[:packed], refs[packed:]
    states_ref, inverse_ref, u_ref = refs[:3] if residuals else (None, None, None)
    state_ref = refs[-1]
    step = pl.program_id(2)

    carried = {Carried(pack, -1) for pack in range(packs)}

    @pl.when(step == 0)
    def _():
        state_ref[...] = start_ref[0]

    def solve(item: Item) -> Stages:
        size, dtype, pack = shape.chunk, shape.dtype, item.pack
        borders = _Borders.read(borders_ref, shape, item.chunk)
        decay = _Decay.of(shape, item.get_f32(w_ref))
        yield
        a = (item.get_f32(a_ref) * decay.exclusive_scale()).astype(dtype)
        b = (item.get_f32(b_ref) * decay.inverse_scale()).astype(dtype)
        r = (item.get_f32(r_ref) * decay.inclusive_scale()).astype(dtype)
        k = (item.get_f32(k_ref) * decay.inverse_scale()).astype(dtype)
        a_r, b_stack = rows(a, r), shape.stack(b)
        yield
        product = dot(a_r, b_stack, NT)
        ab = shape.earlier(product[:size], strict=True, limit=borders.ends)
        rb = shape.earlier(product[size:], strict=False, limit=borders.ends).astype(dtype)
        k_stack, v = shape.stack(k), item.get_operand(v_ref)
        yield
        product = dot(a_r, k_stack, NT)
        ak = shape.earlier(product[:size], strict=True, limit=borders.ends)
        rk = shape.earlier(product[size:], strict=False, limit=borders.ends)
        ak_rk, v_stack = rows(ak, rk).astype(dtype), shape.stack(v)
        yield
        from_v = dot(ak_rk, v_stack)
        x = yield from inverse(shape, ab)
        if residuals:
            inverse_ref[0, item.chunk, pack] = x
        yield Carried(pack, item.chunk - 1)
        state = state_ref[pack]
        if residuals:
            states_ref[0, item.chunk, pack] = state
        state = state * decay.state_to_middle()
        from_state = dot(a_r, shape.stack(state.astype(dtype)), NT)
        z_y = from_v + borders.reading(from_state, size)
        z_stack = shape.stack(z_y[:size].astype(dtype))
        yield
        u = dot(x, z_stack).astype(dtype)
        if residuals:
            item.put(u_ref, u)
        u_stack, u_v = shape.stack(u), rows(u, v)
        yield
        state = borders.crossing(state, size)
        state = state + shape.unstack(dot(u_v, borders.writing(rows(b, k), size), TN))
        state_ref[pack] = state * decay.middle_to_end()
        carried.add(Carried(pack, item.chunk))
        item.put(y_ref, z_y[size:] + dot(rb, u_stack))

    items = (Item(pack, chunk, shape, packs) for chunk in range(chunks) for pack in range(packs))
    interleave(map(solve, items), carried)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        end_ref[0] = state_ref[...]


def _backward_kernel(
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref,  # [1, J C, G 128]
    states_ref,  # [1, J, G, V, 128] state before each chunk
    end_ref,  # [1, G, V, 128] state after the last token
    inverse_ref,  # [1, J, G, C, wide]
    u_ref, dy_ref,  # [1, J C, G 128]
    dend_ref,  # [1, G, V, 128]
    *refs,  # if packed: borders, see `_Borders.read`; gradients of the tokens [1, J C, G 128] and
    # of the first state; and VMEM [G, V, 128]: gradient of, and value of, the state after a step
    shape: Shape,
    packs: int,
    chunks: int,
    packed: int,  # arrays of borders: 1 where documents are packed, else 0
):  # fmt: skip
    borders_ref, refs = refs[:packed], refs[packed:]
    dr_ref, dw_ref, dk_ref, dv_ref, da_ref, db_ref, dstart_ref, dstate_ref, next_ref = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dstate_ref[...] = dend_ref[0]
        next_ref[...] = end_ref[0]

    carried: set[Carried] = set()

    def solve(item: Item) -> Stages:
        size, dtype, pack, index = shape.chunk, shape.dtype, item.pack, item.chunk
        borders = _Borders.read(borders_ref, shape, index)
        by_source = {"transposed": True, "limit": borders.sources(shape)}
        decay = _Decay.of(shape, item.get_f32(w_ref))
        yield
        a_scale, r_scale = decay.exclusive_scale(), decay.inclusive_scale()
        inverse_scale = decay.inverse_scale()
        a = (item.get_f32(a_ref) * a_scale).astype(dtype)
        r = (item.get_f32(r_ref) * r_scale).astype(dtype)
        b = (item.get_f32(b_ref) * inverse_scale).astype(dtype)
        k = (item.get_f32(k_ref) * inverse_scale).astype(dtype)
        a_r, b_k = rows(a, r), rows(b, k)
        v, u, dy = item.get_operand(v_ref), item.get(u_ref), item.get_operand(dy_ref)
        a_stack, r_stack, dy_stack = shape.stack(a), shape.stack(r), shape.stack(dy)
        yield
        # Rows are sources here: transposed by exchanging the operands, not by moving data.
        product = dot(b_k, r_stack, NT)
        br = shape.earlier(product[:size], strict=False, **by_source)
        kr = shape.earlier(product[size:], strict=False, **by_source)
        br_kr = rows(br, kr).astype(dtype)
        ka = shape.earlier(dot(k, a_stack, NT), strict=True, **by_source).astype(dtype)
        yield
        du_dv = dot(br_kr, dy_stack)
        if index < chunks - 1:  # the gradient of the state comes from the chunk after this one
            yield Carried(pack, index + 1)
        dstate = dstate_ref[pack]
        after = next_ref[pack] if index == chunks - 1 else states_ref[0, index + 1, pack]
        dlast = jnp.sum(dstate * after, axis=0, keepdims=True)
        dstate = dstate * decay.middle_to_end()
        dstate_stack = shape.stack(dstate.astype(dtype))
        yield
        du_dv = du_dv + borders.writing(dot(b_k, dstate_stack, NT), size)
        du = du_dv[:size].astype(dtype)
        yield
        dz = shape.unstack(dot(inverse_ref[0, index, pack], du, TN)).astype(dtype)
        dz_dy, dz_stack = rows(dz, dy), shape.stack(dz)
        yield
        dstate = borders.crossing(dstate, size)
        dstate = dstate + shape.unstack(dot(dz_dy, borders.reading(a_r, size), TN))
        dstate_ref[pack] = dstate * decay.state_to_middle()
        carried.add(Carried(pack, index))
        item.put(dv_ref, du_dv[size:] + dot(ka, dz_stack))
        u_stack, v_stack = shape.stack(u), shape.stack(v)
        yield
        product = dot(dz_dy, u_stack, NT)
        dab = shape.earlier(product[:size], strict=True, limit=borders.ends)
        drb = shape.earlier(product[size:], strict=False, limit=borders.ends)
        dab_drb = rows(dab, drb).astype(dtype)
        yield
        product = dot(dz_dy, v_stack, NT)
        dak = shape.earlier(product[:size], strict=True, limit=borders.ends)
        drk = shape.earlier(product[size:], strict=False, limit=borders.ends)
        dak_drk = rows(dak, drk).astype(dtype)
        before = states_ref[0, index, pack]
        if index == 0:
            next_ref[pack] = before
        state_stack = shape.stack((before * decay.state_to_middle()).astype(dtype))
        b_stack, k_stack = shape.stack(b), shape.stack(k)
        yield
        da_dr = borders.reading(dot(dz_dy, state_stack), size) + dot(dab_drb, b_stack)
        yield
        da_dr = da_dr + dot(dak_drk, k_stack)
        da, dr = da_dr[:size] * a_scale, da_dr[size:] * r_scale
        item.put(da_ref, da)
        item.put(dr_ref, dr)
        a_da = item.get_f32(a_ref) * da
        # Gradient of the inclusive log decays; a's, of the exclusive one, is corrected below.
        dlog = item.get_f32(r_ref) * dr + a_da
        yield
        db_dk = borders.writing(dot(rows(u, v), dstate_stack), size)
        yield
        from_a_r = _source_gradients(shape, dab_drb, dak_drk, a_r)
        db = (db_dk[:size] + from_a_r[0]) * inverse_scale
        dk = (db_dk[size:] + from_a_r[1]) * inverse_scale
        item.put(db_ref, db)
        item.put(dk_ref, dk)
        dlog = dlog - item.get_f32(b_ref) * db - item.get_f32(k_ref) * dk
        yield
        dlog = shape.cumulate(dlog, reverse=True, first=borders.begins) - a_da
        if packed:
            dlast = borders.writing(jnp.broadcast_to(dlast, dlog.shape), size)
        item.put(dw_ref, dlog + dlast)

    last_first = reversed(range(chunks))
    items = (Item(pack, chunk, shape, packs) for chunk in last_first for pack in range(packs))
    interleave(map(solve, items), carried)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dstart_ref[0] = dstate_ref[...]


def _source_gradients(
    shape: Shape, dab_drb: jax.Array, dak_drk: jax.Array, a_r: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both [2 C, wide]^T @ [a; r], wide [C, 128]; one product where it stays register-aligned."""
    if shape.wide % LANES:
        return tuple(shape.unstack(dot(x, a_r, TN)) for x in (dab_drb, dak_drk))
    both = dot(jnp.concatenate([dab_drb, dak_drk], axis=1), a_r, TN)
    return shape.unstack(both[: shape.wide]), shape.unstack(both[shape.wide :])


# --------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------


def _heads(head: int) -> int:
    """Heads a pack."""
    return LANES // head


def _plan(packed: jax.Array, head: int, tile: TileConfig) -> Plan:
    batch, time, width = packed.shape
    shape = Shape(tile.chunk, head, head, _heads(head), packed.dtype)
    return Plan(batch, time, width // shape.keys, shape, tile)


def _flops(shape: Shape, square: int, mixed: int) -> int:
    """Of `square` products C x C x K and `mixed` ones C x K x V."""
    return 2 * shape.chunk * shape.key * (square * shape.chunk + mixed * shape.value)


def _borders_specs(plan: Plan, borders, *, reverse: bool) -> list[pl.BlockSpec]:
    """Of the blocks that a step's chunks have of `_borders`."""
    time = lambda c: plan.grid[2] - 1 - c if reverse else c
    block = lambda x: (1, plan.chunks, *x.shape[2:])
    return [pl.BlockSpec(block(x), lambda i, j, c: (i, time(c), 0, 0)) for x in borders]


def _forward_call(tokens, start, borders, *, head, tile, residuals, interpret):
    """Packed arrays: tokens (r, log_w, k, v, a, b) [B, T, P 128], start [B, P, V, 128]; `borders`
    as `_borders` returns them."""
    plan = _plan(tokens[0], head, tile)
    specs, shapes = plan.specs(reverse=False), plan.shapes()
    outputs = {"tokens": shapes["keys"](tokens[0].dtype), "state": shapes["state"]}
    out_specs = [specs["keys"], specs["state"]]
    out_shape = list(outputs.values())
    if residuals:
        out_specs += [specs["states"], specs["inverse"], specs["keys"]]
        out_shape += [shapes["states"], shapes["inverse"], shapes["keys"](plan.shape.dtype)]
    kernel = functools.partial(
        _forward_kernel,
        shape=plan.shape,
        packs=plan.packs,
        chunks=plan.chunks,
        residuals=residuals,
        packed=len(borders),
    )
    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[
            *[specs["keys"]] * 6,
            specs["state"],
            *_borders_specs(plan, borders, reverse=False),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[plan.scratch()],
        **plan.options(),
        cost_estimate=plan.cost(_flops(plan.shape, 9, 4), 3, [*tokens, start, *out_shape]),
        interpret=interpret,
        name="wkv7_forward",
    )(*tokens, start, *borders)


def _backward_call(tokens, saved, dy, dend, borders, *, head, tile, interpret):
    """saved: (states, end, inverse, u) of the forward call, packed as there."""
    plan = _plan(tokens[0], head, tile)
    specs, shapes = plan.specs(reverse=True), plan.shapes()
    out_shape = [shapes["keys"](F32 if i == 1 else x.dtype) for i, x in enumerate(tokens)]
    out_shape.append(shapes["state"])
    inputs = (*tokens, *saved, dy, dend)
    saved_specs = [specs["states"], specs["state"], specs["inverse"], specs["keys"]]
    kernel = functools.partial(
        _backward_kernel,
        shape=plan.shape,
        packs=plan.packs,
        chunks=plan.chunks,
        packed=len(borders),
    )
    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[
            *[specs["keys"]] * 6,
            *saved_specs,
            specs["keys"],
            specs["state"],
            *_borders_specs(plan, borders, reverse=True),
        ],
        out_specs=[specs["keys"]] * 6 + [specs["state"]],
        out_shape=out_shape,
        scratch_shapes=[plan.scratch(), plan.scratch()],
        **plan.options(),
        cost_estimate=plan.cost(_flops(plan.shape, 17, 8), 3, [*inputs, *out_shape]),
        interpret=interpret,
        name="wkv7_backward",
    )(*inputs, *borders)


def _check(r, log_w, k, v, a, b, state, fresh, tile) -> None:
    if r.ndim != 4:
        raise ValueError(f"r must be [B, T, H, K], got shape {r.shape}")
    batch, time, heads, head = r.shape
    reason = unsupported_reason(head, v.shape[-1], r.dtype)
    if reason:
        raise ValueError(f"wkv7 on TPU: {reason}")
    if tile.chunk * (LANES // head) > LANES:
        raise ValueError(f"wkv7 on TPU: chunk {tile.chunk} needs head size 128, got {head}; use 64")
    if time < 1:
        raise ValueError("wkv7 on TPU: T must be at least 1")
    for name, x in {"log_w": log_w, "k": k, "v": v, "a": a, "b": b}.items():
        if x.shape != r.shape:
            raise ValueError(f"{name} has shape {x.shape}, r has {r.shape}")
    if state is not None and state.shape != (batch, heads, head, head):
        raise ValueError(f"state has shape {state.shape}, not [B, H, V, K] for r of {r.shape}")
    if fresh is not None and fresh.shape != (batch, time):
        raise ValueError(f"fresh has shape {fresh.shape}, not [B, T] for r of {r.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _wkv7(r, log_w, k, v, a, b, state, fresh, tile, interpret):
    tokens = tuple(pad(x, tile.chunk, _heads(r.shape[-1])) for x in (r, log_w, k, v, a, b))
    y, end = _forward_call(
        tokens,
        pack_state(state, _heads(r.shape[-1])),
        _borders(fresh, tile.chunk),
        head=r.shape[-1],
        tile=tile,
        residuals=False,
        interpret=interpret,
    )
    return crop(y, r.shape), unpack_state(end, r.shape[2], _heads(r.shape[-1]))


def _wkv7_forward(r, log_w, k, v, a, b, state, fresh, tile, interpret):
    inputs = (r, log_w, k, v, a, b)
    y, end, states, inverse, u = _forward_call(
        tuple(pad(x, tile.chunk, _heads(r.shape[-1])) for x in inputs),
        pack_state(state, _heads(r.shape[-1])),
        _borders(fresh, tile.chunk),
        head=r.shape[-1],
        tile=tile,
        residuals=True,
        interpret=interpret,
    )
    outputs = crop(y, r.shape), unpack_state(end, r.shape[2], _heads(r.shape[-1]))
    return outputs, (inputs, fresh, (states, end, inverse, u))


def _wkv7_backward(tile, interpret, residuals, cotangents):
    inputs, fresh, saved = residuals
    dy, dend = cotangents
    r = inputs[0]
    *grads, dstart = _backward_call(
        tuple(pad(x, tile.chunk, _heads(r.shape[-1])) for x in inputs),
        saved,
        pad(dy, tile.chunk, _heads(r.shape[-1])),
        pack_state(dend, _heads(r.shape[-1])),
        _borders(fresh, tile.chunk),
        head=r.shape[-1],
        tile=tile,
        interpret=interpret,
    )
    return (
        *(crop(g, r.shape) for g in grads),
        unpack_state(dstart, r.shape[2], _heads(r.shape[-1])),
        None,
    )


_wkv7.defvjp(_wkv7_forward, _wkv7_backward)


def wkv7(
    r: jax.Array,  # [B, T, H, K]
    log_w: jax.Array,  # [B, T, H, K]
    k: jax.Array,  # [B, T, H, K]
    v: jax.Array,  # [B, T, H, V], V = K
    a: jax.Array,  # [B, T, H, K]
    b: jax.Array,  # [B, T, H, K]
    state: jax.Array | None = None,  # [B, H, V, K]
    *,
    fresh: jax.Array | None = None,  # [B, T]
    tile: TileConfig | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The WKV-7 recurrence on a TPU, differentiable in every array.

    S_t = S_{t-1} diag(exp(log_w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T and y_t = S_t r_t.

    Args:
      r, k, v, a, b: bfloat16 or float32, all of one dtype. It decides the products' precision:
        one bfloat16 pass or full float32; state, exponents and sums are float32 either way. For
        RWKV-7, a = -kk and b = kk * iclr with kk of unit norm.
      log_w: log decay in [-exp(-1/2), 0); read as float32. Decays below that bound can overflow.
      state: state before the first token, rows are values; zeros if None.
      fresh: bool, where packed documents begin: S_{t-1} is zeros there. None: nowhere.
      tile: see `TileConfig`; default: `default_tile()`.
      interpret: True or `pltpu.InterpretParams` to run on a CPU, for tests.

    Returns:
      y [B, T, H, V] in r's dtype, and the final state [B, H, V, K] in float32.

    Raises:
      ValueError: unsupported head size or dtype, or shapes that disagree.
    """
    tile = default_tile() if tile is None else tile
    _check(r, log_w, k, v, a, b, state, fresh, tile)
    if any(x.dtype != r.dtype for x in (k, v, a, b)):
        found = {name: str(x.dtype) for name, x in zip("rkvab", (r, k, v, a, b), strict=True)}
        raise ValueError(f"wkv7 on TPU: r, k, v, a, b must share a dtype, got {found}")
    if state is None:
        batch, _, heads, head = r.shape
        state = jnp.zeros((batch, heads, head, head), F32)
    return _wkv7(r, log_w.astype(F32), k, v, a, b, state.astype(F32), fresh, tile, interpret)

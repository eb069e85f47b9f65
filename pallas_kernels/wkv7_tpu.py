"""WKV-7 for TPU: the chunked recurrence and its gradient as two Pallas kernels.

The recurrence S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T, y_t = S_t r_t is solved a
chunk of C tokens at a time with matrix products; the state crosses chunks in VMEM. Arrays keep the
layout the projections produce, [B, T, H * K], so that two heads of size 64 share the 128 lanes of a
vector register (a "pack"). Two forms of a two-head operand appear below:

* wide: [rows, 2 * columns], the heads side by side in lanes. Left operands and results.
* stacked: [2 * rows, 2 * columns], block diagonal, made from the wide form by masking lanes. Right
  operands. wide @ stacked is wide again, so only right operands pay for the zeros.

Sizes, from the smallest:

* head: K = V channels, 64 or 128; pack: the heads of 128 lanes, two or one.
* chunk: C tokens, solved at once; item: one pack and one chunk.
* block: what a grid step reads and writes of an array, J chunks of G packs.

docs/kernels.md derives the products and records what each choice cost or saved.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import common
from pallas_kernels.common import (
    F32,
    LANES,
    LOG2_E,
    NT,
    TN,
    current_chip,
    dot,
    grid_options,
    iota,
)

_DIAGONAL = 8  # size of the diagonal blocks inverted on the vector unit: one register of sublanes


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How much one grid step takes on.

    Attributes:
      chunk: tokens solved at once, C: 16, 32, 64, or (head size 128 only, as the C x C matrices
        of a pack share 128 lanes) 128. Decays inside a chunk are scaled by at most
        exp(0.6065 * C / 2), which float32 holds.
      max_packs: largest number of 128-lane packs a grid step; the largest divisor of the number
        of packs up to this is used with which the cores have equally many steps, if there is one.
        More packs hide the latency of dependent products.
      max_items: largest number of (pack, chunk) pairs a grid step. What the packs leave is used
        up by consecutive chunks, whose state-free parts run side by side.
      vmem_limit_bytes: scratchpad the compiler may use.
      cores: cores that share the steps of sequences and packs: 2 on v5p, whose chips are one
        device.
    """

    chunk: int = 64
    max_packs: int = 6
    max_items: int = 12
    vmem_limit_bytes: int = 64 * 1024 * 1024
    cores: int = 1

    def __post_init__(self):
        if self.chunk not in (16, 32, 64, 128):
            raise ValueError(f"chunk must be 16, 32, 64 or 128, got {self.chunk}")
        for name in ("max_packs", "max_items", "cores"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


TILES = {
    "v5e": TileConfig(),
    "v5p": TileConfig(vmem_limit_bytes=48 * 1024 * 1024, cores=2),
    "v6e": TileConfig(),
}


def default_tile() -> TileConfig:
    """The tile for the device of the mesh in force, else of the default backend; v5e's where that
    is neither a v5p nor a v6e."""
    return TILES.get(current_chip(), TILES["v5e"])


def unsupported_reason(head_size: int, value_size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels cannot take such inputs; None if they can."""
    return common.unsupported_reason(head_size, value_size, dtype)


# --------------------------------------------------------------------------------------------
# Inside a kernel: forms, masks, sums, the inverse
# --------------------------------------------------------------------------------------------


def _rows(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=0)


def _words(x: jax.Array) -> jax.Array:
    """bfloat16 [R, n] seen as int32 [R / 2, n]: masks cost half as much on packed words."""
    return pltpu.bitcast(x, jnp.int32)


def _bfloat16(words: jax.Array) -> jax.Array:
    return pltpu.bitcast(words, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of a kernel: C, head size, heads a pack, and the dtype products run in."""

    chunk: int
    head: int
    dtype: jnp.dtype

    @property
    def heads(self) -> int:
        return LANES // self.head

    @property
    def wide(self) -> int:
        """Lanes of a wide C x C matrix."""
        return self.heads * self.chunk

    def stack(self, x: jax.Array) -> jax.Array:
        """Wide [R, heads * n] -> stacked [heads * R, heads * n]."""
        if self.heads == 1:
            return x
        packed = x.dtype == jnp.bfloat16
        x = _words(x) if packed else x
        head = iota(x.shape, 1) // (x.shape[1] // self.heads)
        parts = [jnp.where(head == h, x, jnp.zeros_like(x)) for h in range(self.heads)]
        return _rows(*(map(_bfloat16, parts) if packed else parts))

    def unstack(self, x: jax.Array) -> jax.Array:
        """The diagonal blocks of [heads * R, heads * n], wide: [R, heads * n]."""
        if self.heads == 1:
            return x
        rows = x.shape[0] // self.heads
        head = iota((rows, x.shape[1]), 1) // (x.shape[1] // self.heads)
        wide = x[:rows]
        for h in range(1, self.heads):
            wide = jnp.where(head == h, x[h * rows : (h + 1) * rows], wide)
        return wide

    def times(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Row and column time of each entry of a wide C x C matrix."""
        return iota(x.shape, 0), iota(x.shape, 1) % self.chunk

    def earlier(self, x: jax.Array, *, strict: bool, transposed: bool = False) -> jax.Array:
        """Keeps entries whose source is earlier than (or, not strict, at) their target.

        Rows are targets, columns sources; the other way round if transposed. A select, never a
        multiplication: what it discards can be huge.
        """
        target, source = self.times(x)[:: -1 if transposed else 1]
        keep = source < target if strict else source <= target
        return jnp.where(keep, x, jnp.zeros_like(x))

    def cumulate(self, x: jax.Array, *, reverse: bool = False) -> jax.Array:
        """Inclusive sum of float32 [C, 128] over rows, from the top or (reverse) from the bottom.

        A product with a triangle of ones. bfloat16 kernels split x into two bfloat16 terms, which
        keeps 17 bits of each summand, and add both in one product of depth 2 C.
        """
        terms = [x]
        if self.dtype != F32:
            high = x.astype(self.dtype)
            terms = [high, (x - high.astype(F32)).astype(self.dtype)]
        shape = (self.chunk, self.chunk * len(terms))
        row, column = iota(shape, 0), iota(shape, 1) % self.chunk
        ones = jnp.where(column >= row if reverse else column <= row, 1.0, 0.0)
        return dot(ones.astype(self.dtype), _rows(*terms))


def _diagonal_inverse(shape: _Shape, ab: jax.Array) -> jax.Array:
    """(I - ab)^-1 of the 8 x 8 diagonal blocks, wide [C, heads * C], zero elsewhere.

    All blocks lie side by side in one row of registers, [8, lanes]. Forward substitution: once row
    j of the inverse is final, its multiple by column j of ab is added to the rows below.
    """
    size, chunk = _DIAGONAL, shape.chunk
    lane = iota((size, shape.wide), 1)
    block = lane % chunk // size
    compact = ab[:size]
    for i in range(1, chunk // size):
        compact = jnp.where(block == i, ab[i * size : (i + 1) * size], compact)
    first = lane // size * size
    columns = [jnp.take_along_axis(compact, first + j, axis=1) for j in range(size - 1)]
    inverse = jnp.where(iota((size, shape.wide), 0) == lane % size, 1.0, 0.0)
    for j, column in enumerate(columns):
        inverse = inverse + column * inverse[j : j + 1]
    parts = [jnp.where(block == i, inverse, 0.0) for i in range(chunk // size)]
    return _rows(*parts).astype(shape.dtype)


def _inverse(shape: _Shape, ab: jax.Array) -> Generator[None, None, jax.Array]:
    """(I - ab)^-1 for a strictly lower ab, wide [C, heads * C], by exact block merging.

    [[P, 0], [M, Q]] with unit lower triangular P, Q (already inverted to p, q) has the inverse
    [[p, 0], [q M p, q]] for I - ab (M from +ab). No powers of ab are formed: those grow
    binomially when keys repeat. Only the lower halves are computed where they are whole registers.
    """
    chunk, dtype = shape.chunk, shape.dtype
    whole_rows = 8 if dtype == F32 else 16
    x = _diagonal_inverse(shape, ab)
    row, column = shape.times(ab)
    size = _DIAGONAL
    while size < chunk:
        merged = (row // (2 * size) == column // (2 * size)) & (row // size != column // size)
        corner = shape.stack(jnp.where(merged, ab, 0.0).astype(dtype))
        starts = range(0, chunk, 2 * size)
        halves = size % whole_rows == 0
        left = _rows(*(x[s + size : s + 2 * size] for s in starts)) if halves else x
        yield
        product = dot(left, corner).astype(dtype)
        right = shape.stack(x)
        yield
        product = dot(product, right)
        if halves:  # the new entries fall where x is zero
            parts = []
            for i, s in enumerate(starts):
                low = x[s + size : s + 2 * size].astype(F32) + product[i * size : (i + 1) * size]
                parts += [x[s : s + size], low.astype(dtype)]
            x = _rows(*parts)
        else:
            x = (x.astype(F32) + product).astype(dtype)
        size *= 2
    return x


class _Carried(NamedTuple):
    """What a chunk of a pack hands to the next one to run: its part of the carried state, stored.
    -1 is before the first chunk."""

    pack: int
    chunk: int


_Stages = Generator[_Carried | None, None, None]
"""An item's work. Each `yield` ends a stage; `yield _Carried(...)` ends one before a stage that
needs that state."""


def _interleave(items: Iterable[_Stages], carried: set[_Carried]) -> None:
    """Runs the stages of all items in turns, one of each item that has what its next stage needs.

    The compiler schedules close to source order. Written pack after pack, each would wait for its
    own chain of dependent products; stage after stage, the packs fill one another's gaps.

    Args:
      items: in the order of their turns, each after those that it needs.
      carried: what has been stored, which items add to.
    """
    waiting: list[tuple[_Stages, _Carried | None]] = [(item, None) for item in items]
    done = object()
    while waiting:
        after = []
        for item, needed in waiting:
            if needed is None or needed in carried:
                needed = next(item, done)
            if needed is not done:
                after.append((item, needed))
        waiting = after


@dataclasses.dataclass(frozen=True)
class _Item:
    """One pack and chunk of a grid step: reads and writes its [C, 128] window of a block."""

    pack: int
    chunk: int
    shape: _Shape

    @property
    def window(self) -> tuple:
        size = self.shape.chunk
        rows = slice(self.chunk * size, (self.chunk + 1) * size)
        return 0, rows, slice(self.pack * LANES, (self.pack + 1) * LANES)

    def get(self, ref) -> jax.Array:
        return ref[self.window]

    def get_f32(self, ref) -> jax.Array:
        return ref[self.window].astype(F32)

    def get_operand(self, ref) -> jax.Array:
        return ref[self.window].astype(self.shape.dtype)

    def put(self, ref, value: jax.Array) -> None:
        ref[self.window] = value.astype(ref.dtype)


@dataclasses.dataclass(frozen=True)
class _Decay:
    """Cumulated decay of a chunk in base-2 logarithms, relative to its middle row."""

    step: jax.Array  # [C, 128] log2 w
    inclusive: jax.Array  # [C, 128] sum up to and with each row
    middle: jax.Array  # [1, 128] the reference: inclusive at the middle row
    last: jax.Array  # [1, 128] inclusive at the last row

    @classmethod
    def of(cls, shape: _Shape, log_w: jax.Array) -> "_Decay":
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


# --------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------


def _forward_kernel(
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref,  # [1, J C, G 128]
    start_ref,  # [1, G, V, 128] state before the first token
    y_ref,  # [1, J C, G 128]
    end_ref,  # [1, G, V, 128] state after the last token
    *refs,  # if residuals: states [1, J, G, V, 128], inverse [1, J, G, C, wide], u [1, J C, G 128]
    shape: _Shape,
    packs: int,
    chunks: int,
    residuals: bool,
):  # fmt: skip
    states_ref, inverse_ref, u_ref = refs[:3] if residuals else (None, None, None)
    state_ref = refs[-1]  # VMEM [G, V, 128]: the state, carried over the grid's last axis
    step = pl.program_id(2)

    carried = {_Carried(pack, -1) for pack in range(packs)}

    @pl.when(step == 0)
    def _():
        state_ref[...] = start_ref[0]

    def solve(item: _Item) -> _Stages:
        size, dtype, pack = shape.chunk, shape.dtype, item.pack
        decay = _Decay.of(shape, item.get_f32(w_ref))
        yield
        a = (item.get_f32(a_ref) * decay.exclusive_scale()).astype(dtype)
        b = (item.get_f32(b_ref) * decay.inverse_scale()).astype(dtype)
        r = (item.get_f32(r_ref) * decay.inclusive_scale()).astype(dtype)
        k = (item.get_f32(k_ref) * decay.inverse_scale()).astype(dtype)
        a_r, b_stack = _rows(a, r), shape.stack(b)
        yield
        product = dot(a_r, b_stack, NT)
        ab = shape.earlier(product[:size], strict=True)
        rb = shape.earlier(product[size:], strict=False).astype(dtype)
        k_stack, v = shape.stack(k), item.get_operand(v_ref)
        yield
        product = dot(a_r, k_stack, NT)
        ak = shape.earlier(product[:size], strict=True)
        rk = shape.earlier(product[size:], strict=False)
        ak_rk, v_stack = _rows(ak, rk).astype(dtype), shape.stack(v)
        yield
        from_v = dot(ak_rk, v_stack)
        x = yield from _inverse(shape, ab)
        if residuals:
            inverse_ref[0, item.chunk, pack] = x
        yield _Carried(pack, item.chunk - 1)
        state = state_ref[pack]
        if residuals:
            states_ref[0, item.chunk, pack] = state
        state = state * decay.state_to_middle()
        z_y = from_v + dot(a_r, shape.stack(state.astype(dtype)), NT)
        z_stack = shape.stack(z_y[:size].astype(dtype))
        yield
        u = dot(x, z_stack).astype(dtype)
        if residuals:
            item.put(u_ref, u)
        u_stack, u_v = shape.stack(u), _rows(u, v)
        yield
        state = state + shape.unstack(dot(u_v, _rows(b, k), TN))
        state_ref[pack] = state * decay.middle_to_end()
        carried.add(_Carried(pack, item.chunk))
        item.put(y_ref, z_y[size:] + dot(rb, u_stack))

    items = (_Item(pack, chunk, shape) for chunk in range(chunks) for pack in range(packs))
    _interleave(map(solve, items), carried)

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
    dr_ref, dw_ref, dk_ref, dv_ref, da_ref, db_ref,  # [1, J C, G 128]
    dstart_ref,  # [1, G, V, 128]
    dstate_ref, next_ref,  # VMEM [G, V, 128]: gradient of, and value of, the state after a step
    *,
    shape: _Shape,
    packs: int,
    chunks: int,
):  # fmt: skip
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dstate_ref[...] = dend_ref[0]
        next_ref[...] = end_ref[0]

    carried: set[_Carried] = set()

    def solve(item: _Item) -> _Stages:
        size, dtype, pack, index = shape.chunk, shape.dtype, item.pack, item.chunk
        decay = _Decay.of(shape, item.get_f32(w_ref))
        yield
        a_scale, r_scale = decay.exclusive_scale(), decay.inclusive_scale()
        inverse_scale = decay.inverse_scale()
        a = (item.get_f32(a_ref) * a_scale).astype(dtype)
        r = (item.get_f32(r_ref) * r_scale).astype(dtype)
        b = (item.get_f32(b_ref) * inverse_scale).astype(dtype)
        k = (item.get_f32(k_ref) * inverse_scale).astype(dtype)
        a_r, b_k = _rows(a, r), _rows(b, k)
        v, u, dy = item.get_operand(v_ref), item.get(u_ref), item.get_operand(dy_ref)
        a_stack, r_stack, dy_stack = shape.stack(a), shape.stack(r), shape.stack(dy)
        yield
        # Rows are sources here: transposed by exchanging the operands, not by moving data.
        product = dot(b_k, r_stack, NT)
        br = shape.earlier(product[:size], strict=False, transposed=True)
        kr = shape.earlier(product[size:], strict=False, transposed=True)
        br_kr = _rows(br, kr).astype(dtype)
        ka = shape.earlier(dot(k, a_stack, NT), strict=True, transposed=True).astype(dtype)
        yield
        du_dv = dot(br_kr, dy_stack)
        if index < chunks - 1:  # the gradient of the state comes from the chunk after this one
            yield _Carried(pack, index + 1)
        dstate = dstate_ref[pack]
        after = next_ref[pack] if index == chunks - 1 else states_ref[0, index + 1, pack]
        dlast = jnp.sum(dstate * after, axis=0, keepdims=True)
        dstate = dstate * decay.middle_to_end()
        dstate_stack = shape.stack(dstate.astype(dtype))
        yield
        du_dv = du_dv + dot(b_k, dstate_stack, NT)
        du = du_dv[:size].astype(dtype)
        yield
        dz = shape.unstack(dot(inverse_ref[0, index, pack], du, TN)).astype(dtype)
        dz_dy, dz_stack = _rows(dz, dy), shape.stack(dz)
        yield
        dstate = dstate + shape.unstack(dot(dz_dy, a_r, TN))
        dstate_ref[pack] = dstate * decay.state_to_middle()
        carried.add(_Carried(pack, index))
        item.put(dv_ref, du_dv[size:] + dot(ka, dz_stack))
        u_stack, v_stack = shape.stack(u), shape.stack(v)
        yield
        product = dot(dz_dy, u_stack, NT)
        dab = shape.earlier(product[:size], strict=True)
        drb = shape.earlier(product[size:], strict=False)
        dab_drb = _rows(dab, drb).astype(dtype)
        yield
        product = dot(dz_dy, v_stack, NT)
        dak = shape.earlier(product[:size], strict=True)
        drk = shape.earlier(product[size:], strict=False)
        dak_drk = _rows(dak, drk).astype(dtype)
        before = states_ref[0, index, pack]
        if index == 0:
            next_ref[pack] = before
        state_stack = shape.stack((before * decay.state_to_middle()).astype(dtype))
        b_stack, k_stack = shape.stack(b), shape.stack(k)
        yield
        da_dr = dot(dz_dy, state_stack) + dot(dab_drb, b_stack)
        yield
        da_dr = da_dr + dot(dak_drk, k_stack)
        da, dr = da_dr[:size] * a_scale, da_dr[size:] * r_scale
        item.put(da_ref, da)
        item.put(dr_ref, dr)
        a_da = item.get_f32(a_ref) * da
        # Gradient of the inclusive log decays; a's, of the exclusive one, is corrected below.
        dlog = item.get_f32(r_ref) * dr + a_da
        yield
        db_dk = dot(_rows(u, v), dstate_stack)
        yield
        from_a_r = _source_gradients(shape, dab_drb, dak_drk, a_r)
        db = (db_dk[:size] + from_a_r[0]) * inverse_scale
        dk = (db_dk[size:] + from_a_r[1]) * inverse_scale
        item.put(db_ref, db)
        item.put(dk_ref, dk)
        dlog = dlog - item.get_f32(b_ref) * db - item.get_f32(k_ref) * dk
        yield
        item.put(dw_ref, shape.cumulate(dlog, reverse=True) - a_da + dlast)

    last_first = reversed(range(chunks))
    items = (_Item(pack, chunk, shape) for chunk in last_first for pack in range(packs))
    _interleave(map(solve, items), carried)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        dstart_ref[0] = dstate_ref[...]


def _source_gradients(
    shape: _Shape, dab_drb: jax.Array, dak_drk: jax.Array, a_r: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both [2 C, wide]^T @ [a; r], wide [C, 128]; one product where it stays register-aligned."""
    if shape.wide % LANES:
        return tuple(shape.unstack(dot(x, a_r, TN)) for x in (dab_drb, dak_drk))
    both = dot(jnp.concatenate([dab_drb, dak_drk], axis=1), a_r, TN)
    return shape.unstack(both[: shape.wide]), shape.unstack(both[shape.wide :])


# --------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------


def _divisors(number: int, limit: int) -> list[int]:
    """Divisors of a number up to a limit of at least 1."""
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Grid and block specs of a call for packed arrays [B, T, P * 128]."""

    batch: int
    time: int  # a multiple of the chunk
    width: int  # P * 128
    shape: _Shape
    tile: TileConfig

    @property
    def all_packs(self) -> int:
        return self.width // LANES

    @property
    def all_chunks(self) -> int:
        return self.time // self.shape.chunk

    @property
    def packs(self) -> int:
        divisors = _divisors(self.all_packs, self.tile.max_packs)
        even = [n for n in divisors if not self.batch * self.all_packs // n % self.tile.cores]
        return max(even or divisors)

    @property
    def chunks(self) -> int:
        return max(_divisors(self.all_chunks, max(1, self.tile.max_items // self.packs)))

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.all_packs // self.packs, self.all_chunks // self.chunks

    def specs(self, *, reverse: bool) -> dict[str, pl.BlockSpec]:
        last = self.grid[2] - 1

        def time(c):
            return last - c if reverse else c

        shape, packs, chunks = self.shape, self.packs, self.chunks
        state = (packs, shape.head, LANES)
        inverse = (packs, shape.chunk, shape.wide)
        return {
            "tokens": pl.BlockSpec(
                (1, chunks * shape.chunk, packs * LANES), lambda i, j, c: (i, time(c), j)
            ),
            "state": pl.BlockSpec((1, *state), lambda i, j, c: (i, j, 0, 0)),
            "states": pl.BlockSpec((1, chunks, *state), lambda i, j, c: (i, time(c), j, 0, 0)),
            "inverse": pl.BlockSpec((1, chunks, *inverse), lambda i, j, c: (i, time(c), j, 0, 0)),
        }

    def shapes(self) -> dict[str, Callable | jax.ShapeDtypeStruct]:
        state = (self.all_packs, self.shape.head, LANES)
        inverse = (self.all_packs, self.shape.chunk, self.shape.wide)
        lead = (self.batch, self.all_chunks)
        tokens = (self.batch, self.time, self.width)
        return {
            "tokens": functools.partial(jax.ShapeDtypeStruct, tokens),
            "state": jax.ShapeDtypeStruct((self.batch, *state), F32),
            "states": jax.ShapeDtypeStruct((*lead, *state), F32),
            "inverse": jax.ShapeDtypeStruct((*lead, *inverse), self.shape.dtype),
        }

    def scratch(self):
        return pltpu.VMEM((self.packs, self.shape.head, LANES), F32)

    def options(self) -> dict:
        return grid_options(self.grid, 2, self.tile.vmem_limit_bytes)

    def cost(self, square: int, mixed: int, arrays: Iterable) -> pl.CostEstimate:
        """Useful work: `square` products C x C x K and `mixed` ones C x K x V a chunk and head."""
        chunk, head = self.shape.chunk, self.shape.head
        heads = self.batch * self.all_chunks * self.width // head
        arrays = list(arrays)
        return pl.CostEstimate(
            flops=heads * 2 * chunk * head * (square * chunk + mixed * head),
            transcendentals=3 * self.batch * self.time * self.width,
            bytes_accessed=sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays),
        )


def _plan(packed: jax.Array, head: int, tile: TileConfig) -> _Plan:
    batch, time, width = packed.shape
    return _Plan(batch, time, width, _Shape(tile.chunk, head, packed.dtype), tile)


def _forward_call(tokens, start, *, head, tile, residuals, interpret):
    """Packed arrays: tokens (r, log_w, k, v, a, b) [B, T, P 128], start [B, P, V, 128]."""
    plan = _plan(tokens[0], head, tile)
    specs, shapes = plan.specs(reverse=False), plan.shapes()
    outputs = {"tokens": shapes["tokens"](tokens[0].dtype), "state": shapes["state"]}
    out_specs = [specs["tokens"], specs["state"]]
    out_shape = list(outputs.values())
    if residuals:
        out_specs += [specs["states"], specs["inverse"], specs["tokens"]]
        out_shape += [shapes["states"], shapes["inverse"], shapes["tokens"](plan.shape.dtype)]
    kernel = functools.partial(
        _forward_kernel,
        shape=plan.shape,
        packs=plan.packs,
        chunks=plan.chunks,
        residuals=residuals,
    )
    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[specs["tokens"]] * 6 + [specs["state"]],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[plan.scratch()],
        **plan.options(),
        cost_estimate=plan.cost(9, 4, [*tokens, start, *out_shape]),
        interpret=interpret,
        name="wkv7_forward",
    )(*tokens, start)


def _backward_call(tokens, saved, dy, dend, *, head, tile, interpret):
    """saved: (states, end, inverse, u) of the forward call, packed as there."""
    plan = _plan(tokens[0], head, tile)
    specs, shapes = plan.specs(reverse=True), plan.shapes()
    out_shape = [shapes["tokens"](F32 if i == 1 else x.dtype) for i, x in enumerate(tokens)]
    out_shape.append(shapes["state"])
    inputs = (*tokens, *saved, dy, dend)
    saved_specs = [specs["states"], specs["state"], specs["inverse"], specs["tokens"]]
    kernel = functools.partial(
        _backward_kernel, shape=plan.shape, packs=plan.packs, chunks=plan.chunks
    )
    return pl.pallas_call(
        kernel,
        grid=plan.grid,
        in_specs=[specs["tokens"]] * 6 + saved_specs + [specs["tokens"], specs["state"]],
        out_specs=[specs["tokens"]] * 6 + [specs["state"]],
        out_shape=out_shape,
        scratch_shapes=[plan.scratch(), plan.scratch()],
        **plan.options(),
        cost_estimate=plan.cost(17, 8, [*inputs, *out_shape]),
        interpret=interpret,
        name="wkv7_backward",
    )(*inputs)


def _pad(x: jax.Array, tile: TileConfig) -> jax.Array:
    """[B, T, H, K] -> [B, T', P * 128]: whole chunks, whole packs; zeros change no state."""
    batch, time, heads, head = x.shape
    more_time, more_heads = -time % tile.chunk, -heads % (LANES // head)
    if more_time or more_heads:
        x = jnp.pad(x, ((0, 0), (0, more_time), (0, more_heads), (0, 0)))
    return x.reshape(batch, time + more_time, (heads + more_heads) * head)


def _crop(x: jax.Array, like: tuple[int, ...]) -> jax.Array:
    batch, time, heads, head = like
    return x.reshape(batch, x.shape[1], x.shape[2] // head, head)[:, :time, :heads]


def _pack_state(state: jax.Array) -> jax.Array:
    """[B, H, V, K] -> [B, P, V, 128]: the heads of a pack side by side in lanes."""
    batch, heads, value, key = state.shape
    each = LANES // key
    if heads % each:
        state = jnp.pad(state, ((0, 0), (0, -heads % each), (0, 0), (0, 0)))
    state = state.reshape(batch, -1, each, value, key).swapaxes(2, 3)
    return state.reshape(batch, -1, value, LANES)


def _unpack_state(packed: jax.Array, heads: int) -> jax.Array:
    batch, packs, value, _ = packed.shape
    state = packed.reshape(batch, packs, value, -1, value).swapaxes(2, 3)
    return state.reshape(batch, -1, value, value)[:, :heads]


def _check(r, log_w, k, v, a, b, state, tile) -> None:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _wkv7(r, log_w, k, v, a, b, state, tile, interpret):
    tokens = tuple(_pad(x, tile) for x in (r, log_w, k, v, a, b))
    y, end = _forward_call(
        tokens,
        _pack_state(state),
        head=r.shape[-1],
        tile=tile,
        residuals=False,
        interpret=interpret,
    )
    return _crop(y, r.shape), _unpack_state(end, r.shape[2])


def _wkv7_forward(r, log_w, k, v, a, b, state, tile, interpret):
    inputs = (r, log_w, k, v, a, b)
    y, end, states, inverse, u = _forward_call(
        tuple(_pad(x, tile) for x in inputs),
        _pack_state(state),
        head=r.shape[-1],
        tile=tile,
        residuals=True,
        interpret=interpret,
    )
    outputs = _crop(y, r.shape), _unpack_state(end, r.shape[2])
    return outputs, (inputs, (states, end, inverse, u))


def _wkv7_backward(tile, interpret, residuals, cotangents):
    inputs, saved = residuals
    dy, dend = cotangents
    r = inputs[0]
    *grads, dstart = _backward_call(
        tuple(_pad(x, tile) for x in inputs),
        saved,
        _pad(dy, tile),
        _pack_state(dend),
        head=r.shape[-1],
        tile=tile,
        interpret=interpret,
    )
    return (*(_crop(g, r.shape) for g in grads), _unpack_state(dstart, r.shape[2]))


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
      tile: see `TileConfig`; default: `default_tile()`.
      interpret: True or `pltpu.InterpretParams` to run on a CPU, for tests.

    Returns:
      y [B, T, H, V] in r's dtype, and the final state [B, H, V, K] in float32.

    Raises:
      ValueError: unsupported head size or dtype, or shapes that disagree.
    """
    tile = default_tile() if tile is None else tile
    _check(r, log_w, k, v, a, b, state, tile)
    if any(x.dtype != r.dtype for x in (k, v, a, b)):
        found = {name: str(x.dtype) for name, x in zip("rkvab", (r, k, v, a, b), strict=True)}
        raise ValueError(f"wkv7 on TPU: r, k, v, a, b must share a dtype, got {found}")
    if state is None:
        batch, _, heads, head = r.shape
        state = jnp.zeros((batch, heads, head, head), F32)
    return _wkv7(r, log_w.astype(F32), k, v, a, b, state.astype(F32), tile, interpret)

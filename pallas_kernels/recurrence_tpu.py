"""What the chunked recurrences on a TPU share: packs of heads, their forms, the inverse, the grid.

Arrays keep the layout the projections produce, [B, T, H * K], so that small heads share the 128
lanes of a vector register (a "pack"). Two forms of an operand of n heads appear below:

* wide: [rows, n * columns], the heads side by side in lanes. Left operands and results.
* stacked: [n * rows, n * columns], block diagonal, made from the wide form by masking lanes. Right
  operands. wide @ stacked is wide again, so only right operands pay for the zeros.

Sizes, from the smallest:

* head: K key and V value channels; pack: as many heads as fill whole registers of 128 lanes.
* chunk: C tokens, solved at once; item: one pack and one chunk.
* block: what a grid step reads and writes of an array, J chunks of G packs.
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

from pallas_kernels.common import F32, LANES, current_chip, dot, grid_options, iota

_DIAGONAL = 8  # size of the diagonal blocks inverted on the vector unit: one register of sublanes


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How much one grid step takes on.

    Attributes:
      chunk: tokens solved at once, C: 16, 32, 64 or 128. The C x C matrices of a pack's n heads
        share 128 lanes where they are inverted: n C is at most 128 there.
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


# --------------------------------------------------------------------------------------------
# Inside a kernel: forms, masks, the inverse
# --------------------------------------------------------------------------------------------


def rows(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=0)


def _words(x: jax.Array) -> jax.Array:
    """bfloat16 [R, n] seen as int32 [R / 2, n]: masks cost half as much on packed words."""
    return pltpu.bitcast(x, jnp.int32)


def _bfloat16(words: jax.Array) -> jax.Array:
    return pltpu.bitcast(words, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a kernel: C, K, V, heads a pack, and the dtype products run in."""

    chunk: int
    key: int
    value: int
    heads: int
    dtype: jnp.dtype

    @property
    def keys(self) -> int:
        """Lanes of a pack's keys."""
        return self.heads * self.key

    @property
    def values(self) -> int:
        """Lanes of a pack's values."""
        return self.heads * self.value

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
        return rows(*(map(_bfloat16, parts) if packed else parts))

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

    def earlier(
        self, x: jax.Array, *, strict: bool, transposed: bool = False, limit=None
    ) -> jax.Array:
        """Keeps entries whose source is earlier than (or, not strict, at) their target.

        Rows are targets, columns sources; the other way round if transposed. A select, never a
        multiplication: what it discards can be huge. `limit` [1, wide], if given: the last target
        that reads each column's source; if transposed, the first source that its target reads.
        """
        target, source = self.times(x)[:: -1 if transposed else 1]
        keep = source < target if strict else source <= target
        if limit is not None:
            keep &= source >= limit if transposed else target <= limit
        return jnp.where(keep, x, jnp.zeros_like(x))

    def terms(self, x: jax.Array) -> list[jax.Array]:
        """float32 values as operands: itself, or two bfloat16 terms that keep 17 bits of them."""
        if self.dtype == F32:
            return [x]
        high = x.astype(self.dtype)
        return [high, (x - high.astype(F32)).astype(self.dtype)]

    def cumulate(self, x: jax.Array, *, reverse: bool = False, first=None) -> jax.Array:
        """Inclusive sum of float32 [C, lanes] over rows, from the top or (reverse) from the bottom.

        `first`, if given, for each row (and lane, twice): the first row whose sum it is part of.
        A product with a triangle of ones, of depth 2 C where x is cut into two terms.
        """
        terms = self.terms(x)
        shape = (self.chunk, self.chunk * len(terms))
        row, column = iota(shape, 0), iota(shape, 1) % self.chunk
        counts = column >= row if reverse else column <= row
        if first is not None:
            counts &= row >= first[:, : shape[1]]
        ones = jnp.where(counts, 1.0, 0.0)
        return dot(ones.astype(self.dtype), rows(*terms))


def _diagonal_inverse(shape: Shape, ab: jax.Array) -> jax.Array:
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
    return rows(*parts).astype(shape.dtype)


def inverse(shape: Shape, ab: jax.Array) -> Generator[None, None, jax.Array]:
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
        left = rows(*(x[s + size : s + 2 * size] for s in starts)) if halves else x
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
            x = rows(*parts)
        else:
            x = (x.astype(F32) + product).astype(dtype)
        size *= 2
    return x


class Carried(NamedTuple):
    """What a chunk of a pack hands to the next one to run: its part of the carried state, stored.
    -1 is before the first chunk."""

    pack: int
    chunk: int


Stages = Generator[Carried | None, None, None]
"""An item's work. Each `yield` ends a stage; `yield Carried(...)` ends one before a stage that
needs that state."""


def interleave(items: Iterable[Stages], carried: set[Carried]) -> None:
    """Runs the stages of all items in turns, one of each item that has what its next stage needs.

    The compiler schedules close to source order. Written pack after pack, each would wait for its
    own chain of dependent products; stage after stage, the packs fill one another's gaps.

    Args:
      items: in the order of their turns, each after those that it needs.
      carried: what has been stored, which items add to.
    """
    waiting: list[tuple[Stages, Carried | None]] = [(item, None) for item in items]
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
class Item:
    """One pack and chunk of a grid step: reads and writes its [C, lanes] window of a block."""

    pack: int
    chunk: int
    shape: Shape
    packs: int  # of the grid step

    @property
    def tokens(self) -> slice:
        return slice(self.chunk * self.shape.chunk, (self.chunk + 1) * self.shape.chunk)

    def window(self, ref) -> tuple:
        lanes = ref.shape[-1] // self.packs
        return 0, self.tokens, slice(self.pack * lanes, (self.pack + 1) * lanes)

    def get(self, ref) -> jax.Array:
        return ref[self.window(ref)]

    def get_f32(self, ref) -> jax.Array:
        return self.get(ref).astype(F32)

    def get_operand(self, ref) -> jax.Array:
        return self.get(ref).astype(self.shape.dtype)

    def put(self, ref, value: jax.Array) -> None:
        ref[self.window(ref)] = value.astype(ref.dtype)


# --------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------


def divisors(number: int, limit: int) -> list[int]:
    """Divisors of a number up to a limit of at least 1."""
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Grid and block specs of a call for arrays [B, T, P * lanes of a pack]."""

    batch: int
    time: int  # a multiple of the chunk
    all_packs: int  # P
    shape: Shape
    tile: TileConfig

    @property
    def all_chunks(self) -> int:
        return self.time // self.shape.chunk

    @property
    def _registers(self) -> int:
        """Registers side by side in a pack."""
        return max(self.shape.keys, self.shape.values) // LANES

    @property
    def packs(self) -> int:
        limit = max(1, self.tile.max_packs // self._registers)
        numbers = divisors(self.all_packs, limit)
        even = [n for n in numbers if not self.batch * self.all_packs // n % self.tile.cores]
        return max(even or numbers)

    @property
    def chunks(self) -> int:
        limit = self.tile.max_items // (self.packs * self._registers)
        return max(divisors(self.all_chunks, max(1, limit)))

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.all_packs // self.packs, self.all_chunks // self.chunks

    @property
    def _state(self) -> tuple[int, int]:
        return self.shape.value, self.shape.keys

    @property
    def _inverse(self) -> tuple[int, int]:
        return self.shape.chunk, self.shape.wide

    def specs(self, *, reverse: bool) -> dict[str, pl.BlockSpec]:
        last = self.grid[2] - 1

        def time(c):
            return last - c if reverse else c

        def tokens(lanes):
            return pl.BlockSpec(
                (1, chunks * self.shape.chunk, packs * lanes), lambda i, j, c: (i, time(c), j)
            )

        packs, chunks = self.packs, self.chunks
        state, inverse = (packs, *self._state), (packs, *self._inverse)
        return {
            "keys": tokens(self.shape.keys),
            "values": tokens(self.shape.values),
            "state": pl.BlockSpec((1, *state), lambda i, j, c: (i, j, 0, 0)),
            "states": pl.BlockSpec((1, chunks, *state), lambda i, j, c: (i, time(c), j, 0, 0)),
            "inverse": pl.BlockSpec((1, chunks, *inverse), lambda i, j, c: (i, time(c), j, 0, 0)),
        }

    def shapes(self) -> dict[str, Callable | jax.ShapeDtypeStruct]:
        lead = (self.batch, self.all_chunks, self.all_packs)
        shape, tokens = self.shape, (self.batch, self.time)
        struct = jax.ShapeDtypeStruct
        return {
            "keys": functools.partial(struct, (*tokens, self.all_packs * shape.keys)),
            "values": functools.partial(struct, (*tokens, self.all_packs * shape.values)),
            "state": struct((self.batch, self.all_packs, *self._state), F32),
            "states": struct((*lead, *self._state), F32),
            "inverse": struct((*lead, *self._inverse), shape.dtype),
        }

    def scratch(self):
        return pltpu.VMEM((self.packs, *self._state), F32)

    def options(self) -> dict:
        return grid_options(self.grid, 2, self.tile.vmem_limit_bytes)

    def cost(self, flops_of_chunk: int, exponentials: int, arrays: Iterable) -> pl.CostEstimate:
        """Useful work, of which `flops_of_chunk` are those of a chunk and head, and
        `exponentials` those of a token and key channel."""
        arrays = list(arrays)
        packs = self.batch * self.all_packs
        return pl.CostEstimate(
            flops=packs * self.all_chunks * self.shape.heads * flops_of_chunk,
            transcendentals=exponentials * packs * self.time * self.shape.keys,
            bytes_accessed=sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays),
        )


def pad(x: jax.Array, chunk: int, each: int) -> jax.Array:
    """[B, T, H, K] -> [B, T', H' * K]: whole chunks, packs of `each`; zeros change no state."""
    batch, time, heads, head = x.shape
    more_time, more_heads = -time % chunk, -heads % each
    if more_time or more_heads:
        x = jnp.pad(x, ((0, 0), (0, more_time), (0, more_heads), (0, 0)))
    return x.reshape(batch, time + more_time, (heads + more_heads) * head)


def crop(x: jax.Array, like: tuple[int, ...]) -> jax.Array:
    """Undoes `pad` of an array of shape `like`."""
    batch, time, heads, head = like
    return x.reshape(batch, x.shape[1], x.shape[2] // head, head)[:, :time, :heads]


def pack_state(state: jax.Array, each: int) -> jax.Array:
    """[B, H, V, K] -> [B, P, V, each * K]: the heads of a pack side by side in lanes."""
    batch, heads, value, key = state.shape
    if heads % each:
        state = jnp.pad(state, ((0, 0), (0, -heads % each), (0, 0), (0, 0)))
    state = state.reshape(batch, -1, each, value, key).swapaxes(2, 3)
    return state.reshape(batch, -1, value, each * key)


def unpack_state(packed: jax.Array, heads: int, each: int) -> jax.Array:
    """Undoes `pack_state`."""
    batch, packs, value, lanes = packed.shape
    state = packed.reshape(batch, packs, value, each, lanes // each).swapaxes(2, 3)
    return state.reshape(batch, -1, value, lanes // each)[:, :heads]

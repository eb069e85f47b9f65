"""Top-k chunk sparse attention for TPU: forward and one-pass backward as Pallas kernels.

Each query attends causally to its own chunk and to the past chunks selected for it. Queries that
share a chunk lie anywhere, so the past part is chunk-major: `routing` sorts the pairs by chunk and
cuts them into tiles, and a tile's queries meet its chunk's keys in full matrix products. What makes
this cheap is that nothing is gathered or scattered in HBM: a segment of queries lies in VMEM as
float32 rows (one row of 128 lanes is one vector load), beside a row of running results a query:

* forward: [accumulated values | sum | maximum] of an online softmax. A tile gathers its rows,
  attends, and scatters them back; merging the chunks of a query costs no pass of its own.
* backward: [dQ | log-sum-exp | delta]. dQ adds up in place; dK and dV add up in VMEM over the tiles
  of a chunk.

A second kernel then does the own chunk, a causal pass over the diagonal that starts from those rows
and writes the final results. Arrays keep the layout of the projections, [B, T, H * K]: two heads of
size 64 share the 128 lanes of a "pack". A product over all 128 lanes costs the matrix unit no more
than one over 64; masking the lanes of the other head out of the queries separates the two.

Query heads that share a key head also share a choice of chunks: a group. The queries of a token and
group are neighbouring rows, [B, T * M, G * K], so that one number finds all of them, a vector load
brings up to 8, and the rows of a tile meet one block of keys. Everything else sees more rows.

Packed documents take no row of numbers beside the queries. Whoever chose a past chunk is of the
document that the chunk ends with, so the keys that may be read begin at one place for all of them:
the table of tiles has it where it otherwise has the chunk. In the own chunk a key is seen up to the
last token of its document (and chunk): one more comparison, with a row of numbers beside the keys.

Sizes beside those of `common`:

* group: M query heads of a key head; a token has M rows.

* segment: the tokens whose rows lie in VMEM at once; its rows stand at 8 and after, as `_gather`
  reads up to 7 rows before one.
* tile (past part): pairs of one chunk, as many as make `rows` or `shared_rows`. A step takes one
  tile, or `together` tiles of chunks that are `joined`.
* block (past part): the keys of a step, of `joined` chunks.
* square (own part): queries and keys of whole chunks up to `diagonal`, or of one chunk. Its cells
  of `side` rows and columns, those on and below the diagonal, are steps.
* piece: `keys` keys of a chunk, met at once.
* strip: rows of a tile that go through a past kernel's stages together, beside other strips that
  are at other stages.
* part: 128 lanes of a query's row of results; with heads of 64 there is one, else two.

docs/kernels.md states the costs and what else was tried.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import alignment, routing
from pallas_kernels.common import (
    F32,
    LANES,
    LOG2_E,
    NT,
    SCALAR_WORDS,
    SUBLANES,
    TN,
    current_chip,
    dot,
    grid_options,
    iota,
)

_NO_SCORE = -1e30  # finite, so that differences of it are numbers
_DONE = object()
_SQUARE_ROWS = (
    8192  # rows of a square of the own part whose results and gradients VMEM has room for
)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How much a grid step takes on.

    Attributes:
      rows: rows of a tile of the past part, a multiple of 128.
      shared_rows: the same where query heads share a key head; gathering these takes less.
      keys: keys met at once, in the past part; divides no chunk in particular.
      joined: keys of a block of small chunks whose tiles share grid steps.
      together: tiles a grid step takes where chunks are joined; divides 8.
      diagonal: largest number of rows and of columns of a cell of the own chunk.
      segment_bytes: VMEM for the rows of a segment of queries and their results.
      vmem_limit_bytes: VMEM the compiler may use.
      cores: cores that share the packs of a call: 2 on v5p, whose chips are one device.
    """

    rows: int = 256
    shared_rows: int = 512
    keys: int = 512
    joined: int = 2048
    together: int = 4
    diagonal: int = 512
    segment_bytes: int = 34 * 1024 * 1024
    vmem_limit_bytes: int = 60 * 1024 * 1024
    cores: int = 1

    def __post_init__(self):
        for name in ("rows", "shared_rows", "keys", "joined", "diagonal"):
            value = getattr(self, name)
            if value < LANES or value % LANES:
                raise ValueError(f"{name} must be a positive multiple of {LANES}, got {value}")
        if self.together not in (1, 2, 4, 8):
            raise ValueError(f"together must be 1, 2, 4 or 8, got {self.together}")
        if self.cores < 1:
            raise ValueError(f"cores must be at least 1, got {self.cores}")
        if not 0 < self.segment_bytes <= self.vmem_limit_bytes:
            raise ValueError(
                f"segment_bytes must be positive and at most vmem_limit_bytes "
                f"({self.vmem_limit_bytes}), got {self.segment_bytes}"
            )


_LARGE = TileConfig(segment_bytes=68 * 1024 * 1024, vmem_limit_bytes=100 * 1024 * 1024)
TILES = {"v5e": _LARGE, "v5p": TileConfig(cores=2), "v6e": _LARGE}  # a v5p core has half the VMEM


def default_tile() -> TileConfig:
    """The tile for the device of the mesh in force, else of the default backend."""
    return TILES.get(current_chip(), TILES["v5p"])


def unsupported_reason(
    q: jax.Array,  # [B, Tq, H, K]
    k: jax.Array,  # [B, Tk, G, K]
    v: jax.Array,  # [B, Tk, G, V]
    slots: int,
    chunk_size: int,
    q_offset=0,
    tile: TileConfig | None = None,
) -> str | None:
    """Why these kernels cannot take such inputs, of which only shapes and dtypes matter.

    Args:
      q, k, v, chunk_size, q_offset, tile: as in `block_sparse_attention`.
      slots: chunks a query chooses.

    Returns:
      A clause that says why, or None if they can.
    """
    tile = default_tile() if tile is None else tile
    reason = alignment.unsupported_reason(q.shape[3], v.shape[3], chunk_size, q.dtype)
    reason = reason or _cell_problem(chunk_size, tile)
    reason = reason or _group_problem(q.shape[2] // k.shape[2], chunk_size, tile)
    return reason or _plan_of(q, k, slots, chunk_size, 1.0, q_offset, tile).problem


def _cell_problem(chunk_size: int, tile: TileConfig) -> str | None:
    """Why the own chunk cannot be cut into cells; None if it can. The log-sum-exp of a cell lies
    along lanes, of which a block has a multiple of 128."""
    square = chunk_size * max(1, tile.diagonal // chunk_size)
    if square % LANES:
        return (
            f"{square} tokens of the own chunk (chunk size {chunk_size}) are not a multiple of "
            f"{LANES}: take 32, 64 or a multiple of {LANES}"
        )
    return None


def _group_problem(group: int, chunk_size: int, tile: TileConfig) -> str | None:
    """Why query heads cannot share a key head in groups of that size; None if they can."""
    largest = tile.shared_rows // SUBLANES
    if group.bit_count() != 1 or group > largest:
        return f"{group} query heads share a key head and {largest} and smaller powers of two can"
    square = chunk_size * max(1, tile.diagonal // chunk_size)
    if group > 1 and group * square > _SQUARE_ROWS:
        return (
            f"{group} query heads share a key head in chunks of {chunk_size}, and {square} tokens "
            f"at once may have {_SQUARE_ROWS} queries"
        )
    return None


# --------------------------------------------------------------------------------------------
# Inside a kernel
# --------------------------------------------------------------------------------------------


def _lane(shape: tuple[int, ...]) -> jax.Array:
    return iota(shape, len(shape) - 1)


def _lanes(number: int) -> slice:
    """A register's lanes of an array that is several registers wide."""
    return slice(number * LANES, (number + 1) * LANES)


def _column(x: jax.Array, lane) -> jax.Array:
    """Lane number `lane` of x [R, 128], as [R, 1]."""
    return jnp.sum(jnp.where(_lane(x.shape) == lane, x, 0.0), axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of the kernels.

    Attributes:
      head: head size, 64 or 128.
      dtype: of q, k, v; decides the precision of products.
      chunk: tokens in a chunk.
      scale: factor on q . k.
      group: rows of a token, the query heads of a key head.
      documents: whether documents are packed.
    """

    head: int
    dtype: jnp.dtype
    chunk: int
    scale: float
    group: int = 1
    documents: bool = False

    @property
    def heads(self) -> int:
        """Heads of a pack."""
        return LANES // self.head

    @property
    def parts(self) -> int:
        """128-lane rows that hold a query's running results."""
        return 1 if self.heads > 1 else 2

    @property
    def packed(self) -> bool:
        """Whether a query lies in the spare lanes of its row of results, as 32 words."""
        return self.heads > 1 and self.dtype == jnp.bfloat16

    @property
    def halved(self) -> bool:
        """Whether queries meet keys by halves, in two products: where rows are many and keys few,
        moving queries within their rows would take longer."""
        return self.packed and self.group > 1 and self.chunk <= LANES

    @property
    def gathered(self) -> int:
        """Arrays of queries that the forward gathers beside the rows of results."""
        return 0 if self.packed else 1

    @property
    def unit(self) -> int:
        """See `_TileWord`."""
        return self.chunk if self.documents else 1

    @property
    def after(self) -> int:
        """Rows of VMEM behind those of a segment, which rows without a query point to."""
        return max(SUBLANES, self.group)

    @property
    def log2_scale(self) -> float:
        """Turns q . k into exponents of 2."""
        return self.scale * LOG2_E

    def square(self, limit: int) -> int:
        """Rows the diagonal is cut into: whole chunks, as many as fit the limit, at least one."""
        return self.chunk * max(1, limit // self.chunk)

    def block(self, tile: TileConfig) -> int:
        """Keys of the chunks joined in the past part: whole squares."""
        square = self.square(tile.diagonal)
        return square * max(1, tile.joined // square) if square > self.chunk else self.chunk

    def side(self, limit: int) -> int:
        """Rows (and columns) of a cell; divides `square`."""
        square = self.square(limit)
        if square <= limit:
            return square
        return max(x for x in range(LANES, limit + 1, LANES) if square % x == 0)

    def stat_lane(self, head):
        """First of the lanes that hold a query's statistics, in the last part of its row."""
        return (1 - head) * self.head if self.heads > 1 else 0

    def in_query(self, lane: jax.Array, head) -> jax.Array:
        """Which lanes of a row of results hold the query: the last quarter beside the values."""
        return lane // (self.head // 2) == 2 * (1 - head) + 1

    def own(self, x: jax.Array, head) -> jax.Array:
        """x [R, 128] float32 with the lanes of the pack's other head cleared."""
        if self.heads == 1:
            return x
        return jnp.where(_lane(x.shape) // self.head == head, x, 0.0)

    def values_and_ones(self, v: jax.Array, head) -> jax.Array:
        """Values [R, 128] of one head with a column of ones where the sum is kept, so that the
        product with the weights also sums them."""
        if self.heads == 1:
            return v
        packed = self.dtype == jnp.bfloat16
        words = pltpu.bitcast(v, jnp.int32)  # masks cost half as much on packed pairs of rows
        one = 0x3F803F80 if packed else 0x3F800000
        lane = _lane(words.shape)
        words = jnp.where(lane // self.head == head, words, 0)
        words = jnp.where(lane == self.stat_lane(head), one, words)
        return pltpu.bitcast(words, self.dtype)


def _pieces(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _numbers(rows_ref, start) -> list:
    """Row numbers of the 8 tokens from place `start` of a step's tiles.

    A view a group of 8 keeps offsets within it in registers; an offset of its own for each row
    would cost one more scalar instruction a row.
    """
    view = rows_ref.at[0, 0, 0, pl.ds(pl.multiple_of(start, SUBLANES), SUBLANES)]
    return [view[r] for r in range(SUBLANES)]


def _windows(numbers: list, group: int) -> list[list]:
    """Where the rows of 8 tokens stand: for each register of rows, 8-row windows that bring its
    tokens to their sublanes, one after the other.

    A token's rows stand at 8 + its number. A window that begins r rows earlier has them at sublane
    r; groups of 8 and more fill registers by themselves.
    """
    tokens, registers = max(1, SUBLANES // group), max(1, group // SUBLANES)
    windows = []
    for start in range(0, SUBLANES, tokens):
        for part in range(registers):
            places = [numbers[start + i] + SUBLANES * (1 + part) - i * group for i in range(tokens)]
            if group >= SUBLANES:
                places = [pl.multiple_of(x, SUBLANES) for x in places]
            windows.append([pl.ds(x, SUBLANES) for x in places])
    return windows


def _gather(rows_ref, start, tokens: int, sources, group: int) -> list[jax.Array]:
    """Rows of VMEM: for each source [8 + S * group + 8, 128] those of `tokens` tokens from place
    `start` of a step's tiles, [tokens * group, 128], float32.

    A load of 8 rows that begins r rows earlier brings a row to sublane r, where a select puts it in
    place: one load and one select a token and up to 8 rows, no store.
    """
    place = iota((SUBLANES, LANES), 0) // group
    found = [[] for _ in sources]
    for first in range(0, tokens, SUBLANES):
        windows = _windows(_numbers(rows_ref, start + first), group)
        for source, pieces in zip(sources, found, strict=True):
            for register in windows:
                x = source[register[0], :]
                for r, window in enumerate(register[1:], 1):
                    x = jnp.where(place == r, source[window, :], x)
                pieces.append(x)
    return [jnp.concatenate(pieces, axis=0) for pieces in found]


def _scatter(rows_ref, start, pairs, group: int, zero, lanes=True) -> None:
    """The reverse of `_gather`.

    Args:
      pairs: for each array of results (rows [tokens * group, 128], target as in `_gather`).
      zero: a scalar that is 0 but not to the compiler. Without it, the compiler would keep all the
        numbers it read to gather, for which there are not enough registers.
      lanes: bool [8, 128], the lanes to write.
    """
    place = iota((SUBLANES, LANES), 0) // group
    masks = [(place == r) & lanes for r in range(max(1, SUBLANES // group))]
    tokens = pairs[0][0].shape[0] // group
    for first in range(0, tokens, SUBLANES):
        windows = _windows(_numbers(rows_ref, zero + start + first), group)
        for source, target in pairs:
            for i, register in enumerate(windows):
                row = first * group + i * SUBLANES
                x = source[row : row + SUBLANES]
                for window, mask in zip(register, masks, strict=True):
                    pltpu.store(target.at[window, :], x, mask=mask)


def _strip_by_strip(stages, tile, tokens: int, rows: int, group: int) -> None:
    """Runs the stages of a tile's strips, each strip a stage behind the one before it.

    The compiler schedules close to source order: stages of different strips that are neighbours
    there share bundles, as they use different units.

    Args:
      stages: of a strip, a generator for the place of its first token and the number of its tokens.
      tile: number of the step's tile.
      tokens: that a tile has.
      rows: rows of a strip; a strip has at least 8 tokens.
      group: rows of a token.
    """
    strip = min(max(SUBLANES, rows // group), tokens)
    waiting = [stages(tile * tokens + first, strip) for first in range(0, tokens, strip)]
    running: list[Iterator] = []
    while waiting or running:
        running[:0], waiting = waiting[:1], waiting[1:]
        running = [one for one in running if next(one, _DONE) is not _DONE]


def _copy(*pairs_and_sems) -> None:
    """Runs DMAs side by side and waits for all."""
    copies = [pltpu.make_async_copy(*x) for x in pairs_and_sems]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


class _TileWord(NamedTuple):
    """An entry of the table of tiles: the tile's chunk, and whether it has rows.

    Where documents are packed, the word has the first key of the chunk that its rows may read.
    """

    word: jax.Array
    unit: int  # numbers that a chunk takes: 1, or its keys where documents are packed

    @classmethod
    def of(cls, number: jax.Array, count: jax.Array, unit: int) -> "_TileWord":
        """Of a tile with `count` rows; number: its chunk, or the first key that they may read."""
        return cls(2 * number + (count > 0), unit)

    @property
    def chunk(self) -> jax.Array:
        return lax.div(self.word, 2 * self.unit)

    @property
    def first_key(self) -> jax.Array | None:
        """The first key that rows may read, counted in the chunk; None for all keys."""
        return None if self.unit == 1 else lax.rem(lax.div(self.word, 2), self.unit)

    @property
    def used(self) -> jax.Array:
        return self.word & 1 == 1

    def block(self, joined: int) -> jax.Array:
        """The block of keys that the chunk lies in."""
        return lax.div(self.word, 2 * self.unit * joined)


class _StepWord(NamedTuple):
    """An entry of the table of steps: the segment, and whether this is its first or last step."""

    word: jax.Array | int

    @classmethod
    def of(cls, segment: int, first: bool, last: bool) -> "_StepWord":
        return cls(4 * segment + 2 * last + first)

    @property
    def segment(self):
        return lax.div(self.word, 4)

    @property
    def first(self):
        return self.word & 1 == 1

    @property
    def last(self):
        return self.word & 2 == 2


@dataclasses.dataclass(frozen=True)
class _Step:
    """Where a grid step of a past kernel stands; scalars."""

    group: jax.Array  # of this call's packs
    number: jax.Array  # of the group's and head's steps
    pack: jax.Array
    head: jax.Array
    segment: jax.Array
    block: jax.Array  # of keys
    used: jax.Array  # whether any tile has rows
    first_of_segment: jax.Array
    last_of_segment: jax.Array
    first_of_block: jax.Array  # first step of a run with one block; runs end with their segment
    last_of_block: jax.Array
    zero: jax.Array  # 0, see `_scatter`

    @classmethod
    def read(cls, table_ref, segments_ref, first_ref, unit: int, routes: routing.Plan):
        """Reads the scalar tables.

        Args:
          table_ref: SMEM [groups, heads, tiles], each a `_TileWord`.
          segments_ref: SMEM [steps], each a `_StepWord`.
          first_ref: SMEM [1]: number of the first pack of this call.
          unit: of the words of tiles.
          routes: says how many tiles a step takes.
        """
        joined, together = routes.joined, routes.together
        group, head, number = (pl.program_id(axis) for axis in range(3))
        first_tile = lambda step: _TileWord(table_ref[group, head, step * together], unit)
        place, block = _StepWord(segments_ref[number]), first_tile(number).block(joined)
        before = first_tile(jnp.maximum(number - 1, 0)).block(joined)
        after = first_tile(jnp.minimum(number + 1, pl.num_programs(2) - 1)).block(joined)
        first, last = place.first, place.last
        return cls(
            group=group,
            number=number,
            pack=first_ref[0] + group,
            head=head,
            segment=place.segment,
            block=block,
            used=first_tile(number).used,
            first_of_segment=first,
            last_of_segment=last,
            first_of_block=first | (before != block),
            last_of_block=last | (after != block),
            zero=jnp.minimum(place.word, 0),
        )


def _each_tile(table_ref, step: _Step, shape: _Shape, routes: routing.Plan, function) -> None:
    """Calls function(number, first row of its chunk in the block of keys, first key to read) for
    each of its tiles; see `_TileWord.first_key`."""

    def one(number, carry=0):
        first = first_key = 0
        if routes.joined > 1 or shape.documents:
            place = step.number * routes.together + number
            tile = _TileWord(table_ref[step.group, step.head, place], shape.unit)
            first_key = tile.first_key
        if routes.joined > 1:
            before = tile.chunk - step.block * routes.joined  # chunks of the block before it
            first = pl.multiple_of(before * shape.chunk, math.gcd(shape.chunk, 64))
        function(number, first, first_key if shape.documents else None)
        return carry

    if routes.together == 1:
        one(0)
    else:
        lax.fori_loop(0, routes.together, one, 0)


def _readable(first_key, piece: slice, rows: int) -> jax.Array:
    """Which keys of a piece of a chunk the rows of a tile may read, [rows, keys of the piece]."""
    return iota((rows, piece.stop - piece.start), 1) >= first_key - piece.start


def _rows_of(segment, size: int):
    return pl.ds(pl.multiple_of(segment * size, SUBLANES), size)


# --------------------------------------------------------------------------------------------
# Past chunks, forward
# --------------------------------------------------------------------------------------------


def _start_kernel(
    q_ref,  # [1, rows, 128] bfloat16
    results_ref,  # [1, heads, 1, rows, 128] float32
    *,
    shape: _Shape,
):
    """Rows of results before any chunk, with the queries in their spare lanes.

    A word holds elements i (lower half) and 32 + i (upper half) of a query.
    """
    words = pltpu.bitcast(q_ref[0].astype(F32), jnp.int32)  # its upper half is the element
    half, quarter = shape.head, shape.head // 2
    pairs = pltpu.roll(words, half, 1) | lax.shift_right_logical(
        pltpu.roll(words, half + quarter, 1), 16
    )
    lane = _lane(words.shape)
    for h in range(shape.heads):
        row = jnp.where(lane == shape.stat_lane(h) + 1, _NO_SCORE, 0.0)
        row = jnp.where(shape.in_query(lane, h), pairs, pltpu.bitcast(row, jnp.int32))
        results_ref[0, h, 0] = pltpu.bitcast(row, F32)


def _query(row: jax.Array, shape: _Shape, head) -> list[jax.Array]:
    """The queries [R, 128] in rows of results, zeros beside them: in the lanes of their head or,
    where they are `halved`, the upper and lower halves, each in the lanes of the words."""
    row = jnp.where(shape.in_query(_lane(row.shape), head), row, 0.0)
    words = pltpu.bitcast(row, jnp.int32)
    halves = words & jnp.int32(-65536), lax.shift_left(words, 16)
    upper, lower = (pltpu.bitcast(x, F32).astype(shape.dtype) for x in halves)
    if shape.halved:
        return [upper, lower]
    move = lambda x, lanes: pltpu.roll(pltpu.bitcast(x, jnp.int32), lanes, 1)
    words = move(upper, shape.head) | move(lower, shape.head // 2)  # two rows share a word
    return [pltpu.bitcast(words, shape.dtype)]


def _keys_of_halves(k: jax.Array, shape: _Shape) -> jax.Array:
    """Keys [B, T, P * 128] as they meet `_query`, [B, T, P * 2 * 128]: their elements in the lanes
    of its words, once for each half. To move queries instead would take a rotation a register."""
    quarter = shape.head // 2
    elements = k.reshape(*k.shape[:2], -1, shape.heads, 2, quarter)
    halves = elements[..., ::-1, ::-1, :].swapaxes(3, 4)  # head 1 stands first, and the upper half
    spare = ((0, 0),) * (halves.ndim - 1) + ((quarter, 0),)
    return jnp.pad(halves, spare).reshape(*k.shape[:2], -1)


def _take(refs: tuple, *counts: int) -> list[tuple]:
    """Consecutive groups of references, of these numbers: all of them."""
    groups, start = [], 0
    for count in counts:
        groups.append(refs[start : start + count])
        start += count
    assert start == len(refs), (counts, len(refs))
    return groups


class _ForwardRefs(NamedTuple):
    """References of the past forward kernel, behind its tables; S rows a segment, and `after`."""

    q: tuple  # HBM [B, T, packs * 128] float32, where queries are `gathered`
    k: Any  # [1, block, 128], or 2 * 128: see `_keys_of_halves`
    v: Any  # [1, block, 128]
    results: Any  # HBM [packs, heads, parts, T, 128], also an input
    queries: tuple  # VMEM [8 + S + 8, 128], for each of q
    running: tuple  # VMEM [8 + S + 8, 128] for each part
    sems: Any

    @classmethod
    def of(cls, refs: tuple, shape: _Shape) -> "_ForwardRefs":
        gathered, parts = shape.gathered, shape.parts
        q, keys, _, outputs, queries, running, sems = _take(
            refs, gathered, 2, 1, 1, gathered, parts, 1
        )
        return cls(q, *keys, *outputs, queries, running, *sems)


class _BackwardRefs(NamedTuple):
    """References of the past backward kernel, behind its tables; S rows a segment, and `after`."""

    sources: tuple  # HBM [B, T, packs * 128]: q and dO in words they share, or each of them
    k: Any  # [1, block, 128]
    v: Any  # [1, block, 128]
    results: Any  # HBM [packs, heads, parts, T, 128], also an input
    dk_out: Any  # HBM [sums, B, T, packs * 128], also an input: see `_Plan.sums`
    dv_out: Any  # HBM [sums, B, T, packs * 128], also an input
    queries: tuple  # VMEM [8 + S + 8, 128], for each source
    running: tuple  # VMEM [8 + S + 8, 128] for each part
    dk: Any  # VMEM [block, 128]
    dv: Any  # VMEM [block, 128]
    sems: Any

    @classmethod
    def of(cls, refs: tuple, shape: _Shape, sources: int) -> "_BackwardRefs":
        read, keys, _, outputs, queries, running, sums, sems = _take(
            refs, sources, 2, 3, 3, sources, shape.parts, 2, 1
        )
        return cls(read, *keys, *outputs, queries, running, *sums, *sems)


def _past_forward_kernel(
    table_ref, segments_ref, first_ref,  # see _Step.read
    rows_ref,  # SMEM [1, 1, 1, together * rows]: query of each row within the segment
    *refs,  # see _ForwardRefs
    shape: _Shape,
    keys: int,
    packs: int,
    routes: routing.Plan,
):  # fmt: skip
    step = _Step.read(table_ref, segments_ref, first_ref, shape.unit, routes)
    q_ref, k_ref, v_ref, results_ref, queries, running, sems = _ForwardRefs.of(refs, shape)
    parts, head = shape.parts, step.head
    size = running[0].shape[0] - SUBLANES - shape.after
    body, window = pl.ds(SUBLANES, size), _rows_of(step.segment, size)
    lane = pl.ds(pl.multiple_of(lax.rem(step.pack, packs) * LANES, LANES), LANES)

    @pl.when(step.first_of_segment)
    def _():
        _copy(
            *(
                (ref.at[lax.div(step.pack, packs), window, lane], x.at[body], sems.at[parts])
                for ref, x in zip(q_ref, queries, strict=True)
            ),
            *(
                (results_ref.at[step.pack, head, p, window], running[p].at[body], sems.at[p])
                for p in range(parts)
            ),
        )

    lanes = True
    if shape.packed:
        lanes = ~shape.in_query(_lane((SUBLANES, LANES)), head)

    def stages(start, first_key, place, tokens):
        gathered = _gather(rows_ref, place, tokens, [*queries, *running], shape.group)
        acc, stats, stat = gathered[shape.gathered], gathered[-1], shape.stat_lane(head)
        if shape.packed:
            q = _query(acc, shape, head)
        else:
            q = [shape.own(gathered[0], head).astype(shape.dtype)]
        yield
        largest = _column(stats, stat + 1)
        total = _column(stats, stat) if parts > 1 else None
        for piece in _pieces(shape.chunk, keys):
            at = pl.ds(start + piece.start, piece.stop - piece.start)
            products = [dot(x, k_ref[0, at, _lanes(i)], NT) for i, x in enumerate(q)]
            scores = functools.reduce(jnp.add, products) * shape.log2_scale
            if first_key is not None:
                readable = _readable(first_key, piece, acc.shape[0])
                scores = jnp.where(readable, scores, _NO_SCORE)
            yield
            new = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
            yield
            weights, shrink = jnp.exp2(scores - new), jnp.exp2(largest - new)
            yield
            values = shape.values_and_ones(v_ref[0, at, :], head)
            more = dot(weights.astype(shape.dtype), values)
            yield
            acc = acc * shrink + more
            if parts > 1:
                total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
            largest = new
        stats = jnp.where(_lane(stats.shape) == stat, total, stats) if parts > 1 else acc
        stats = jnp.where(_lane(stats.shape) == stat + 1, largest, stats)
        yield
        results = [acc, stats] if parts > 1 else [stats]
        pairs = list(zip(results, running, strict=True))
        _scatter(rows_ref, place, pairs, shape.group, step.zero, lanes)

    rows = routes.rows * shape.group
    if shape.chunk <= keys:  # else a strip has work for all units by itself
        rows = LANES

    def attend(number, *chunk):
        one = functools.partial(stages, *chunk)
        _strip_by_strip(one, number, routes.rows, rows, shape.group)

    @pl.when(step.used)
    def _():
        _each_tile(table_ref, step, shape, routes, attend)

    @pl.when(step.last_of_segment)
    def _():
        _copy(
            *(
                (running[p].at[body], results_ref.at[step.pack, head, p, window], sems.at[p])
                for p in range(parts)
            )
        )


# --------------------------------------------------------------------------------------------
# Own chunk, forward
# --------------------------------------------------------------------------------------------


def _visible(row, column, shape: _Shape, side: int, ends: tuple) -> jax.Array:
    """Which columns of cell (row, column) of a square its rows may see, [side, side].

    ends: [1, 1, cells, side] where documents are packed: the last token of the square that sees
    each key, of its document and chunk; else nothing.
    """
    query = row * side + iota((side, side), 0)
    if shape.group > 1:
        query = lax.div(query, shape.group)
    key = column * side + iota((side, side), 1)
    seen = key <= query
    if ends:
        seen &= query <= ends[0][0, 0, pl.ds(column, 1), :]
    elif shape.chunk < side:  # a cell of several chunks
        seen &= key // shape.chunk == query // shape.chunk
    return seen


def _own_forward_kernel(
    rows_ref, columns_ref,  # SMEM [tiles]: row and column of each cell of a square
    first_ref,  # SMEM [B]: square that the first query stands in (used by block specs)
    q_ref, k_ref, v_ref,  # [1, side, 128]
    results_ref,  # [1, heads, parts, side, 128] float32 of the past chunks
    *refs,  # ends, see `_visible`; out [1, side, 128], its log-sum-exp [1, heads, side], and the
    # running results, VMEM [heads, side, 128] * parts
    shape: _Shape,
):  # fmt: skip
    del first_ref
    ends, (out_ref, lse_ref), running = _take(refs, int(shape.documents), 2, shape.parts)
    step = pl.program_id(3)
    row, column = rows_ref[step], columns_ref[step]
    side, parts = q_ref.shape[1], shape.parts

    @pl.when(column == 0)
    def _():
        for p in range(parts):
            for h in range(shape.heads):
                running[p][h] = results_ref[0, h, p]

    seen = _visible(row, column, shape, side, ends)
    for h in range(shape.heads):
        stat = shape.stat_lane(h)
        q = shape.own(q_ref[0].astype(F32), h).astype(shape.dtype)
        scores = dot(q, k_ref[0], NT) * shape.log2_scale
        scores = jnp.where(seen, scores, _NO_SCORE)
        stats = running[-1][h]
        largest = stats[:, stat + 1 : stat + 2]
        new = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp2(scores - new), jnp.exp2(largest - new)
        acc = running[0][h] * shrink
        acc = acc + dot(weights.astype(shape.dtype), shape.values_and_ones(v_ref[0], h))
        if parts > 1:
            running[0][h] = acc
            total = stats[:, stat : stat + 1] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            stats = jnp.where(_lane(stats.shape) == stat, total, stats)
        else:
            stats = acc
        running[-1][h] = jnp.where(_lane(stats.shape) == stat + 1, new, stats)

    @pl.when(column == lax.div(row, shape.group))
    def _():
        out = jnp.zeros(out_ref.shape[1:], F32)
        logs = jnp.zeros(out.shape, F32)
        for h in range(shape.heads):
            stat = shape.stat_lane(h)
            stats = running[-1][h]
            total, largest = stats[:, stat : stat + 1], stats[:, stat + 1 : stat + 2]
            out = out + shape.own(running[0][h], h) / total
            logs = jnp.where(_lane(logs.shape) == h, largest + jnp.log2(total), logs)
        out_ref[0] = out.astype(out_ref.dtype)
        lse_ref[0] = logs.T[: shape.heads]


# --------------------------------------------------------------------------------------------
# Past chunks, backward
# --------------------------------------------------------------------------------------------


def _probabilities(q, k, do, v, lse, delta, shape: _Shape, seen=None):
    """Weights and gradients of the scores (without the scale), [rows, keys], in the dtype."""
    exponents = dot(q, k, NT) * shape.log2_scale - lse
    if seen is not None:
        exponents = jnp.where(seen, exponents, _NO_SCORE)
    weights = jnp.exp2(exponents)
    dscores = weights * (dot(do, v, NT) - delta)
    return weights.astype(shape.dtype), dscores.astype(shape.dtype)


def _unpack(tiles, shape: _Shape, head) -> tuple[jax.Array, jax.Array]:
    """q and dO [rows, 128] of gathered rows, the pack's other head cleared."""
    if shape.dtype == F32:
        q, do = tiles
    else:  # one word holds both: q in the upper half
        words = pltpu.bitcast(tiles[0], jnp.int32)
        q = pltpu.bitcast(words & jnp.int32(-65536), F32)
        do = pltpu.bitcast(lax.shift_left(words, 16), F32)
    return tuple(shape.own(x, head).astype(shape.dtype) for x in (q, do))


def _past_backward_kernel(
    table_ref, segments_ref, first_ref,  # see _Step.read
    rows_ref,  # SMEM [1, 1, 1, together * rows]
    *refs,  # see _BackwardRefs
    shape: _Shape,
    keys: int,
    packs: int,
    routes: routing.Plan,
    sources: int,
):  # fmt: skip
    """Adds to results, dK and dV; `sources` is 1 for bfloat16 (q and dO share words), else 2."""
    (
        sources_ref, k_ref, v_ref, results_ref, dk_ref, dv_ref, queries, running, dk, dv, sems
    ) = _BackwardRefs.of(refs, shape, sources)  # fmt: skip
    parts = shape.parts
    step = _Step.read(table_ref, segments_ref, first_ref, shape.unit, routes)
    head, stat = step.head, shape.stat_lane(step.head)
    size = queries[0].shape[0] - SUBLANES - shape.after
    body, window = pl.ds(SUBLANES, size), _rows_of(step.segment, size)
    batch = lax.div(step.pack, packs)
    lane = pl.ds(pl.multiple_of(lax.rem(step.pack, packs) * LANES, LANES), LANES)
    own_sum = head if dk_ref.shape[0] > 1 else 0
    block_rows = _rows_of(step.block, routes.joined * shape.chunk)

    @pl.when(step.first_of_segment)
    def _():
        end = pl.ds(SUBLANES + size, shape.after)  # where rows without a query point
        for x in (*queries, *running):
            x[end, :] = jnp.zeros((shape.after, LANES), F32)
        lanes = _lane((shape.after, LANES))
        running[-1][end, :] = jnp.where(lanes == stat, -_NO_SCORE, 0.0)
        _copy(
            *(
                (ref.at[batch, window, lane], x.at[body], sems.at[parts + i])
                for i, (ref, x) in enumerate(zip(sources_ref, queries, strict=True))
            ),
            *(
                (results_ref.at[step.pack, head, p, window], running[p].at[body], sems.at[p])
                for p in range(parts)
            ),
        )

    @pl.when(step.first_of_block)
    def _():
        _copy(
            (dk_ref.at[own_sum, batch, block_rows, lane], dk, sems.at[0]),
            (dv_ref.at[own_sum, batch, block_rows, lane], dv, sems.at[1]),
        )

    def stages(start, first_key, place, tokens):
        gathered = _gather(rows_ref, place, tokens, [*queries, *running], shape.group)
        q, do = _unpack(gathered[:sources], shape, head)
        dq, stats = gathered[sources], gathered[-1]
        yield
        lse, delta = _column(stats, stat), _column(stats, stat + 1)
        more = jnp.zeros(stats.shape, F32)
        for piece in _pieces(shape.chunk, keys):
            at = pl.ds(start + piece.start, piece.stop - piece.start)
            k, v = k_ref[0, at, :], v_ref[0, at, :]
            seen = None if first_key is None else _readable(first_key, piece, q.shape[0])
            weights, dscores = _probabilities(q, k, do, v, lse, delta, shape, seen)
            yield
            more = more + dot(dscores, k)
            dk[at, :] += dot(dscores, q, TN)
            dv[at, :] += dot(weights, do, TN)
            yield
        dq = dq + shape.own(more, head)
        _scatter(rows_ref, place, [(dq, running[0])], shape.group, step.zero)

    rows = routes.rows * shape.group
    # Chunks of 32 would lose a seventh by strips, and large ones keep all units busy without.
    if LANES <= shape.chunk <= keys:
        rows = rows // 2

    def attend(number, *chunk):
        one = functools.partial(stages, *chunk)
        _strip_by_strip(one, number, routes.rows, rows, shape.group)

    @pl.when(step.used)
    def _():
        _each_tile(table_ref, step, shape, routes, attend)

    @pl.when(step.last_of_block)
    def _():
        _copy(
            (dk, dk_ref.at[own_sum, batch, block_rows, lane], sems.at[0]),
            (dv, dv_ref.at[own_sum, batch, block_rows, lane], sems.at[1]),
        )

    @pl.when(step.last_of_segment)
    def _():
        results = results_ref.at[step.pack, head, 0, window]
        _copy((running[0].at[body], results, sems.at[0]))


# --------------------------------------------------------------------------------------------
# Own chunk, backward
# --------------------------------------------------------------------------------------------


def _own_backward_kernel(
    rows_ref, columns_ref, first_ref,  # SMEM, as in the forward
    q_ref, k_ref, v_ref, do_ref,  # [1, square, 128]; q and dO, as everything of theirs, * M
    results_ref,  # [1, heads, parts, square * M, 128] float32: dQ of the past chunks, statistics
    dk_past_ref, dv_past_ref,  # [1, square, 128] float32, of queries in later chunks
    *refs,  # ends, see `_visible`; dQ, dK, dV [1, square, 128], dQ * M; and the same in VMEM,
    # float32
    shape: _Shape,
    side: int,
):  # fmt: skip
    del first_ref
    ends, outputs, (dq, dk, dv) = _take(refs, int(shape.documents), 3, 3)
    dq_ref, dk_ref, dv_ref = outputs
    step = pl.program_id(3)
    row, column = rows_ref[step], columns_ref[step]
    last = step == pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        parts = [shape.own(results_ref[0, h, 0], h) for h in range(shape.heads)]
        dq[...] = functools.reduce(jnp.add, parts)
        dk[...] = dk_past_ref[0]
        dv[...] = dv_past_ref[0]

    at_row, at_column = _rows_of(row, side), _rows_of(column, side)
    seen = _visible(row, column, shape, side, ends)
    k, v = k_ref[0, at_column, :], v_ref[0, at_column, :]
    for h in range(shape.heads):
        stat = shape.stat_lane(h)
        q, do = (
            shape.own(ref[0, at_row, :].astype(F32), h).astype(shape.dtype)
            for ref in (q_ref, do_ref)
        )
        stats = results_ref[0, h, shape.parts - 1, at_row, :]
        lse, delta = stats[:, stat : stat + 1], stats[:, stat + 1 : stat + 2]
        weights, dscores = _probabilities(q, k, do, v, lse, delta, shape, seen)
        dq[at_row, :] += shape.own(dot(dscores, k), h)
        dk[at_column, :] += dot(dscores, q, TN)
        dv[at_column, :] += dot(weights, do, TN)

    @pl.when(last)
    def _():
        dq_ref[0] = (dq[...] * shape.scale).astype(dq_ref.dtype)
        dk_ref[0] = (dk[...] * shape.scale).astype(dk_ref.dtype)
        dv_ref[0] = dv[...].astype(dv_ref.dtype)


# --------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of a call. Arrays are packed: q [B, T * M, P * 128], k and v [B, Tk, P * 128].

    Attributes:
      batch, packs: B and P.
      queries: T, tokens in whole segments and whole squares.
      keys: Tk, whole squares and blocks.
      shape, tile: see there.
      routing: of the past part; None where no query can choose anything.
    """

    batch: int
    packs: int
    queries: int
    keys: int
    shape: _Shape
    tile: TileConfig
    routing: routing.Plan | None

    @property
    def all_packs(self) -> int:
        return self.batch * self.packs

    @property
    def square(self) -> int:
        return self.shape.square(self.tile.diagonal)

    @property
    def side(self) -> int:
        return self.shape.side(self.tile.diagonal)

    @property
    def rows(self) -> int:
        """Rows of q."""
        return self.queries * self.shape.group

    @property
    def results(self) -> tuple[int, ...]:
        """Shape of the rows of results: [packs, heads, parts, T * M, 128]."""
        return self.all_packs, self.shape.heads, self.shape.parts, self.rows, LANES

    @property
    def sources(self) -> int:
        """Arrays whose rows the backward gathers beside the results."""
        return 2 if self.shape.dtype == F32 else 1

    @property
    def sums(self) -> int:
        """Arrays of dK and of dV that the past backward adds to: one for each head of a pack where
        cores could not share the packs evenly, so that they share the heads."""
        return self.shape.heads if self.packs_together % self.tile.cores else 1

    @property
    def problem(self) -> str | None:
        """Why a chip has no room for the choices of a single pack; None if it has."""
        routes, each = self.routing, routing.SORTED_IN_VMEM
        if routes is None:
            return None
        if routes.pairs > each:
            room = f"{routes.pairs} pairs a segment, and vector memory has room for {each}"
        elif not self.parts(1):
            words = self.scalar_words(1, max(routes.tiles))
            room = f"{words} words of tables a segment, and scalar memory has {SCALAR_WORDS}"
        elif routes.emit_words > SCALAR_WORDS:
            room = f"{routes.emit_words} words of tables, and scalar memory has {SCALAR_WORDS}"
        else:
            return None
        return (
            f"{self.queries} queries that choose {routes.slots} chunks of {self.shape.chunk} make "
            f"{room}: take fewer or larger chunks, or shorter sequences"
        )

    def scalar_words(self, packs: int, tiles: int) -> int:
        """Words of scalar memory that a call of a past kernel takes: the chunk of every tile, the
        segment of every step, the first pack, and the rows of two steps."""
        together = self.routing.together
        steps = tiles // together
        return packs * self.shape.heads * tiles + steps + 1 + 2 * together * self.routing.rows

    def parts(self, packs: int) -> list[slice]:
        """The tiles of each call that takes `packs` packs, whole segments, as few calls as scalar
        memory allows; none where it has no room for a segment."""
        parts, stop = [], 0
        for tiles in self.routing.tiles:
            start, stop = stop, stop + tiles
            if parts and self.scalar_words(packs, stop - parts[-1].start) <= SCALAR_WORDS:
                start = parts.pop().start
            elif self.scalar_words(packs, tiles) > SCALAR_WORDS:
                return []
            parts.append(slice(start, stop))
        return parts

    @property
    def packs_together(self) -> int:
        """Packs that one call of a past kernel takes: equally many for each core of a chip if that
        can be, with the fewest parts to compile, and then as many as possible."""
        packs = [n for n in range(1, self.all_packs + 1) if not self.all_packs % n]
        parts = {n: len(self.parts(n)) for n in packs}
        choices = [n for n in packs if parts[n]]
        return min(choices, key=lambda n: (n % self.tile.cores, parts[n], -n))

    def grid_options(self, grid: tuple[int, ...], parallel: int) -> dict:
        return grid_options(grid, parallel, self.tile.vmem_limit_bytes)

    def triangle(self) -> tuple[jax.Array, jax.Array]:
        """Row and column of each cell of a square."""
        group = self.shape.group
        cells = range(self.square * group // self.side)
        pairs = [(i, j) for i in cells for j in range(i // group + 1)]
        rows, columns = zip(*pairs, strict=True)
        return jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)

    def past_cost(self, products: int, arrays, part: slice) -> pl.CostEstimate:
        """Useful work of a call: `products` products [pairs, K] x [K, chunk], every slot taken."""
        pairs = self.all_packs * self.shape.heads * self.rows * self.routing.slots
        share = self.packs_together * (part.stop - part.start)
        whole = self.all_packs * self.routing.all_tiles
        return self._cost(pairs * self.shape.chunk, products, arrays, share, whole)

    def own_cost(self, products: int, arrays) -> pl.CostEstimate:
        rows = self.all_packs * self.shape.heads * self.rows
        return self._cost(rows * (self.shape.chunk + 1) // 2, products, arrays)

    def _cost(self, scores: int, products: int, arrays, share=1, whole=1) -> pl.CostEstimate:
        return pl.CostEstimate(
            flops=2 * products * scores * self.shape.head * share // whole,
            transcendentals=scores * share // whole,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays) * share // whole,
        )


def _segment(
    queries: int, square: int, tile: TileConfig, shape: _Shape, chunks: int, slots: int
) -> tuple[int, int]:
    """Queries a segment and segments: whole squares, as few segments as VMEM and integers allow."""
    sources = 2 if shape.dtype == F32 else 1
    limit = min(
        tile.segment_bytes // ((sources + shape.parts) * LANES * 4 * shape.group),
        routing.SORTED_IN_VMEM // max(1, slots),
        routing.largest_segment(chunks, slots),
    )
    limit = max(square, limit // square * square)
    segments = -(-queries // limit)
    squares = -(-queries // square)
    return -(-squares // segments) * square, segments


def _past_call(
    plan: _Plan,
    kernel,
    routed,
    documents,
    inputs,
    in_specs,
    outputs,
    scratch,
    products,
    parallel,
    interpret,
    name,
):
    """Runs a kernel over all tiles of the past part, in as few calls as scalar memory allows.

    Args:
      documents: see `_Documents`.
      inputs, in_specs: beside the tables and rows.
      outputs: arrays that are updated in place.
      products: of queries, or of scores, with keys or values: for the cost estimate.
      parallel: how many of the grid's axes (pack, head, step) are independent.
    """
    rows, chunk, count = routed
    heads, tiles, each = plan.shape.heads, plan.routing.all_tiles, plan.routing.together
    number = chunk
    if documents is not None:  # of each row's packs and heads
        by_row = chunk.reshape(plan.batch, -1)
        number = jnp.take_along_axis(documents.first_keys, by_row, axis=1, mode="clip")
    words = _TileWord.of(number, count.reshape(number.shape), plan.shape.unit).word
    table = words.reshape(plan.all_packs, heads, tiles)
    number = plan.routing.segment_of_tile()[::each]
    edge = [s != r for s, r in zip(number[1:], number[:-1], strict=True)]
    segments = jnp.asarray(
        [
            _StepWord.of(s, first, last).word
            for s, first, last in zip(number, [True, *edge], [*edge, True], strict=True)
        ],
        jnp.int32,
    )
    together = plan.packs_together
    any_memory = pl.BlockSpec(memory_space=pltpu.HBM)
    at_once = each * plan.routing.rows
    rows = rows.reshape(plan.all_packs * heads, tiles // each, 1, at_once)
    rows, *inputs = routing.in_main_memory(interpret, rows, *inputs)

    def call(part: slice):
        grid = together, heads, (part.stop - part.start) // each
        row_block = pl.BlockSpec(
            (1, 1, 1, at_once),
            lambda g, h, t, table, segments, first: (
                (first[0] + g) * heads + h,
                part.start // each + t,
                0,
                0,
            ),
            memory_space=pltpu.SMEM,
        )
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=grid,
                in_specs=[row_block, *in_specs, *[any_memory] * len(outputs)],
                out_specs=[any_memory] * len(outputs),
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
            input_output_aliases={4 + len(inputs) + i: i for i in range(len(outputs))},
            cost_estimate=plan.past_cost(products, [*inputs, *outputs, *outputs], part),
            interpret=interpret,
            name=name,
            **plan.grid_options(grid, parallel),
        )

    calls = [(part, call(part)) for part in plan.parts(together)]

    def run(first, outputs):
        packs = lax.dynamic_slice_in_dim(table, first, together)
        for part, call in calls:
            steps = segments[part.start // each : part.stop // each]
            outputs = routing.in_main_memory(interpret, *outputs)
            tables = packs[:, :, part], steps, jnp.reshape(first, 1)
            outputs = call(*tables, rows, *inputs, *outputs)
        return tuple(outputs)

    if together == plan.all_packs:
        return run(jnp.int32(0), outputs)
    return lax.fori_loop(
        0, plan.all_packs // together, lambda i, x: run(i * together, x), tuple(outputs)
    )


def _past_specs(plan: _Plan, width=LANES) -> list[pl.BlockSpec]:
    """Blocks of k, `width` lanes a pack, and v: the chunks that the step's tiles share."""
    packs, joined, together = plan.packs, plan.routing.joined, plan.routing.together

    def index(g, h, t, table, segments, first):
        pack = first[0] + g
        tile = _TileWord(table[g, h, t * together], plan.shape.unit)
        return lax.div(pack, packs), tile.block(joined), lax.rem(pack, packs)

    size = joined * plan.shape.chunk
    return [pl.BlockSpec((1, size, lanes), index) for lanes in (width, LANES)]


def _segment_rows(plan: _Plan):
    rows = plan.routing.segment * plan.shape.group
    return pltpu.VMEM((SUBLANES + rows + plan.shape.after, LANES), F32)


def _start(plan: _Plan, q, interpret):
    """Rows of results before any chunk, float32 [packs, heads, parts, T * M, 128]."""
    shape, packs, rows = plan.shape, plan.packs, plan.square
    if not shape.packed or plan.routing is None:
        start = jnp.where(_stat_lanes(shape, 1), _NO_SCORE, 0.0)
        return jnp.broadcast_to(start, plan.results)
    grid = plan.all_packs, plan.rows // rows
    return pl.pallas_call(
        functools.partial(_start_kernel, shape=shape),
        grid=grid,
        in_specs=[pl.BlockSpec((1, rows, LANES), lambda p, t: (p // packs, t, p % packs))],
        out_specs=pl.BlockSpec((1, shape.heads, 1, rows, LANES), lambda p, t: (p, 0, 0, t, 0)),
        out_shape=jax.ShapeDtypeStruct(plan.results, F32),
        **grid_options(grid, 2),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * q.size + 4 * math.prod(plan.results)
        ),
        interpret=interpret,
        name="block_sparse_start",
    )(*routing.in_main_memory(interpret, q))


def _past_forward(plan: _Plan, routed, q, k, v, results, documents, interpret):
    parts, gathered = plan.shape.parts, plan.shape.gathered
    queries = [] if plan.shape.packed else [q.astype(F32)]
    k = _keys_of_halves(k, plan.shape) if plan.shape.halved else k
    kernel = functools.partial(
        _past_forward_kernel,
        shape=plan.shape,
        keys=plan.tile.keys,
        packs=plan.packs,
        routes=plan.routing,
    )
    (results,) = _past_call(
        plan,
        kernel,
        routed,
        documents,
        [*queries, k, v],
        [
            *[pl.BlockSpec(memory_space=pltpu.HBM)] * gathered,
            *_past_specs(plan, k.shape[2] // plan.packs),
        ],
        [results],
        [
            *[_segment_rows(plan)] * (gathered + parts),
            pltpu.SemaphoreType.DMA((parts + 1,)),
        ],
        2,
        2,  # the heads of a pack have rows of results of their own
        interpret,
        "block_sparse_past_forward",
    )
    return results


def _past_backward(plan: _Plan, routed, q, k, v, do, results, documents, interpret):
    """Returns results with dQ, and dK, dV [B, Tk, P * 128] float32, dQ and dK without the scale."""
    parts, sources = plan.shape.parts, plan.sources
    if sources == 1:
        upper, lower = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (q, do))
        rows = [lax.bitcast_convert_type(upper << 16 | lower, F32)]
    else:
        rows = [q, do]
    zeros = [jnp.zeros((plan.sums, *k.shape), F32)] * 2
    kernel = functools.partial(
        _past_backward_kernel,
        shape=plan.shape,
        keys=plan.tile.keys,
        packs=plan.packs,
        routes=plan.routing,
        sources=sources,
    )
    block = pltpu.VMEM((plan.routing.joined * plan.shape.chunk, LANES), F32)
    count = sources + parts
    results, dk, dv = _past_call(
        plan,
        kernel,
        routed,
        documents,
        [*rows, k, v],
        [*[pl.BlockSpec(memory_space=pltpu.HBM)] * sources, *_past_specs(plan)],
        [results, *zeros],
        [
            *[_segment_rows(plan)] * count,
            *[block] * 2,
            pltpu.SemaphoreType.DMA((count,)),
        ],
        5,
        1 if plan.sums == 1 else 2,  # whether the heads of a pack add to the same rows of dK and dV
        interpret,
        "block_sparse_past_backward",
    )
    return results, *(x[0] if plan.sums == 1 else x.sum(axis=0) for x in (dk, dv))


def _own_forward(plan: _Plan, q, k, v, results, first, documents, interpret):
    """Returns out [B, T * M, P * 128], and in base 2 the log-sum-exp [packs, heads, T * M]."""
    shape, side, packs = plan.shape, plan.side, plan.packs
    columns_of_square = plan.square // side
    per_square = columns_of_square * shape.group

    def row(b, p, n, t, rows, columns, first):
        return b, n * per_square + rows[t], p

    def column(b, p, n, t, rows, columns, first):
        return b, (first[b] + n) * columns_of_square + columns[t], p

    tokens = lambda index: pl.BlockSpec((1, side, LANES), index)
    rows, columns = plan.triangle()
    grid = plan.batch, packs, plan.queries // plan.square, rows.size
    out_shape = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((plan.all_packs, shape.heads, plan.rows), F32),
    ]
    return pl.pallas_call(
        functools.partial(_own_forward_kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                tokens(row),
                tokens(column),
                tokens(column),
                pl.BlockSpec(
                    (1, shape.heads, shape.parts, side, LANES),
                    lambda b, p, n, t, rows, columns, first: (
                        b * packs + p,
                        0,
                        0,
                        n * per_square + rows[t],
                        0,
                    ),
                ),
                *_ends_specs(plan),
            ],
            out_specs=[
                tokens(row),
                pl.BlockSpec(
                    (1, shape.heads, side),
                    lambda b, p, n, t, rows, columns, first: (
                        b * packs + p,
                        0,
                        n * per_square + rows[t],
                    ),
                ),
            ],
            scratch_shapes=[pltpu.VMEM((shape.heads, side, LANES), F32)] * shape.parts,
        ),
        out_shape=out_shape,
        **plan.grid_options(grid, 3),
        cost_estimate=plan.own_cost(2, [q, k, v, results, *out_shape]),
        interpret=interpret,
        name="block_sparse_own_forward",
    )(
        *(rows, columns, first),
        *routing.in_main_memory(interpret, q, k, v, results),
        *([] if documents is None else [documents.ends]),
    )


def _ends_specs(plan: _Plan) -> list[pl.BlockSpec]:
    """The block of `_Documents.ends` of a square, where documents are packed."""
    index = lambda b, p, n, t, rows, columns, first: (b, first[b] + n, 0, 0)
    size = 1, 1, plan.square // plan.side, plan.side
    return [pl.BlockSpec(size, index)] * plan.shape.documents


def _own_backward(plan: _Plan, q, k, v, do, results, dk, dv, first, documents, interpret):
    shape, square, packs = plan.shape, plan.square, plan.packs
    each = square * shape.group  # rows of a square
    query = lambda b, p, n, t, rows, columns, first: (b, n, p)
    key = lambda b, p, n, t, rows, columns, first: (b, first[b] + n, p)
    block = lambda index, size: pl.BlockSpec((1, size, LANES), index)
    queries, keys = block(query, each), block(key, square)
    rows, columns = plan.triangle()
    grid = plan.batch, packs, plan.queries // square, rows.size
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    return pl.pallas_call(
        functools.partial(_own_backward_kernel, shape=shape, side=plan.side),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                queries,
                keys,
                keys,
                queries,
                pl.BlockSpec(
                    (1, shape.heads, shape.parts, each, LANES),
                    lambda b, p, n, t, *tables: (b * packs + p, 0, 0, n, 0),
                ),
                keys,
                keys,
                *_ends_specs(plan),
            ],
            out_specs=[queries, keys, keys],
            scratch_shapes=[pltpu.VMEM((size, LANES), F32) for size in (each, square, square)],
        ),
        out_shape=out_shape,
        **plan.grid_options(grid, 3),
        cost_estimate=plan.own_cost(5, [q, k, v, do, results, dk, dv, *out_shape]),
        interpret=interpret,
        name="block_sparse_own_backward",
    )(
        *(rows, columns, first),
        *routing.in_main_memory(interpret, q, k, v, do, results, dk, dv),
        *([] if documents is None else [documents.ends]),
    )


# --------------------------------------------------------------------------------------------
# The op on packed arrays
# --------------------------------------------------------------------------------------------


def _stat_lanes(shape: _Shape, offset: int) -> jax.Array:
    """True in lane `stat_lane + offset` of the last part, [1, heads, parts, 1, 128]."""
    lanes = jnp.asarray([shape.stat_lane(h) + offset for h in range(shape.heads)], jnp.int32)
    lanes = lanes[:, None, None, None]
    size = (shape.heads, shape.parts, 1, LANES)
    last = iota(size, 1) == shape.parts - 1
    return (last & (iota(size, 3) == lanes))[None]


class _Documents(NamedTuple):
    """What packed documents leave to be read; None in its place where there is one text.

    Attributes:
      ends: int32 [B, squares, cells, side], the last token that sees each key from within its
        chunk, counted in the key's square.
      first_keys: int32 [B, N], the first key of each whole chunk that tokens behind it may read.
    """

    ends: jax.Array
    first_keys: jax.Array

    @classmethod
    def of(cls, plan: _Plan, starts: jax.Array) -> "_Documents":
        """Of the positions [B, Tk] at which keys' documents begin."""
        chunk, square = plan.shape.chunk, plan.square
        position = jnp.arange(plan.keys, dtype=jnp.int32)[None]
        last = position // chunk * chunk + chunk - 1
        ends = jnp.minimum(alignment.document_ends(starts, plan.keys), last)
        ends = (ends - position // square * square).reshape(
            plan.batch, -1, square // plan.side, plan.side
        )
        of_last = starts[:, chunk - 1 :: chunk]
        return cls(ends, jnp.maximum(of_last, position[:, ::chunk][:, : of_last.shape[1]]))


def _forward(plan: _Plan, interpret, q, k, v, selection, first, documents):
    results, routed = _start(plan, q, interpret), None
    if plan.routing is not None:
        position = first[:, None] * plan.square + jnp.arange(plan.queries, dtype=jnp.int32)[None]
        routed = routing.route(
            selection, position // plan.shape.chunk, plan.routing, interpret=interpret
        )
        routed = routed.rows, routed.chunk, routed.count
        results = _past_forward(plan, routed, q, k, v, results, documents, interpret)
    out, lse = _own_forward(plan, q, k, v, results, first, documents, interpret)
    return out, lse, routed


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, selection, first, documents, plan, interpret):
    return _forward(plan, interpret, q, k, v, selection, first, documents)[0]


def _attention_forward(q, k, v, selection, first, documents, plan, interpret):
    out, lse, routed = _forward(plan, interpret, q, k, v, selection, first, documents)
    return out, (q, k, v, first, documents, out, lse, routed)


def _attention_backward(plan, interpret, saved, do):
    q, k, v, first, documents, out, lse, routed = saved
    shape = plan.shape
    delta = (do.astype(F32) * out.astype(F32)).reshape(*q.shape[:2], -1, shape.head).sum(axis=-1)
    delta = delta.transpose(0, 2, 1).reshape(lse.shape)
    rows = lambda x: x[:, :, None, :, None]
    results = jnp.where(_stat_lanes(shape, 1), rows(delta), 0.0)
    results = jnp.where(_stat_lanes(shape, 0), rows(lse), results)
    if plan.routing is None:
        dk_past = dv_past = jnp.zeros(k.shape, F32)
    else:
        results, dk_past, dv_past = _past_backward(
            plan, routed, q, k, v, do, results, documents, interpret
        )
    dq, dk, dv = _own_backward(
        plan, q, k, v, do, results, dk_past, dv_past, first, documents, interpret
    )
    if plan.queries < plan.keys:  # keys that are no query's own chunk have past gradients only
        square = jnp.arange(plan.keys, dtype=jnp.int32)[None] // plan.square - first[:, None]
        own = ((square >= 0) & (square < plan.queries // plan.square))[..., None]
        dk = jnp.where(own, dk, (dk_past * shape.scale).astype(dk.dtype))
        dv = jnp.where(own, dv, dv_past.astype(dv.dtype))
    return dq, dk, dv, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


# --------------------------------------------------------------------------------------------
# The op
# --------------------------------------------------------------------------------------------


def _pack(x: jax.Array, time: int, heads: int, group: int = 1) -> jax.Array:
    """[B, T, G * M, K] -> [B, time * M, heads * K], filled up with zeros."""
    more = ((0, 0), (0, time - x.shape[1]), (0, heads * group - x.shape[2]), (0, 0))
    x = jnp.pad(x, more) if any(m for _, m in more) else x
    if group > 1:
        x = x.reshape(*x.shape[:2], heads, group, x.shape[3]).swapaxes(2, 3)
    return x.reshape(x.shape[0], time * group, -1)


def _unpack_heads(x: jax.Array, head: int, group: int) -> jax.Array:
    """The reverse: [B, T * M, G * K] -> [B, T, G * M, K]."""
    batch, rows, width = x.shape
    x = x.reshape(batch, rows // group, group, width // head, head)
    return x.swapaxes(2, 3).reshape(batch, rows // group, -1, head)


def _make_plan(q, k, selection, shape: _Shape, tile: TileConfig, first: int | None) -> _Plan:
    """Sizes for queries that begin at square `first` of the keys (None: known when running)."""
    batch, length = q.shape[:2]
    slots, square = selection.shape[3], shape.square(tile.diagonal)
    block = shape.block(tile)
    packs = -(-k.shape[2] // shape.heads)
    chunks = k.shape[1] // shape.chunk
    segment, segments = _segment(length, square, tile, shape, chunks, slots)
    queries = segment * segments
    keys = -(-k.shape[1] // square) * square
    keys = keys + queries if first is None else max(keys, first * square + queries)
    keys = -(-keys // block) * block
    if first is not None:  # the own chunk of the last query is past to none
        chunks = min(chunks, (first * square + length - 1) // shape.chunk)
    routed = None
    if slots and chunks:
        routed = routing.make_plan(
            queries=queries,
            segment=segment,
            rows=tile.rows if shape.group == 1 else tile.shared_rows // shape.group,
            chunks=chunks,
            slots=slots,
            chunk_size=shape.chunk,
            first=None if first is None else first * square,
            stride=shape.group,
            joined=block // shape.chunk,
            together=tile.together if block > shape.chunk else 1,
        )
    return _Plan(batch, packs, queries, keys, shape, tile, routed)


def _plan_of(
    q, k, slots: int, chunk_size: int, scale: float, q_offset, tile, documents: bool = False
) -> _Plan:
    """The plan for arguments of the op, from their shapes, before queries are aligned."""
    tile = default_tile() if tile is None else tile
    group = q.shape[2] // k.shape[2]
    shape = _Shape(q.shape[3], jnp.dtype(q.dtype), chunk_size, float(scale), group, documents)
    known, square = isinstance(q_offset, int), shape.square(tile.diagonal)
    batch, length, heads, head = q.shape
    aligned = length + (q_offset % square if known else square)
    struct = lambda size: jax.ShapeDtypeStruct((batch, aligned, heads, size), q.dtype)
    first = q_offset // square if known else None
    return _make_plan(struct(head), k, struct(slots), shape, tile, first)


def block_sparse_attention(
    q: jax.Array,  # [B, Tq, H, K]
    k: jax.Array,  # [B, Tk, G, K]
    v: jax.Array,  # [B, Tk, G, K]
    selection: jax.Array,  # [B, Tq, G, J]
    *,
    chunk_size: int,
    scale: float,
    q_offset=0,
    starts: jax.Array | None = None,  # [B, Tk]
    tile: TileConfig | None = None,
    interpret=False,
) -> jax.Array:
    """Causal attention to the own chunk and the selected past chunks on a TPU.

    Differentiable in q, k and v.

    Args:
      q, k, v: bfloat16 or float32, all of one dtype, head size 64 or 128. The dtype decides the
        products' precision: one bfloat16 pass or full float32; sums are float32 either way. H / G
        is a power of two; query head h reads key head, and uses choice, h // (H / G).
      selection: int32, distinct chunks of each query; entries that are not complete chunks before
        the query's own are ignored.
      chunk_size: 32, 64, 192, or a multiple of 128 up to 2048.
      scale: factor on q . k.
      q_offset: position of the first query among the keys: int, or int32 [B] (may be traced).
      starts: int32, of packed documents: the position at which the document of each key begins. A
        query reads no key of another one; its choices are chunks that its document reaches into.
      tile: see `TileConfig`; default: `default_tile()`.
      interpret: True or `pltpu.InterpretParams` to run on a CPU, for tests.

    Returns:
      [B, Tq, H, K] in q's dtype.

    Raises:
      ValueError: unsupported sizes or dtypes, shapes that disagree, or more tiles than scalar
        memory has room for.
    """
    alignment.check(q, k, v, selection, starts)
    reason = unsupported_reason(q, k, v, selection.shape[3], chunk_size, q_offset, tile)
    if reason:
        raise ValueError(f"block_sparse on TPU: {reason}")
    batch, length, heads, head = q.shape
    key_heads = k.shape[2]
    packed = starts is not None
    plan = _plan_of(q, k, selection.shape[3], chunk_size, scale, q_offset, tile, packed)
    shape, square = plan.shape, plan.square
    q, shift = alignment.align(q, q_offset, square)
    selection, _ = alignment.align(selection, q_offset, square, fill=-1)
    first = alignment.first_block(q_offset, batch, square, k.shape[1])
    wide = plan.packs * shape.heads
    selection = jnp.pad(
        selection,
        ((0, 0), (0, plan.queries - q.shape[1]), (0, wide - key_heads), (0, 0)),
        constant_values=-1,
    )
    out = _attention(
        _pack(q, plan.queries, wide, shape.group),
        *(_pack(x, plan.keys, wide) for x in (k, v)),
        selection,
        first,
        None if starts is None else _Documents.of(plan, starts),
        plan,
        interpret,
    )
    out = _unpack_heads(out, head, shape.group)
    return alignment.cut(out, shift, length)[:, :, :heads]

"""Routing for sparse attention: selected (query, chunk) pairs -> rows sorted by chunk, in tiles.

Queries are taken a segment at a time, so that a kernel can hold a segment's queries on chip and
gather from them row by row. Within a segment the pairs are sorted by chunk, and the pairs of one
chunk are cut into tiles of a fixed number of rows; the last tile of a chunk is filled up with rows
that point past the segment. Small chunks are joined into blocks, and a block's tiles are filled up
to whole steps of several tiles, so that one step of a kernel needs the keys of one block. How many
tiles there are at most is known beforehand, whatever is chosen (all queries may choose the same
chunk), and no pair is ever dropped.

A pair is one integer, chunk << bits | query, so that sorting integers is all there is to do. On TPU
a bitonic network sorts them in VMEM: log^2 steps, but no scatter and no table look-up, which cost
a memory access an element there. Counts of pairs a chunk come from products of one-hot matrices.

Sizes: see `common`; a group is the tiles that one step of the emitting kernel writes, 8 registers'
rows of 128 or more.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import LANES, SUBLANES, grid_options, iota

_REGISTER = LANES * SUBLANES
_UNROLL = 2  # groups of up to 8 registers compared side by side, to fill one another's waits
_NO_PAIR = jnp.iinfo(jnp.int32).max
_MOST = 2**31 - 2  # a pair's integer

SORTED_IN_VMEM = 1 << 21
"""Pairs that `route` sorts at once: five times their integers lie in VMEM, 40 MiB."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a routing.

    Attributes:
      segment: queries a segment, S.
      segments: number of segments; segment * segments queries in all.
      rows: rows of a tile; for `route`, a multiple of 128, or 8, 16, 32 or 64.
      chunks: number of chunks that can be chosen, N.
      slots: choices a query, J.
      tiles: number of tiles of each segment, each a multiple of `group`.
      numbered: whether a pair's integer holds its slot too (slot * S + query), so that a kernel can
        write a result of its own for each pair.
      stride: rows that a query has; tiles hold the number of its first one.
      joined: neighbouring chunks that make a block of keys.
      together: tiles that a step takes, all of one block; divides 8.
    """

    segment: int
    segments: int
    rows: int
    chunks: int
    slots: int
    tiles: tuple[int, ...]
    numbered: bool = False
    stride: int = 1
    joined: int = 1
    together: int = 1

    @property
    def bits(self) -> int:
        """Bits of a pair's integer below the chunk."""
        numbers = self.segment * (self.slots if self.numbered else 1)
        return max(1, (numbers - 1).bit_length())

    @property
    def pairs(self) -> int:
        """Integers sorted a segment: a power of two, at least 16 registers."""
        return max(16 * _REGISTER, 1 << (self.segment * self.slots - 1).bit_length())

    @property
    def all_tiles(self) -> int:
        return sum(self.tiles)

    @property
    def emit_words(self) -> int:
        """Words of scalar memory that cutting into tiles takes: the segment of every step, and the
        starts and counts of the tiles of two steps."""
        return self.all_tiles // self.group + 2 * 2 * self.group

    @property
    def group(self) -> int:
        """Tiles that one step of the emitting kernel writes: 8 rows of 128 lanes, or whole ones."""
        return _group(self.rows)

    def segment_of_tile(self) -> list[int]:
        return [s for s, count in enumerate(self.tiles) for _ in range(count)]


def make_plan(
    *,
    queries: int,
    segment: int,
    rows: int,
    chunks: int,
    slots: int,
    chunk_size: int,
    first: int | None,
    numbered: bool = False,
    stride: int = 1,
    joined: int = 1,
    together: int = 1,
) -> Plan:
    """Plan for `queries` queries, the worst case of tiles counted.

    Args:
      queries: a multiple of `segment`.
      segment, rows, chunks, slots, numbered, stride, joined, together: see `Plan`.
      chunk_size: tokens in a chunk.
      first: position of the first query if known; None if it is only known when running.

    Raises:
      ValueError: sizes that do not divide, or pairs that do not fit 31 bits.
    """
    if queries % segment:
        raise ValueError(f"{queries} queries are not whole segments of {segment}")
    if rows < 1 or (rows % LANES and rows not in (8, 16, 32, 64) and not numbered):
        raise ValueError(f"a tile's rows must be a multiple of {LANES}, or 8 to 64, got {rows}")
    tiles, group = [], _group(rows)
    for start in range(0, queries, segment):
        pairs, groups = segment * slots, chunks
        if first is not None:
            pairs = sum(
                min(slots, c) * _overlap(first + start, segment, c * chunk_size, chunk_size)
                for c in range(
                    (first + start) // chunk_size, (first + start + segment - 1) // chunk_size + 1
                )
            )
            groups = min(chunks, (first + start + segment - 1) // chunk_size)
        # Every chunk's last tile may hold a single row; no chunk gets a query twice.
        worst = min((pairs + groups * (rows - 1)) // rows, groups * -(-segment // rows))
        worst += -(-groups // joined) * (together - 1)  # and so may every block's last step
        tiles.append(max(group, -(-worst // group) * group))
    plan = Plan(
        segment=segment,
        segments=queries // segment,
        rows=rows,
        chunks=chunks,
        slots=slots,
        tiles=tuple(tiles),
        numbered=numbered,
        stride=stride,
        joined=joined,
        together=together,
    )
    if plan.chunks << plan.bits > _MOST:
        raise ValueError(
            f"{chunks} chunks and {plan.bits} bits of a pair do not fit 31 bits: smaller segments"
        )
    return plan


def _group(rows: int) -> int:
    return SUBLANES * max(1, LANES // rows)


def largest_segment(chunks: int, slots: int, *, numbered: bool = False) -> int:
    """Most queries a segment may have for its pairs to fit 31 bits, whatever is chosen.

    Args:
      chunks, slots, numbered: see `Plan`.
    """
    numbers = 1 << (_MOST // max(1, chunks)).bit_length() - 1
    return max(1, numbers // max(1, slots)) if numbered else numbers


def _overlap(start: int, length: int, other: int, other_length: int) -> int:
    return max(0, min(start + length, other + other_length) - max(start, other))


def pair_keys(
    selection: jax.Array,  # [B, T, H, J]
    own: jax.Array,  # [B, T]
    plan: Plan,
) -> jax.Array:
    """Integers of the pairs, int32 [B, H, segments, J * S].

    Args:
      selection: int32; entries that are not past chunks of their query are left out.
      own: int32, the chunk each query stands in; 0 for a query that must not choose.
      plan: see `Plan`; T = segments * S.
    """
    batch, _, heads, slots = selection.shape
    limit = jnp.minimum(own, plan.chunks)[:, :, None, None]
    chosen = (selection >= 0) & (selection < limit)
    query = jnp.arange(selection.shape[1], dtype=jnp.int32) % plan.segment
    number = query[None, :, None, None]
    if plan.numbered:
        number = number + jnp.arange(slots, dtype=jnp.int32)[None, None, None] * plan.segment
    keys = (selection << plan.bits) | number
    keys = jnp.where(chosen, keys, _NO_PAIR).transpose(0, 2, 3, 1)
    keys = keys.reshape(batch, heads, slots, plan.segments, plan.segment).swapaxes(2, 3)
    return keys.reshape(batch, heads, plan.segments, slots * plan.segment)


def tile_tables(counts: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each tile's rows lie among the sorted pairs of its segment.

    Args:
      counts: int32 [G, segments, N] pairs a chunk.

    Returns:
      chunk, start, count: int32 [G, tiles]. A tile beyond the last has count 0 and the chunk of
      the last one (0 if there is none), so that it asks for no other keys.
    """
    tiles = _whole_steps(-(-counts // plan.rows), plan)
    ends = jnp.cumsum(tiles, axis=-1)
    starts = jnp.cumsum(counts, axis=-1) - counts
    numbers = jnp.arange(plan.chunks, dtype=jnp.int32)
    last = jnp.max(jnp.where(counts > 0, numbers[None, None], 0), axis=-1)
    # Of a chunk, relative to tile 0 of the segment.
    first_pair = starts - plan.rows * (ends - tiles)
    pairs_end = starts + counts
    parts = []
    for s, number in enumerate(plan.tiles):
        index = jnp.arange(number, dtype=jnp.int32)[None, :, None]
        chunk = jnp.sum((ends[:, s, None] <= index).astype(jnp.int32), axis=-1)
        chunk = jnp.minimum(chunk, last[:, s, None])
        here = chunk[..., None] == numbers[None, None]
        pick = lambda x, here=here, s=s: jnp.sum(jnp.where(here, x[:, s, None], 0), axis=-1)
        start = pick(first_pair) + plan.rows * index[..., 0]
        count = jnp.clip(pick(pairs_end) - start, 0, plan.rows)
        parts.append((chunk, jnp.where(count > 0, start, 0), count))
    return tuple(jnp.concatenate(x, axis=-1).astype(jnp.int32) for x in zip(*parts, strict=True))


def _whole_steps(tiles: jax.Array, plan: Plan) -> jax.Array:
    """Tiles a chunk [G, segments, N], those of each block's last chunk filled up to whole steps."""
    if plan.together == 1:
        return tiles
    blocks = -(-plan.chunks // plan.joined)
    more = blocks * plan.joined - plan.chunks
    block = jnp.pad(tiles, ((0, 0), (0, 0), (0, more)))
    block = block.reshape(*tiles.shape[:2], blocks, plan.joined).sum(axis=-1)
    missing = jnp.repeat(-block % plan.together, plan.joined, axis=-1)[..., : plan.chunks]
    number = jnp.arange(plan.chunks)
    last = (number % plan.joined == plan.joined - 1) | (number == plan.chunks - 1)
    return tiles + jnp.where(last, missing, 0)


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a kernel needs of the pairs of G = B * H sequences and heads.

    Attributes:
      rows: int32 [G, tiles, rows] query of each row within its segment, S where there is none,
        times the stride.
      chunk: int32 [G, tiles] chunk of each tile.
      count: int32 [G, tiles] rows in use.
    """

    rows: jax.Array
    chunk: jax.Array
    count: jax.Array


def route(
    selection: jax.Array,  # [B, T, H, J]
    own: jax.Array,  # [B, T]
    plan: Plan,
    *,
    interpret=False,
) -> Routing:
    """Sorts the selected pairs by chunk and cuts them into tiles, on a TPU.

    Args:
      selection, own: see `pair_keys`.
      plan: see `make_plan`.
      interpret: True or `pltpu.InterpretParams` to run on a CPU.
    """
    keys = pair_keys(selection, own, plan)
    keys = keys.reshape(-1, plan.segments, keys.shape[-1])
    ordered, counts = _sort_call(keys, plan, interpret)
    chunk, start, count = tile_tables(counts, plan)
    rows = _emit_call(ordered, start, count, plan, interpret)
    return Routing(rows, chunk, count)


def sort_pairs(
    selection: jax.Array,  # [B, T, H, J]
    own: jax.Array,  # [B, T]
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """The same in plain XLA, for platforms that sort well: sorted pairs and their bounds.

    Args:
      selection, own: see `pair_keys`.
      plan: see `make_plan`.

    Returns:
      numbers: int32 [G, segments, J * S], the pairs' integers without the chunk, sorted by chunk.
      starts: int32 [G, segments, N + 1], where each chunk's pairs begin, and the last ends.
    """
    keys = jnp.sort(pair_keys(selection, own, plan), axis=-1)
    keys = keys.reshape(-1, plan.segments, keys.shape[-1])
    bounds = jnp.arange(plan.chunks + 1, dtype=jnp.int32) << plan.bits
    find = jax.vmap(jax.vmap(lambda row: jnp.searchsorted(row, bounds)))
    return keys & ((1 << plan.bits) - 1), find(keys).astype(jnp.int32)


def in_main_memory(interpret, *arrays: jax.Array) -> list[jax.Array]:
    """Arguments of a kernel that XLA must leave in HBM. Small ones it would place in VMEM, from
    where the blocks of a kernel are copied by vector instructions instead of DMA."""
    if interpret:
        return list(arrays)
    return [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]


# --------------------------------------------------------------------------------------------
# Sorting
# --------------------------------------------------------------------------------------------


def _place(dimension: int) -> jax.Array:
    """Number of each element's sublane (0) or lane (1) in a register."""
    return iota((SUBLANES, LANES), dimension)


def _exchange(x: jax.Array, bit: int) -> jax.Array:
    """Within a register [8, 128]: the smaller of each pair first. The lowest 3 bits of a place
    number sublanes, the other 7 lanes."""
    axis, step, size = (0, 1 << bit, SUBLANES) if bit < 3 else (1, 1 << bit - 3, LANES)
    upper = (_place(axis) & step) != 0
    below = pltpu.roll(x, step, axis)
    above = below if 2 * step == size else pltpu.roll(x, size - step, axis)
    return jnp.where(upper, jnp.maximum(x, below), jnp.minimum(x, above))


def _descending(level: int, register_bits: int):
    """-1 where an element's run of 2^level must descend, else 0, over a register.

    Of levels beyond the bits that number registers; the last level ascends as a whole.
    """
    bit = level - register_bits
    if bit >= 10:
        return jnp.zeros((SUBLANES, LANES), jnp.int32)
    place = _place(0) | (_place(1) << 3)
    return -((place >> bit) & 1)


def _passes(level: int, register_bits: int) -> list[range]:
    """Bits of the register number that a level's passes compare, highest first, up to 3 at once."""
    bits = range(min(level, register_bits))
    return [bits[max(0, stop - 3) : stop] for stop in range(len(bits), 0, -3)]


def _sort_pass(source, target, level: int, bits: range, register_bits: int, group) -> None:
    """One pass over 2^len(bits) registers: the network's comparisons of `bits`, highest first.

    Runs that must descend are kept complemented and sorted ascending; a level's first pass changes
    from the last level's runs to its own, and compares within registers what lies above all bits.
    """
    low, above = bits.start, bits.stop
    first = group >> low << above | group & ((1 << low) - 1)
    places = [(first + (j << low)) * SUBLANES for j in range(1 << len(bits))]
    at = [pl.ds(pl.multiple_of(place, SUBLANES), SUBLANES) for place in places]
    x = [source[rows, :] for rows in at]
    if above == min(level, register_bits):
        for j in range(len(x)):
            if level <= register_bits and j >= len(x) // 2 and level > 1:
                x[j] = ~x[j]  # the last level's descending runs: those with the highest bit set
        if level < register_bits:
            flip = -((first >> level) & 1)
            x = [one ^ flip for one in x]
        else:
            flip = _descending(level, register_bits)
            if level > register_bits:
                flip = flip ^ _descending(level - 1, register_bits)
            x = [one ^ flip for one in x]
        for bit in reversed(range(level - register_bits)):
            x = [_exchange(one, bit) for one in x]
    for bit in reversed(range(len(bits))):
        for j in range(len(x)):
            if not j >> bit & 1:
                a, b = x[j], x[j | 1 << bit]
                x[j], x[j | 1 << bit] = jnp.minimum(a, b), jnp.maximum(a, b)
    for rows, one in zip(at, x, strict=True):
        target[rows, :] = one


def _reorder(work_ref, sorted_ref, registers: int) -> None:
    """From the network's order (lane, sublane, register) to rows of 128, by transposes."""
    height = min(registers, LANES)  # registers a transpose takes of one sublane
    for row in range(registers * SUBLANES // LANES):
        start = row * LANES
        pieces = [
            work_ref[
                pl.ds((first % registers) * SUBLANES + first // registers, height, stride=SUBLANES),
                :,
            ]
            for first in range(start, start + LANES, height)
        ]
        square = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)
        rows = pl.ds(row, LANES, stride=registers * SUBLANES // LANES)
        sorted_ref[rows, :] = square.T


def _sort_kernel(
    keys_ref,  # [R, 128]
    sorted_ref,  # [R + 8, 128]
    counts_ref,  # [N / 128, 128]
    work_ref,  # VMEM [R, 128]
    *,
    bits: int,
):
    """A bitonic network. An element's place is (lane, sublane, register), registers lowest: the
    network compares close places most often, and between registers that takes no shuffle."""
    registers, high = keys_ref.shape[0] // SUBLANES, counts_ref.shape[0]
    register_bits = registers.bit_length() - 1
    source = keys_ref
    for level in range(1, register_bits + 11):
        for compared in _passes(level, register_bits):
            groups = registers >> len(compared)
            unroll = min(_UNROLL, groups)

            def step(i, carry, source=source, level=level, compared=compared, unroll=unroll):
                for j in range(unroll):
                    group = i * unroll + j
                    _sort_pass(source, work_ref, level, compared, register_bits, group)
                return carry

            lax.fori_loop(0, groups // unroll, step, 0)
            source = work_ref
    _reorder(work_ref, sorted_ref, registers)

    def at(register):
        return pl.ds(pl.multiple_of(register * SUBLANES, SUBLANES), SUBLANES)

    sorted_ref[at(registers), :] = jnp.full((SUBLANES, LANES), _NO_PAIR, jnp.int32)

    def count(i, total):
        chunk = lax.shift_right_logical(sorted_ref[at(i), :], bits)
        for r in range(SUBLANES):
            row = chunk[r : r + 1]
            number = iota((LANES, LANES), 0)
            low = jnp.where((row & (LANES - 1)) == number, 1.0, 0.0).astype(jnp.bfloat16)
            number = iota((high, LANES), 0)
            top = jnp.where(row // LANES == number, 1.0, 0.0).astype(jnp.bfloat16)
            total = total + lax.dot_general(
                top, low, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
        return total

    total = lax.fori_loop(0, registers, count, jnp.zeros((high, LANES), jnp.float32))
    counts_ref[...] = total.astype(jnp.int32)


def _sort_call(keys: jax.Array, plan: Plan, interpret) -> tuple[jax.Array, jax.Array]:
    """keys [G, segments, J * S] -> sorted [G, segments, R + 8, 128], counts [G, segments, N]."""
    groups = keys.shape[0]
    keys = jnp.pad(
        keys, ((0, 0), (0, 0), (0, plan.pairs - keys.shape[-1])), constant_values=_NO_PAIR
    )
    rows = plan.pairs // LANES
    high = -(-plan.chunks // _REGISTER) * SUBLANES
    block = lambda rows: pl.BlockSpec((None, None, rows, LANES), lambda g, s: (g, s, 0, 0))
    levels = plan.pairs.bit_length() - 1
    lead = (groups, plan.segments)
    ordered, counts = pl.pallas_call(
        functools.partial(_sort_kernel, bits=plan.bits),
        grid=lead,
        in_specs=[block(rows)],
        out_specs=[block(rows + SUBLANES), block(high)],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, rows + SUBLANES, LANES), jnp.int32),
            jax.ShapeDtypeStruct((*lead, high, LANES), jnp.int32),
        ],
        scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.int32)],
        **grid_options(lead, 2, 64 * 1024 * 1024),
        cost_estimate=pl.CostEstimate(
            flops=groups * plan.segments * plan.pairs * levels * (levels + 1) // 2,
            transcendentals=0,
            bytes_accessed=2 * 4 * groups * plan.segments * plan.pairs,
        ),
        interpret=interpret,
        name="routing_sort",
    )(*in_main_memory(interpret, keys.reshape(*lead, rows, LANES)))
    return ordered, counts.reshape(*lead, -1)[..., : plan.chunks]


# --------------------------------------------------------------------------------------------
# Tiles
# --------------------------------------------------------------------------------------------


def _emit_kernel(
    segment_ref,  # SMEM [steps]: segment of each step, for the block specs
    info_ref,  # SMEM [1, 1, 1, 2 * 8]: start and count of each tile
    sorted_ref,  # [1, 1, R + 8, 128]
    rows_ref,  # [1, 8 * max(rows / 128, 1), 128]
    *,
    rows: int,
    bits: int,
    nothing: int,
    stride: int,
):
    del segment_ref
    if rows < LANES:
        _emit_small_tiles(info_ref, sorted_ref, rows_ref, rows, bits, nothing, stride)
        return
    height = rows // LANES
    lane = iota((1, LANES), 1)
    for tile in range(SUBLANES):
        start, count = _start_and_count(info_ref, tile)
        row, shift = start // LANES, start % LANES
        # Rotated left by `shift`; a lane beyond the end of its row comes from the next one.
        parts = [
            pltpu.roll(sorted_ref[0, 0, pl.ds(row + i, 1)], (LANES - shift) % LANES, 1)
            for i in range(height + 1)
        ]
        for i in range(height):
            pair = jnp.where(lane < LANES - shift, parts[i], parts[i + 1])
            used = lane < count - i * LANES
            query = jnp.where(used, pair & ((1 << bits) - 1), nothing)
            rows_ref[0, tile * height + i : tile * height + i + 1] = query * stride


def _emit_small_tiles(
    info_ref, sorted_ref, rows_ref, rows: int, bits: int, nothing: int, stride: int
):
    """`_emit_kernel` where several tiles share a row of 128 lanes."""
    lane = iota((1, LANES), 1)
    for row in range(SUBLANES):
        queries = jnp.full((1, LANES), nothing, jnp.int32)
        for part in range(LANES // rows):
            start, count = _start_and_count(info_ref, row * (LANES // rows) + part)
            place = lane - part * rows  # within the tile
            # Lane 0 of the row that holds the tile's first pair at lane part * rows.
            begin = start + LANES - part * rows
            at, shift = begin // LANES - 1, begin % LANES
            turn = (LANES - shift) % LANES
            here = pltpu.roll(sorted_ref[0, 0, pl.ds(jnp.maximum(at, 0), 1)], turn, 1)
            after = pltpu.roll(sorted_ref[0, 0, pl.ds(at + 1, 1)], turn, 1)
            pair = jnp.where(lane < LANES - shift, here, after)
            used = (place >= 0) & (place < count)
            queries = jnp.where(used, pair & ((1 << bits) - 1), queries)
        rows_ref[0, row : row + 1] = queries * stride


def _start_and_count(info_ref, tile: int):
    """Of a tile's rows among the sorted pairs; the two stand side by side."""
    return info_ref[0, 0, 0, 2 * tile], info_ref[0, 0, 0, 2 * tile + 1]


def _emit_call(ordered, start, count, plan: Plan, interpret) -> jax.Array:
    """Rows of all tiles, int32 [G, tiles, rows]."""
    groups = ordered.shape[0]
    each, height = plan.group, SUBLANES * max(1, plan.rows // LANES)
    steps = plan.all_tiles // each
    info = jnp.stack([start, count], axis=-1).reshape(groups, steps, 1, 2 * each)
    segments = jnp.asarray(plan.segment_of_tile()[::each], jnp.int32)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(groups, steps),
        in_specs=[
            pl.BlockSpec(
                (1, 1, 1, 2 * each), lambda g, i, seg: (g, i, 0, 0), memory_space=pltpu.SMEM
            ),
            pl.BlockSpec((1, 1, *ordered.shape[2:]), lambda g, i, seg: (g, seg[i], 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, height, LANES), lambda g, i, seg: (g, i, 0)),
    )
    rows = pl.pallas_call(
        functools.partial(
            _emit_kernel,
            rows=plan.rows,
            bits=plan.bits,
            nothing=plan.segment,
            stride=plan.stride,
        ),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((groups, steps * height, LANES), jnp.int32),
        **grid_options((groups, steps), 2, 64 * 1024 * 1024),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=4 * groups * (ordered[0].size + plan.all_tiles * plan.rows),
        ),
        interpret=interpret,
        name="routing_emit",
    )(segments, info, *in_main_memory(interpret, ordered))
    return rows.reshape(groups, plan.all_tiles, plan.rows)

"""Routing of selected pairs: nothing dropped, nothing invented, sorted by chunk, one chunk a tile.

The kernels are interpreted; the expectation is a set of pairs built by plain loops.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import routing
from tests.ops.attention_cases import random_selection

CHUNK = 64


def plan_of(queries, segment, slots, first=0, rows=128, chunks=None, **others):
    return routing.make_plan(
        queries=queries,
        segment=segment,
        rows=rows,
        chunks=queries // CHUNK if chunks is None else chunks,
        slots=slots,
        chunk_size=CHUNK,
        first=first,
        **others,
    )


@functools.cache
def compiled(plan):
    run = functools.partial(routing.route, plan=plan, interpret=True)
    return jax.jit(lambda *x: (lambda r: (r.rows, r.chunk, r.count))(run(*x)))


def check(selection, plan):
    batch, length, heads, _ = selection.shape
    own = np.broadcast_to(np.arange(length, dtype=np.int32) // CHUNK, (batch, length))
    rows, chunk, count = map(np.asarray, compiled(plan)(jnp.asarray(selection), jnp.asarray(own)))
    assert (rows % plan.stride == 0).all()
    rows = rows // plan.stride
    segment = np.asarray(plan.segment_of_tile())
    selection = np.asarray(selection)
    for group, (b, h) in enumerate(np.ndindex(batch, heads)):
        found = []
        for i in range(plan.all_tiles):
            used = rows[group, i, : count[group, i]]
            assert (used < plan.segment).all() and (np.diff(used) > 0).all()
            assert (rows[group, i, count[group, i] :] == plan.segment).all()
            found += [(segment[i] * plan.segment + t, chunk[group, i]) for t in used]
        expected = [
            (t, c)
            for t in range(length)
            for c in selection[b, t, h]
            if 0 <= c < min(own[b, t], plan.chunks)
        ]
        assert sorted(found) == sorted(expected)
        for s in range(plan.segments):  # a chunk's tiles lie together
            mine = chunk[group, segment == s]
            assert (np.diff(mine) >= 0).all()
            steps = mine.reshape(-1, plan.together) // plan.joined
            assert (steps == steps[:, :1]).all()  # a step needs the keys of one block


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["random", "one chunk", "nothing", "not past"])
def test_every_pair_is_routed_once(kind):
    plan = plan_of(768, 384, 3, stride=2)
    chosen = np.array(random_selection(0, 2, 768, 1, CHUNK, 4))
    own = np.arange(768)[None, :, None] // CHUNK
    if kind == "one chunk":  # the most tiles of one chunk
        chosen[...] = -1
        chosen[..., 1] = np.where(own > 0, 0, -1)
    if kind == "nothing":
        chosen[...] = -1
    if kind == "not past":
        chosen[..., 0], chosen[..., 1] = own, own + 3
    check(chosen, plan)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "joined, together, length",
    [(4, 2, 768), pytest.param(3, 8, 1536, marks=pytest.mark.slow)],
)
def test_tiles_of_a_block_fill_whole_steps(joined, together, length):
    plan = plan_of(length, 384, 3, joined=joined, together=together)
    check(random_selection(2, 1, length, 2, CHUNK, 4), plan)
    skewed = np.full((1, length, 2, 3), -1, np.int32)
    skewed[:, CHUNK:, 0, 0] = 0  # one head wants the first chunk only
    skewed[:, :, 1, 0] = np.arange(length) // CHUNK - 1  # the other the one before its own
    check(skewed, plan)


@pytest.mark.thorough
@pytest.mark.parametrize("rows, together", [(64, 2), (16, 4), (8, 1)])
def test_small_tiles_share_rows_of_lanes(rows, together):
    """As the tiles of query heads that share a choice."""
    joined = 2 if together > 1 else 1
    plan = plan_of(768, 384, 3, rows=rows, stride=4, joined=joined, together=together)
    check(random_selection(3, 1, 768, 2, CHUNK, 4), plan)
    skewed = np.full((1, 768, 2, 3), -1, np.int32)
    skewed[:, CHUNK:, 0, 0] = 0
    skewed[:, :, 1, 0] = np.arange(768) // CHUNK - 1
    check(skewed, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    "queries, segment, slots, rows", [(2048, 1024, 7, 256), (4160, 4160, 2, 128)]
)
def test_long_segments(queries, segment, slots, rows):
    """Several registers to sort, in networks of several merges."""
    check(
        random_selection(1, 1, queries, 2, CHUNK, slots + 1),
        plan_of(queries, segment, slots, rows=rows),
    )


@pytest.mark.parametrize("known", [True, False])
def test_the_number_of_tiles_is_enough_for_the_worst(known):
    """Every chunk of a segment chosen by one more query than fills whole tiles."""
    plan = plan_of(8 * 1024, 4096, 3, first=0 if known else None)
    for s, tiles in enumerate(plan.tiles):
        visible = min((s + 1) * 4096 // CHUNK - 1, plan.chunks) if known else plan.chunks
        pairs = sum(min(3, t // CHUNK) for t in range(s * 4096, (s + 1) * 4096))
        counts = np.ones(visible, int)  # spread so that as many tiles as possible are begun
        left = pairs - visible
        for i in range(visible):
            more = min(left // 128 * 128, (4096 - 1) // 128 * 128)
            counts[i] += more
            left -= more
        assert -(-counts // 128).sum() <= tiles
        assert counts.sum() <= pairs


def test_unknown_positions_cost_no_fewer_tiles():
    known, unknown = (plan_of(1024, 512, 2, first=x).all_tiles for x in (0, None))
    assert known <= unknown


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(queries=1000), "1000 queries are not whole segments of 512"),
        (dict(rows=100), "multiple of 128, or 8 to 64, got 100"),
        (dict(chunks=1 << 23), "do not fit 31 bits"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**{"queries": 1024, "segment": 512, "slots": 2, **change})


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("chunks, slots", [(64, 2), (2048, 63), (2047, 63), (1 << 20, 5), (1, 1)])
def test_the_largest_segment_is_the_largest_that_fits(chunks, slots, numbered):
    def fits(segment):
        plan = routing.Plan(segment, 1, 64, chunks, slots, (8,), numbered)
        return chunks << plan.bits <= 2**31 - 2

    largest = routing.largest_segment(chunks, slots, numbered=numbered)
    assert fits(largest) and not fits(largest + 1)

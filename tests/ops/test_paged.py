"""Attention to cache pages, and the choice of them, against their oracles: empty, partly filled and
repeated pages, ragged offsets, sizes that are not round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.cache import Pages
from rwkvx_jax.modules.pages import write_rows
from rwkvx_jax.ops import paged, paged_selection
from rwkvx_jax.ops.paged import attend_pages, attend_piece
from rwkvx_jax.ops.paged_selection import select_pages
from rwkvx_jax.ops.selection import Selector
from tests.helpers import assert_close


def _normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("tile", [1024, 16, 7])
def test_one_token_equals_oracle(tile, monkeypatch):
    monkeypatch.setattr(paged, "TILE", tile)
    rng = np.random.default_rng(0)
    rows, pages, chunk, per_row = 5, 9, 48, 4
    q, keys = _normal(rng, rows, 16), _normal(rng, pages, chunk, 16)
    values = _normal(rng, pages, chunk, 12)
    page = jnp.asarray(rng.integers(0, pages, (rows, per_row)), jnp.int32)
    visible = rng.integers(1, chunk + 1, (rows, per_row)) * rng.integers(0, 2, (rows, per_row))
    visible[0], visible[1], visible[2] = chunk, 1, 0
    hidden = visible * 0 if tile == 1024 else rng.integers(0, chunk // 2, visible.shape)
    hidden[0, 0] = visible[0, 0] * (tile == 7)  # a page of which nothing is left
    visible, hidden = jnp.asarray(visible, jnp.int32), jnp.asarray(hidden, jnp.int32)
    given = None if tile == 1024 else hidden
    fast, slow = (
        attend_pages(q, keys, values, page, visible, given, scale=0.3, implementation=name)
        for name in ("tiles", "gather")
    )
    assert_close(fast, slow, rel=1e-6)
    assert not np.asarray(fast[2]).any()
    # The oracle itself, by a loop over rows.
    for r in (0, 1, 3):
        seen = list(zip(page[r], hidden[r], visible[r], strict=True))
        k = np.concatenate([keys[p][h:n] for p, h, n in seen])
        v = np.concatenate([values[p][h:n] for p, h, n in seen])
        weights = np.exp(k @ q[r] * 0.3)
        assert_close(slow[r], weights @ v / max(weights.sum(), 1e-30), rel=1e-5)


def test_invisible_rows_may_hold_anything():
    rng = np.random.default_rng(1)
    q, keys, values = _normal(rng, 2, 8), _normal(rng, 3, 6, 8), _normal(rng, 3, 6, 8)
    page, visible = jnp.asarray([[0, 1], [2, 0]]), jnp.asarray([[6, 2], [3, 0]])
    run = lambda k, v: attend_pages(q, k, v, page, visible, scale=1.0)
    dirty = lambda x: x.at[1, 2:].set(1e9).at[2, 3:].set(-1e9)
    assert_close(run(dirty(keys), dirty(values)), run(keys, values), rel=1e-7)


def _selection(rng, offset, time, heads, chunk, count):
    """Random past chunks of every query, -1 where there are too few."""
    selection = np.full((len(offset), time, heads, count), -1, np.int32)
    for b, t, h in np.ndindex(selection.shape[:3]):
        past = rng.permutation((int(offset[b]) + t) // chunk)[:count]
        selection[b, t, h, : len(past)] = past
    return jnp.asarray(selection)


@pytest.mark.parametrize("kind", ["sparse", "own chunk", "full", "window"])
@pytest.mark.parametrize("batch, time, heads, chunk, pages", [(2, 70, 3, 16, 9), (1, 45, 2, 70, 3)])
def test_piece_in_place_equals_slice(kind, batch, time, heads, chunk, pages):
    rng = np.random.default_rng(2)
    groups = 3 * batch * heads  # three attention blocks; the second one is read
    keys, values = _normal(rng, groups, pages * chunk, 16), _normal(rng, groups, pages * chunk, 12)
    q = _normal(rng, batch, time, heads, 16)
    offset = rng.integers(0, pages * chunk - time, batch).astype(np.int32)
    counts = {"sparse": 2, "own chunk": 0}
    selection = None
    if (count := counts.get(kind)) is not None:
        selection = _selection(rng, offset, time, heads, chunk, count)
    fast, slow = (
        jax.jit(
            lambda q, keys, values, first, name=name: attend_piece(
                q,
                keys,
                values,
                first,
                selection,
                jnp.asarray(offset),
                chunk_size=chunk,
                scale=0.25,
                window=19 if kind == "window" else None,
                implementation=name,
            )
        )(q, keys, values, jnp.int32(batch * heads))
        for name in ("in_place", "slice")
    )
    assert_close(fast, slow, rel=1e-6)


SELECTORS = [Selector(), Selector("max", 4), Selector("pooled", 2), Selector("bounds")]
SELECTORS.append(Selector("seer"))


@pytest.mark.thorough
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("pages, once", [(11, 1), (11, 10), (27, 1000), (6, 8)])
@pytest.mark.parametrize("positions", [(5, 87, 40, 23), (1, 0, 7, 5), (3, 88, 88, 60)], ids=str)
def test_pages_chosen_in_place_are_those_of_the_slice(
    selector, pages, once, positions, monkeypatch
):
    """Blocks that do not divide the pages, ragged rows, one or all with nothing past, a full cache;
    behind the past pages are NaNs. Every other page is a copy of the one before: ties."""
    layers, batch, heads, size, chunk = 3, 4, 2, 12, 8
    monkeypatch.setattr(paged_selection, "SCORED_BYTES", once * 4 * selector.rows * size)
    rng = np.random.default_rng(7)
    q = _normal(rng, batch, 1, heads, size * selector.query_vectors)
    rows = np.array(_normal(rng, layers, batch, heads, pages * selector.rows, size))
    pairs = rows.reshape(layers, batch, heads, pages, selector.rows, size)
    pairs[:, :, :, 1::2] = pairs[:, :, :, :-1:2]
    positions = np.array(positions)[:, None] * pages // 11
    for b, position in enumerate(positions[:, 0]):
        rows[:, b, :, position // chunk * selector.rows :] = np.nan
    for count in (1, 3, 6, 13):
        run = lambda name, count=count: jax.jit(
            lambda index: select_pages(
                q,
                jnp.asarray(rows),
                index,
                jnp.asarray(positions, jnp.int32),
                chunk_size=chunk,
                count=count,
                selector=selector,
                implementation=name,
            )
        )
        fast, slow = run("in_place"), run("slice")
        for layer in range(layers):
            chosen = fast(layer)
            np.testing.assert_array_equal(chosen, slow(layer))
            found = np.minimum(positions // chunk, count)[:, :, None]
            assert ((chosen >= 0).sum(-1) == found).all()


def test_copies_go_to_the_lower_index():
    """Exact ties across blocks: all pages alike, and a query of zeros."""
    rows = jnp.broadcast_to(jnp.linspace(-1, 1, 64), (1, 1, 2, 9001, 64))
    q = jnp.stack([jnp.linspace(0.3, 2, 64), jnp.zeros(64)])[None, None]
    options = {"chunk_size": 8, "count": 9, "implementation": "in_place"}
    chosen = select_pages(q, rows, 0, jnp.full((1, 1), 9001 * 8), **options)
    np.testing.assert_array_equal(chosen, np.broadcast_to(np.arange(9), (1, 1, 2, 9)))


def test_rows_are_written_and_chosen_from_without_a_copy():
    """As a decode step does, in every layer, the cache given away."""
    layers, heads, pages, size = 2, 2, 1 << 15, 64
    rows = lambda *page: jax.ShapeDtypeStruct((layers, 1, heads, pages, *page, size), jnp.float32)
    cache = Pages(rows(2), rows(2), rows())

    def step(cache, q, position):
        def layer(cache, index):
            cache = write_rows(cache, index, q, q, position[:, 0], jnp.ones(1, jnp.int32))
            options = {"chunk_size": 2, "count": 3, "implementation": "in_place"}
            return cache, select_pages(q, cache.key_sums, index, position, **options)

        return jax.lax.scan(layer, cache, jnp.arange(layers))

    args = cache, jnp.ones((1, 1, heads, size)), jnp.zeros((1, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    # One product a page and what the choice makes of it, but never the 64 numbers of a page.
    assert compiled.memory_analysis().temp_size_in_bytes < heads * pages * 4 * 8


def test_a_piece_of_text_is_not_chosen_for_in_place():
    q = jnp.ones((1, 2, 2, 4))
    with pytest.raises(ValueError, match="it serves one token, not 2"):
        select_pages(
            q,
            jnp.ones((1, 1, 2, 5, 4)),
            0,
            jnp.zeros((1, 2), jnp.int32),
            chunk_size=8,
            count=1,
            implementation="in_place",
        )


@pytest.mark.parametrize("stored", [1, 48, 64, 509, 1021, 2042, 6144, 1 << 20])
def test_blocks_divide_all_rows(stored):
    rows = paged._block_rows(stored)
    assert stored % rows == 0 and (rows >= 64 or rows == stored)


def test_unknown_implementation_is_refused():
    one = jnp.zeros((1, 1, 4))
    with pytest.raises(ValueError, match="tiels"):
        attend_pages(
            one[0],
            one,
            one,
            jnp.zeros((1, 1), int),
            jnp.ones((1, 1), int),
            scale=1.0,
            implementation="tiels",
        )

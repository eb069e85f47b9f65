"""Query heads that share key heads, and heads that choose chunks together: every form against its
oracle, and the oracle against one head at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import _splash_attention, full_attention
from rwkvx_jax.ops.paged import attend_pages, attend_piece
from rwkvx_jax.ops.paged_selection import select_pages
from rwkvx_jax.ops.selection import Selector, select_chunks
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from tests.helpers import assert_close
from tests.ops.attention_cases import (
    compare,
    queries_for,
    random_qkv,
    random_selection,
    value_and_gradients,
)

# Query heads, choices, key heads.
HEADS = [(4, 4, 2), (4, 4, 1), (4, 2, 2), (8, 4, 2), (16, 1, 1)]


def grouped_qkv(seed, heads, key_heads, batch=2, length=53, keys=70, values=12):
    q, _, _ = random_qkv(seed, batch, length, heads=heads)
    _, k, v = random_qkv(seed + 1, batch, length, keys, heads=key_heads, values=values)
    return q, k, v


def sparse(implementation, selection, offset, chunk_size=7):
    return value_and_gradients(
        functools.partial(
            sparse_attention,
            chunk_size=chunk_size,
            top_k=selection.shape[3] + 1,
            selection=selection,
            q_offset=offset,
            implementation=implementation,
        )
    )


def full(implementation, offset):
    run = functools.partial(full_attention, q_offset=offset, implementation=implementation)
    return value_and_gradients(run)


def one_head_at_a_time(attend, q, k, v, selection=None):
    """Values and gradients with keys, values and choices repeated for every query head, and the
    gradients of keys and values summed over the heads that share them."""
    repeat = lambda x: jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)
    more = () if selection is None else (repeat(selection),)
    out, dq, dk, dv = attend(q, repeat(k), repeat(v), *more)
    sums = lambda x: x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]).sum(3)
    return out, dq, sums(dk), sums(dv)


@pytest.mark.parametrize("heads, choices, key_heads", HEADS)
def test_sparse_forms_equal_the_oracle(heads, choices, key_heads):
    qkv, offset = grouped_qkv(0, heads, key_heads), jnp.array([3, 17])
    selection = random_selection(2, 2, 53, choices, 7, 4, [3, 17])
    expected = sparse("reference", selection, offset)(*qkv)
    for form in ("xla", "masked"):
        compare(sparse(form, selection, offset)(*qkv), expected)
    if heads == 8:
        oracle = lambda q, k, v, s: sparse("reference", s, offset)(q, k, v)
        compare(expected, one_head_at_a_time(oracle, *qkv, selection), forward=1e-6, gradient=1e-5)


@pytest.mark.parametrize("form", ["xla", "masked"])
def test_all_groups_may_choose_one_chunk(form):
    qkv = grouped_qkv(5, 6, 1, batch=1, length=90, keys=90)
    own = np.arange(90) // 8
    selection = jnp.asarray(np.where(own > 1, 1, -1)[None, :, None, None], jnp.int32)
    actual, expected = (sparse(name, selection, 0, 8)(*qkv) for name in (form, "reference"))
    compare(actual, expected)


@pytest.mark.parametrize("heads, key_heads", [(6, 2), (4, 1)])
def test_full_attention_equals_the_oracle(heads, key_heads, monkeypatch):
    monkeypatch.setattr("rwkvx_jax.ops.blocked_attention.MAX_BLOCK", 16)
    qkv, offset = grouped_qkv(3, heads, key_heads), jnp.array([3, 17])
    expected = full("reference", offset)(*qkv)
    compare(full("blocked", offset)(*qkv), expected)
    compare(expected, one_head_at_a_time(full("reference", offset), *qkv), gradient=1e-5)


def test_splash_takes_grouped_heads():
    q, _, _ = random_qkv(7, 1, 256, heads=4, size=64)
    _, k, v = random_qkv(8, 1, 256, heads=2, size=64)
    fast = functools.partial(_splash_attention, scale=0.125, q_offset=0, interpret=True)
    compare(value_and_gradients(fast)(q, k, v), full("reference", 0)(q, k, v))


SELECTORS = [
    Selector(kind, blocks, together, joined)
    for kind, blocks in (("mean", 1), ("max", 4), ("pooled", 2), ("bounds", 1), ("bounds", 4))
    for together, joined in ((1, "sum"), (2, "sum"), (2, "max"))
]
SELECTORS.append(Selector("seer"))


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_choices_equal_their_oracle(selector):
    q, k, _ = grouped_qkv(11, 8, 2, keys=77)
    q = queries_for(selector, q)
    options = {"chunk_size": 8, "top_k": 4, "q_offset": jnp.array([3, 16]), "selector": selector}
    actual = select_chunks(q, k, **options)
    assert actual.shape == (2, 53, 8 // selector.together, 3)
    np.testing.assert_array_equal(actual, select_chunks_reference(q, k, **options))
    rows = selector.rows_of(k[:, :72], 8).swapaxes(1, 2)
    for name in ("in_place", "slice"):
        paged = select_pages(
            q[:, 40:41],
            jnp.stack([jnp.full_like(rows, jnp.nan), rows]),
            1,
            jnp.array([[43], [56]]),
            chunk_size=8,
            count=3,
            selector=selector,
            implementation=name,
        )
        np.testing.assert_array_equal(paged, actual[:, 40:41])


def test_heads_together_choose_by_the_sum_and_by_the_largest_score():
    """Two heads with scores (2, 0, 1.5) and (0, 2, 1.5) of three chunks."""
    k = jnp.eye(3)[None, :, None]
    q = jnp.array([[2.0, 0, 1.5], [0, 2, 1.5]])[None, None]
    options = {"chunk_size": 1, "top_k": 2, "q_offset": 3}
    for joined, chosen in (("sum", 2), ("max", 0)):
        selector = Selector(together=2, joined=joined)
        for run in (select_chunks, select_chunks_reference):
            assert run(q, k, **options, selector=selector).tolist() == [[[[chosen]]]]


def test_sparse_attention_lets_heads_choose_together():
    q, k, v = grouped_qkv(13, 4, 2, length=70)
    options = {"chunk_size": 8, "top_k": 3}
    selector = Selector(together=2)
    selection = select_chunks(q, k, **options, selector=selector)
    expected = sparse_attention(q, k, v, **options, selection=selection)
    actual = sparse_attention(q, k, v, **options, selector=selector)
    np.testing.assert_array_equal(actual, expected)


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("tile", [1024, 7])
def test_heads_read_pages_together(tile, monkeypatch):
    monkeypatch.setattr("rwkvx_jax.ops.paged.TILE", tile)
    rng = np.random.default_rng(0)
    q, keys, values = normal(rng, 5, 3, 16), normal(rng, 9, 48, 16), normal(rng, 9, 48, 12)
    page = jnp.asarray(rng.integers(0, 9, (5, 4)), jnp.int32)
    visible = jnp.asarray(rng.integers(0, 49, (5, 4)), jnp.int32).at[2].set(0)
    run = lambda q, name: attend_pages(
        q, keys, values, page, visible, scale=0.3, implementation=name
    )
    slow = run(q, "gather")
    assert_close(run(q, "tiles"), slow, rel=1e-6)
    assert_close(slow, jnp.stack([run(q[:, m], "gather") for m in range(3)], axis=1), rel=1e-6)
    assert not np.asarray(slow[2]).any()


@pytest.mark.parametrize("choices", [4, 2, None])
def test_pieces_in_place_equal_slices(choices):
    rng = np.random.default_rng(1)
    batch, time, heads, key_heads, chunk, pages = 2, 30, 4, 2, 16, 9
    keys = normal(rng, 3 * batch * key_heads, pages * chunk, 16)
    values = normal(rng, 3 * batch * key_heads, pages * chunk, 12)
    q, offset = normal(rng, batch, time, heads, 16), jnp.array([7, 100], jnp.int32)
    selection = None
    if choices:
        selection = random_selection(3, batch, time, choices, chunk, 3, np.asarray(offset))
    run = lambda name: attend_piece(
        q,
        keys,
        values,
        jnp.int32(batch * key_heads),
        selection,
        offset,
        chunk_size=chunk,
        scale=0.25,
        key_heads=key_heads,
        implementation=name,
    )
    assert_close(run("in_place"), run("slice"), rel=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=3, v=3), "4 query heads can't share 3 key and value heads evenly"),
        (dict(v=1), "must agree in batch, time and heads"),
        (dict(selection=3), "4 query heads and 2 key heads with 3 choices"),
        (dict(selection=1), "4 query heads and 2 key heads with 1 choices"),
        (dict(selector=Selector(together=3)), "can't choose together in groups of 3"),
        (dict(selector=Selector(together=4)), "4 query heads and 2 key heads with 1 choices"),
        (dict(selector=Selector(together=2, joined="mean")), "joined='mean'"),
    ],
)
def test_heads_that_do_not_divide(change, message):
    heads = dict(q=4, k=2, v=2) | change
    arrays = {n: jnp.zeros((1, 9, heads[n], 4)) for n in "qkv"}
    options = {n: heads[n] for n in ("selector",) if n in heads}
    if "selection" in heads:
        options["selection"] = jnp.zeros((1, 9, heads["selection"], 1), jnp.int32)
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arrays, chunk_size=4, top_k=2, **options)


def test_pieces_refuse_heads_that_do_not_divide():
    x = jnp.zeros((3, 8, 4))
    with pytest.raises(ValueError, match="4 query heads can't share 3 key"):
        attend_piece(
            jnp.zeros((1, 2, 4, 4)), x, x, 0, None, jnp.zeros(1, jnp.int32),
            chunk_size=4, scale=1.0, key_heads=3,
        )  # fmt: skip


@pytest.mark.parametrize("form", ["xla", "masked"])
def test_under_vmap_and_over_devices(form):
    """Mapped rows, and heads and batch rows sharded over an automatic mesh."""
    q, k, v = grouped_qkv(15, 4, 2, length=40, keys=40)
    selection = random_selection(4, 2, 40, 2, 8, 3)
    run = lambda q, k, v, s: sparse(form, s, 0, 8)(q, k, v)
    expected = run(q, k, v, selection)
    rows = [x[:, None] for x in (q, k, v, selection)]
    assert_close(jax.vmap(run)(*rows)[0][:, 0], expected[0], rel=1e-6)
    mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b", None, "h"))
    sharded = jax.jit(run)(*jax.device_put((q, k, v, selection), place))
    compare(sharded, expected)

"""The mass of full attention by chunks, and the loss that teaches it, against the whole matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops import chunk_mass
from rwkvx_jax.ops.chunk_mass import log_mass, selection_loss
from rwkvx_jax.ops.selectors import Selector
from tests.helpers import assert_close

CHUNK = 8


def attention(q, k):
    """Weights [B, H, T, T] of full causal attention."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k, precision="highest") * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf), -1)


def of_chunks(weights):
    weights = jnp.pad(weights, [(0, 0)] * 3 + [(0, -weights.shape[3] % CHUNK)])
    return weights.reshape(*weights.shape[:3], -1, CHUNK).sum(-1)


def plain_loss(q, k, index_q, index_k, blocks):
    """Sums [B, S] of the selector "bounds", from whole matrices."""
    batch, length, choices, size = index_q.shape
    chunks = length // CHUNK
    parts = index_k[:, : chunks * CHUNK].reshape(batch, chunks, blocks, -1, choices, size)
    of_queries = index_q[:, :, None, None]  # [B, T, 1, 1, S, I]
    bounds = [of_queries * x[:, None] for x in (parts.min(3), parts.max(3))]
    return plain_divergence(q, k, jnp.maximum(*bounds).sum(-1).max(3) * size**-0.5)


def plain_gate_loss(q, k, index_q, index_k):
    """Sums [B, S] of the selector "seer", from whole matrices."""
    batch, length, groups, size = index_k.shape
    chunks = length // CHUNK
    parts = index_k[:, : chunks * CHUNK].reshape(batch, chunks, CHUNK, groups, size)
    pooled = jnp.concatenate([parts.min(2), parts.max(2), parts.mean(2)], axis=-1)
    pooled = jnp.repeat(pooled, index_q.shape[2] // groups, axis=2)
    scores = jnp.einsum("btsf,bnsf->btns", index_q, pooled, precision="highest")
    return plain_divergence(q, k, scores * size**-0.5)


def plain_divergence(q, k, scores):
    """Sums [B, S] for scores [B, T, N, S]."""
    length, chunks = scores.shape[1:3]
    past = (np.arange(chunks) < np.arange(length)[:, None] // CHUNK)[None, :, :, None]
    log_p = jax.nn.log_softmax(jnp.where(past, scores, -1e30), axis=2)
    mass = of_chunks(attention(q, k))[..., :chunks].transpose(0, 2, 3, 1)  # [B, T, N, H]
    mass = jnp.where(past, mass, 0)
    mass /= mass.sum(2, keepdims=True).clip(1e-30)
    mass = mass.reshape(*scores.shape, -1).mean(-1)  # of the heads of a choice
    terms = mass * (jnp.log(jnp.where(past, mass, 1)) - log_p)
    return jnp.where(past, terms, 0).sum((1, 2))


def arrays(heads, groups, choices, length, batch=2, size=16, index=4):
    keys = jax.random.split(jax.random.key(heads + length), 4)
    shapes = [(heads, size), (groups, size), (choices, index), (choices, index)]
    return [
        jax.random.normal(key, (batch, length, *s)) for key, s in zip(keys, shapes, strict=True)
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunk_mass, "QUERIES_AT_ONCE", 16)
    monkeypatch.setattr(chunk_mass, "KEYS_AT_ONCE", 24)


def test_mass_is_that_of_the_whole_matrix():
    q, k, _, _ = arrays(4, 2, 2, 53)
    at = jnp.array([52, 3, 24, 8, 7])
    found = log_mass(q[:, at], k, at, chunk_size=CHUNK)
    expected = of_chunks(attention(q, k))[:, :, at]
    assert_close(jax.nn.softmax(found, -1), expected, rel=1e-5)
    assert np.isneginf(np.asarray(found)[:, :, 1, 1:]).all()


@pytest.mark.parametrize(
    "heads, groups, choices, blocks", [(2, 2, 2, 1), (4, 2, 1, 4), (4, 1, 2, 8)]
)
def test_loss_and_gradients_are_those_of_the_whole_matrix(heads, groups, choices, blocks):
    q, k, *index = arrays(heads, groups, choices, 53)
    weights = jnp.arange(1.0, 2 * choices + 1).reshape(2, choices)
    selector = Selector("bounds", blocks)
    loss = functools.partial(selection_loss, chunk_size=CHUNK, selector=selector)
    summed = lambda f, *more: lambda *xs: (weights * f(*xs, *more)).sum()
    assert_close(jax.jit(loss)(q, k, *index), plain_loss(q, k, *index, blocks), rel=1e-5)
    found = jax.jit(jax.grad(summed(loss), (0, 1, 2, 3)))(q, k, *index)
    expected = jax.jit(jax.grad(summed(plain_loss, blocks), (2, 3)))(q, k, *index)
    for actual, wanted in zip(found[2:], expected, strict=True):
        assert_close(actual, wanted, rel=1e-4)
    assert not np.asarray(found[0]).any() and not np.asarray(found[1]).any()


def test_loss_of_the_gate_is_that_of_the_whole_matrix():
    """One head of keys for two choices."""
    q, k, _, _ = arrays(4, 1, 2, 53, size=6)
    index = jax.random.normal(jax.random.key(9), (2, 53, 2, 18)), k
    loss = functools.partial(selection_loss, chunk_size=CHUNK, selector=Selector("seer"))
    weights = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    summed = lambda f: lambda q, k, *index: (weights * f(q, k, *index)).sum()
    assert_close(jax.jit(loss)(q, k, *index), plain_gate_loss(q, k, *index), rel=1e-5)
    found = jax.jit(jax.grad(summed(loss), (0, 1, 2, 3)))(q, k, *index)
    expected = jax.jit(jax.grad(summed(plain_gate_loss), (2, 3)))(q, k, *index)
    for actual, wanted in zip(found[2:], expected, strict=True):
        assert_close(actual, wanted, rel=1e-4)
    assert not np.asarray(found[0]).any() and not np.asarray(found[1]).any()


SIZES = (3 * CHUNK, 2 * CHUNK, 13)  # documents that begin at chunks


def test_loss_of_packed_documents_is_that_of_each_alone():
    xs = arrays(4, 2, 2, sum(SIZES))
    ids = jnp.asarray(np.repeat([[1, 2, 3]], SIZES, axis=1).repeat(2, 0), jnp.int32)
    loss = functools.partial(selection_loss, chunk_size=CHUNK, selector=Selector("bounds", 4))
    ends = np.cumsum(SIZES)

    def alone(*xs):
        return sum(
            loss(*(x[:, end - n : end] for x in xs)) for n, end in zip(SIZES, ends, strict=True)
        )

    assert_close(loss(*xs, ids), alone(*xs), rel=1e-5)
    found = jax.jit(jax.grad(lambda *xs: loss(*xs, ids).sum(), (2, 3)))(*xs)
    expected = jax.jit(jax.grad(lambda *xs: alone(*xs).sum(), (2, 3)))(*xs)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, rel=1e-4)


def test_a_document_adds_what_it_adds_alone_wherever_the_next_one_begins():
    first = 21
    xs, others = arrays(4, 2, 2, 53), arrays(4, 2, 2, 54)
    others = [
        jnp.concatenate([o[:, :first], x[:, first:]], 1) for o, x in zip(others, xs, strict=True)
    ]
    ids = jnp.asarray(np.repeat([[1, 2]], (first, 53 - first), axis=1).repeat(2, 0), jnp.int32)
    loss = functools.partial(selection_loss, chunk_size=CHUNK, selector=Selector("bounds", 4))
    alone = lambda xs: loss(*(x[:, :first] for x in xs))
    change = loss(*xs, ids) - loss(*others, ids)
    assert_close(change, alone(xs) - alone(others), rel=1e-4)


def test_without_past_chunks_there_is_no_loss():
    few = [x[:, : CHUNK - 1] for x in arrays(2, 2, 2, 40)]
    options = {"chunk_size": CHUNK, "selector": Selector("bounds", 2)}
    assert not np.asarray(selection_loss(*few, **options)).any()


def test_a_selector_of_several_queries_is_refused():
    q, k, *index = arrays(4, 2, 2, 20)
    with pytest.raises(ValueError, match="one index query a choice"):
        selection_loss(*(q, k), *index, chunk_size=CHUNK, selector=Selector("mean", together=2))


def test_packed_documents_are_documents_alone():
    """Of 24 and 21 tokens, the latter after padding of 8; their gradients, too."""
    q, k, *index = arrays(4, 2, 2, 53)
    ids = jnp.repeat(jnp.array([[1, 0, 2], [1, 0, 2]]), jnp.array([24, 8, 21]), axis=1)
    selector = Selector("bounds", 2)
    loss = functools.partial(selection_loss, chunk_size=CHUNK, selector=selector)
    parts = slice(0, 24), slice(32, 53)
    alone = lambda *xs: sum(loss(*(x[:, part] for x in xs)) for part in parts)
    assert_close(loss(q, k, *index, ids), alone(q, k, *index), rel=1e-5)
    found = jax.jit(jax.grad(lambda *xs: loss(*xs, ids).sum(), (2, 3)))(q, k, *index)
    expected = jax.jit(jax.grad(lambda *xs: alone(*xs).sum(), (2, 3)))(q, k, *index)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, rel=1e-4)


@pytest.mark.parametrize("blocks", [1, 4])
def test_no_document_learns_from_another(blocks):
    """The second begins within a chunk."""
    q, k, *index = arrays(4, 2, 2, 53)
    ids = jnp.where(jnp.arange(53) < 19, 1, 2)[None].repeat(2, axis=0)
    options = {"chunk_size": CHUNK, "selector": Selector("bounds", blocks)}
    of = lambda *xs: jax.grad(
        lambda *xs: selection_loss(*xs, ids, **options).sum(), (2, 3)
    )(*xs)  # fmt: skip
    found = jax.jit(of)(q, k, *index)
    other = [x.at[:, :19].multiply(-3.0) for x in (q, k, *index)]
    for actual, wanted in zip(jax.jit(of)(*other), found, strict=True):
        assert np.isfinite(np.asarray(wanted)).all() and np.abs(wanted[:, 19:]).max() > 0
        assert_close(actual[:, 19:], wanted[:, 19:], rel=1e-6)

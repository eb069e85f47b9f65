"""Losses: blocks, masks, L2Wrap and LongCE against plain code, and what they keep in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.config import LongCEConfig
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.training.losses import (
    longce_weights,
    target_mask,
    token_losses,
    token_weights,
)
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, TINY, random_params  # noqa: F401

CONFIG = dataclasses.replace(TINY, num_blocks=1, num_attention_blocks=0)
BATCH, TIME = 2, 21


class Linear:
    """As much of a model as a loss needs: features from a table, and a head."""

    def __init__(self, table, weight):
        self.table, self.weight = table, weight

    def features(self, tokens, segment_ids=None):  # sees no other token, whatever its document
        return self.table[tokens]

    def observe(self, tokens, look, segment_ids=None, choosing=False):  # it has no attention
        return self.features(tokens, segment_ids), None

    def head(self, x):
        return x @ self.weight


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(40, 8), draw(8, 40) * 2


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 40, (BATCH, TIME + 1)), jnp.int32)


def plain_loss(table, weight, tokens):
    log_p = jax.nn.log_softmax(table[tokens[:, :-1]] @ weight)
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]


@pytest.mark.thorough
@pytest.mark.parametrize("block", [1, 2, 5, 14, 42, 1000])
def test_blocked_cross_entropy_is_the_plain_one(linear, tokens, block):
    weights = jnp.asarray(np.random.default_rng(2).uniform(size=(BATCH, TIME)), jnp.float32)
    blocked = lambda t, w: jnp.sum(weights * token_losses(Linear(t, w), tokens, block)[0])
    plain = lambda t, w: jnp.sum(weights * plain_loss(t, w, tokens))
    found = jax.value_and_grad(blocked, argnums=(0, 1))(*linear)
    expected = jax.value_and_grad(plain, argnums=(0, 1))(*linear)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, rel=1e-5)


def intermediate_shapes(jaxpr):
    """Shapes of everything that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from intermediate_shapes(inner)


def test_logits_of_all_tokens_never_exist_at_once(linear, tokens):
    block = 6
    loss = lambda t, w: token_losses(Linear(t, w), tokens, block)[0].sum()
    shapes = list(intermediate_shapes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*linear).jaxpr))
    with_vocabulary = [s for s in shapes if len(s) > 1 and s[-1] == 40 and s[-2] != 8]
    assert with_vocabulary and max(map(np.prod, with_vocabulary)) <= block * 40
    plain = jax.grad(lambda t, w: plain_loss(t, w, tokens).sum(), (0, 1))
    shapes = list(intermediate_shapes(jax.make_jaxpr(plain)(*linear).jaxpr))
    assert (BATCH, TIME, 40) in shapes  # so this way of looking does find them


def test_l2wrap_gradient_is_the_original_rule(linear, tokens):
    """max_logit * 1e-4 / (B T) at each position's largest logit, nothing elsewhere."""
    logits = linear[0][tokens[:, :-1]] @ linear[1]

    class Given(Linear):
        def features(self, tokens, segment_ids=None):
            return self.table

        def head(self, x):
            return x

    loss = lambda x: 0.5e-4 / (BATCH * TIME) * token_losses(Given(x, None), tokens, 7)[1].sum()
    found = np.asarray(jax.grad(loss)(logits))
    expected = np.zeros_like(found)
    for b in range(BATCH):
        for t in range(TIME):
            best = int(np.argmax(logits[b, t]))
            expected[b, t, best] = logits[b, t, best] * 1e-4 / (BATCH * TIME)
    assert_close(found, expected, rel=1e-6)


def test_weights_average_over_tokens_or_samples():
    mask = jnp.asarray([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], jnp.float32)
    assert_close(token_weights(mask, "token"), np.asarray(mask) / 4, rel=1e-6)
    expected = [[1 / 6, 1 / 6, 1 / 6, 0], [0, 1 / 2, 0, 0], [0, 0, 0, 0]]
    assert_close(token_weights(mask, "sample"), expected, rel=1e-6)
    for average in ("token", "sample"):
        assert not np.any(token_weights(jnp.zeros((2, 3)), average))


SEGMENTS = np.asarray([[1] * 6 + [2] + [3] * 9 + [0] * 5, [1] * 4 + [0] * 3 + [2] * 14])


def random_mask(seed=4):
    mask = np.random.default_rng(seed).integers(0, 2, (BATCH, TIME)).astype(np.float32)
    mask[0, 7:16] = 0  # a document without targets
    return mask


def slow_weights(mask, segment_ids, average):
    """Weights of a batch: position by position, then document by document."""
    weights, documents = np.zeros_like(mask), set()
    for b, t in np.ndindex(mask.shape):
        own = segment_ids[b, t]
        if own > 0 and (t + 1 == mask.shape[1] or segment_ids[b, t + 1] == own):
            weights[b, t] = mask[b, t]
            documents |= {(b, own)} if mask[b, t] else set()
    if average == "token":
        return weights / weights.sum()
    for b, own in documents:
        here = segment_ids[b] == own
        weights[b, here] /= weights[b, here].sum() * len(documents)
    return weights


@pytest.mark.parametrize("average", ["token", "sample"])
def test_no_document_predicts_the_next_one(average):
    mask = random_mask()
    valid = target_mask(jnp.asarray(mask), jnp.asarray(SEGMENTS))
    found = np.asarray(token_weights(valid, average, jnp.asarray(SEGMENTS)))
    assert_close(found, slow_weights(mask, SEGMENTS, average), rel=1e-6)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert not found[0, [5, 6, 15]].any() and not found[1, 3:7].any()
    assert np.array_equal(target_mask(jnp.asarray(mask)), mask)
    assert found[1, -1] == 0 or mask[1, -1] == 1  # the mask decides on the last target


@pytest.mark.parametrize("average", ["token", "sample"])
def test_packed_documents_have_the_loss_of_single_ones(linear, tokens, average):
    """In values and gradients, for a model without memory: documents in rows of their own."""
    mask, ids = jnp.ones((BATCH, TIME)), jnp.asarray(SEGMENTS)
    # Row and first input of each document, and its number of targets; that of one token has none,
    # and the last one is a piece of a longer document.
    documents = [(0, 0, 5), (0, 7, 8), (1, 0, 3), (1, 7, 14)]

    def packed(table, weight):
        weights = token_weights(target_mask(mask, ids), average, ids)
        return jnp.sum(weights * token_losses(Linear(table, weight), tokens, 5, ids)[0])

    def single(table, weight):
        rows = [tokens[b, start : start + count + 1] for b, start, count in documents]
        if average == "token":
            return jnp.concatenate([plain_loss(table, weight, r[None])[0] for r in rows]).mean()
        return jnp.stack([plain_loss(table, weight, row[None]).mean() for row in rows]).mean()

    found = jax.jit(jax.value_and_grad(packed, argnums=(0, 1)))(*linear)
    expected = jax.jit(jax.value_and_grad(single, argnums=(0, 1)))(*linear)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, rel=1e-5)


def slow_longce(short, tokens, full, config, segment_ids=None):
    """Weights as the loop of RWKV-X's `compute_longce_loss` makes them."""
    time, weights = full.shape[1], np.ones_like(full)
    window, stride = config.window, config.stride
    for start in range(window, time - window, stride):
        end = min(start + window + stride, time)
        rows = () if segment_ids is None else (segment_ids[:, start:end],)
        alone = np.asarray(short(tokens[:, start : end + 1], *rows))
        for position in range(start + window, end):
            gap = alone[:, position - start - window] - full[:, position]
            weights[:, position] = np.minimum(np.exp(gap), config.cap)
    return weights


@pytest.mark.thorough
@pytest.mark.parametrize(
    "window, stride, time",
    [(4, 4, 16), (4, 4, 21), (4, 4, 9), (3, 5, 21), (6, 2, 21), (1, 1, 7), (5, 3, 20), (5, 8, 11)],
)
def test_longce_is_the_slow_loop(window, stride, time):
    rng = np.random.default_rng(window)
    tokens = rng.integers(0, 40, (BATCH, time + 1))
    scale = rng.uniform(0.2, 2.0, 40).astype(np.float32)

    def short(part):  # depends on all tokens from the start of the window on
        context = jnp.cumsum(jnp.asarray(scale)[part[:, :-1]], axis=1)
        return (jnp.sin(context) * 2 + jnp.asarray(scale)[part[:, 1:]])[:, window:]

    full = rng.uniform(0, 3, (BATCH, time)).astype(np.float32)
    config = LongCEConfig(window=window, stride=stride, cap=2.5)
    found = longce_weights(short, jnp.asarray(tokens), jnp.asarray(full), config)
    expected = slow_longce(short, tokens, full, config)
    assert_close(found, expected, rel=1e-5)
    first = 2 * window
    assert np.all(expected[:, :first] == 1) and np.any(expected[:, first:] != 1)
    if time > 15:
        assert np.any(expected == 2.5) and np.any(expected < 1)  # capped above, not below


@pytest.mark.parametrize("window, stride, time", [(4, 4, 21), (5, 3, 20)])
def test_longce_of_documents_is_the_slow_loop(window, stride, time):
    """Short contexts get the segments that belong to them."""
    rng = np.random.default_rng(window)
    tokens, segment_ids = rng.integers(0, 40, (BATCH, time + 1)), SEGMENTS[:, :time]
    scale = rng.uniform(0.2, 2.0, 40).astype(np.float32)

    def short(part, ids):  # depends on the tokens of the own document from the window's start on
        context = jnp.asarray(scale)[part[:, :-1], None] * (ids[:, :, None] == ids[:, None])
        summed = jnp.cumsum(context, axis=1).diagonal(axis1=1, axis2=2)
        return (jnp.sin(summed) * 2 + ids)[:, window:]

    full = rng.uniform(0, 3, (BATCH, time)).astype(np.float32)
    config = LongCEConfig(window=window, stride=stride, cap=2.5)
    given = jnp.asarray(tokens), jnp.asarray(full), jnp.asarray(segment_ids)
    found = jax.jit(lambda t, f, ids: longce_weights(short, t, f, config, ids))(*given)
    expected = slow_longce(short, tokens, full, config, segment_ids)
    assert_close(found, expected, rel=1e-5)
    assert np.any(expected == 2.5) and np.any(expected < 1)


@pytest.mark.slow
def test_longce_windows_start_from_nothing_and_carry_no_gradient():
    config, tokens = LongCEConfig(4, 4), np.random.default_rng(3).integers(0, 40, (1, 14))
    params = jax.tree.map(jnp.asarray, random_params(CONFIG))
    model = abstract_model(CONFIG, FLOAT32)
    full = jnp.ones((1, 13))

    def total(params):
        bound = with_params(model, params)
        short = lambda part: token_losses(bound, part, 64, skip=config.window).cross_entropy
        return longce_weights(short, jnp.asarray(tokens), full, config).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))
    alone = with_params(model, params)
    short = jax.jit(lambda part: token_losses(alone, part, 64).cross_entropy)(tokens[:, 4:13])
    last = jax.jit(lambda part: token_losses(alone, part, 64).cross_entropy)(tokens[:, 8:14])
    expected = 8 + np.minimum(np.exp(np.asarray(short)[0, 4:8] - 1), 10).sum()
    expected += np.minimum(np.exp(np.asarray(last)[0, 4:] - 1), 10).sum()
    assert_close(value, expected, rel=1e-5)

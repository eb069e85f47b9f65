"""Sampling rules against plain NumPy: what is kept, with which probability, and penalties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.generate.sampling import (
    NOT_FINITE,
    Sampling,
    count_token,
    penalize,
    sample,
    truncate,
)


def _expected(logits, temperature, top_p, top_k):
    """Probabilities as the `rwkv` package's pipeline defines them: top-p, top-k, temperature."""
    p = np.exp(logits - logits.max())
    p = (p / p.sum()).astype(np.float64)
    order = np.argsort(p)
    descending = p[order][::-1]
    p[p < descending[np.argmax(np.cumsum(descending) >= top_p - 1e-7)]] = 0
    if top_k:
        p[order[:-top_k]] = 0
    p = p ** (1 / temperature)
    return p / p.sum()


@pytest.mark.parametrize(
    "temperature, top_p, top_k",
    [(1.0, 1.0, 0), (0.7, 0.6, 0), (1.5, 1.0, 3), (1.0, 0.9, 4), (1.0, 1e-6, 0)],
)
def test_distribution(temperature, top_p, top_k):
    logits = np.random.default_rng(0).normal(size=11).astype(np.float32) * 2
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    draws = 20000
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = np.asarray(jax.jit(lambda k: sample(jnp.tile(logits, (draws, 1)), k, sampling))(keys))
    expected = _expected(logits, temperature, top_p, top_k)
    found = np.bincount(tokens, minlength=11) / draws
    assert not found[expected == 0].any()
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected / draws) + 1e-9).all()


def test_greedy_ignores_keys():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(sample(logits, keys, Sampling()), [1, 0])


def test_top_k_keeps_exactly_k_of_equals():
    kept = truncate(jnp.full((2, 6), -np.log(6.0)), Sampling(temperature=1.0, top_k=2))
    np.testing.assert_array_equal(np.isfinite(kept).sum(-1), [2, 2])


def test_penalties_and_their_decay():
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, penalty_decay=0.5)
    counts = jnp.zeros((1, 4))
    for token in (2, 2, 1):
        counts = count_token(counts, jnp.asarray([token]), sampling)
    np.testing.assert_allclose(counts, [[0, 1, 0.75, 0]])
    np.testing.assert_allclose(
        penalize(jnp.zeros((1, 4)), counts, sampling), [[0, -0.75, -0.6875, 0]]
    )
    keys = jax.random.split(jax.random.key(0), 1)
    near = jnp.asarray([[0.0, 0.5, 0.6, 0.1]])
    assert int(sample(near, keys, sampling, counts)[0]) == 3


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("presence_penalty", float("inf")),
        ("penalty_decay", 1.5),
    ],
)
def test_bad_settings(field, value):
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-46, 1e-300])
def test_the_lower_the_temperature_the_nearer_to_the_argmax(temperature):
    """No matter how small: also where it, or its inverse, is no float32 any more."""
    logits = jax.random.normal(jax.random.key(0), (3, 50)) * 5
    keys = jax.random.split(jax.random.key(1), 3)
    for sampling in (Sampling(temperature), Sampling(temperature, top_p=0.9, top_k=3)):
        np.testing.assert_array_equal(sample(logits, keys, sampling), logits.argmax(-1))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.9, 3)], ids=["greedy", "drawn"])
def test_no_token_is_chosen_from_logits_that_are_not_finite(sampling, bad):
    logits = jnp.zeros((3, 9)).at[1, 4].set(bad)
    token = sample(logits, jax.random.split(jax.random.key(0), 3), sampling)
    assert token[1] == NOT_FINITE and token[0] >= 0 and token[2] >= 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_numbers_that_mean_nothing_are_refused(bad):
    for field in ("temperature", "top_p", "penalty_decay"):
        with pytest.raises(ConfigError, match=field):
            Sampling(**{field: bad})
    for field in ("presence_penalty", "frequency_penalty"):
        with pytest.raises(ConfigError, match=field):
            Sampling(**{field: bad * 1e7})

"""Choosing the next token from logits, for many texts at once, inside the jitted decode step.

The order of operations is that of the `rwkv` package's pipeline, on which published RWKV settings
rest: penalties on the logits, then top-p and top-k on the probabilities before the temperature,
then the temperature. What a text has already said is remembered as decayed counts of each token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rwkvx_jax.config import ConfigError

NOT_FINITE = -2
"""In place of a token: the logits are NaN or infinite."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy: the most likely token, no penalties."""

    temperature: float = 0.0
    """0: always the most likely token; 1: the model's own distribution."""
    top_p: float = 1.0
    """Draws from the fewest tokens whose probabilities sum to at least this, in (0, 1]."""
    top_k: int = 0
    """Draws from so many most likely tokens; 0: from all."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token as often as it was generated before."""
    penalty_decay: float = 0.996
    """Factor on those counts with each further token."""

    def __post_init__(self):
        checks = (
            (0 <= self.temperature < 1e6, "temperature", "must lie in [0, 1e6); 0 is greedy"),
            (0 < self.top_p <= 1, "top_p", "must lie in (0, 1]; 1 turns it off"),
            (self.top_k >= 0, "top_k", "must not be negative; 0 turns it off"),
            (0 <= self.penalty_decay <= 1, "penalty_decay", "must lie in [0, 1]"),
            (abs(self.presence_penalty) < 1e6, "presence_penalty", "must lie in (-1e6, 1e6)"),
            (abs(self.frequency_penalty) < 1e6, "frequency_penalty", "must lie in (-1e6, 1e6)"),
        )
        for valid, name, remedy in checks:
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)}: it {remedy}")

    @property
    def penalizes(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuses what JAX would cut to 32 bits.

    Raises:
      ConfigError: outside 0 to 2^32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{name} is {seed}: it must lie between 0 and {2**32 - 1}")


def sample(
    logits: jax.Array,  # [B, W]
    keys: jax.Array,  # [B] PRNG keys
    sampling: Sampling,
    counts: jax.Array | None = None,  # [B, W] float32
) -> jax.Array:
    """The next token of each text, int32 [B]; NOT_FINITE where its logits are not finite.

    Args:
      logits: of the next token.
      keys: one for each text, so that a text does not depend on its neighbours.
      sampling: the rule.
      counts: decayed number of times each token was generated; None without penalties.
    """
    if counts is not None:
        logits = penalize(logits, counts, sampling)
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # the NaN, if there is one
        return _checked(token, jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)  # one NaN makes all NaN
    best = log_p.max(axis=-1)
    # Relative to the largest, so that any temperature above 0, however small, leaves it at 0: then
    # the others fall to -inf, and the draw becomes the argmax. (A tiny one may be 0 in float32.)
    below = truncate(log_p, sampling) - best[:, None]
    below = jnp.where(below < 0, below / sampling.temperature, 0.0)
    token = jax.vmap(jax.random.categorical)(keys, below).astype(jnp.int32)
    return _checked(token, best)


def _checked(token: jax.Array, best: jax.Array) -> jax.Array:
    """Tokens [B] where the best logits [B] are finite: they are NaN or infinite if any one is NaN
    or +inf. (A logit of -inf beside finite ones is a probability of zero.)"""
    return jnp.where(jnp.isfinite(best), token, NOT_FINITE)


def penalize(logits: jax.Array, counts: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, W] less the penalties of what was generated before."""
    said = (counts > 0).astype(logits.dtype)
    return logits - sampling.presence_penalty * said - sampling.frequency_penalty * counts


def count_token(counts: jax.Array, token: jax.Array, sampling: Sampling) -> jax.Array:
    """Counts [B, W] after one more token [B] of each text."""
    row = jnp.arange(token.shape[0])
    return (counts * sampling.penalty_decay).at[row, token].add(1.0)


def truncate(log_p: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities [B, W] with -inf outside top-p and top-k.

    Tokens exactly as likely as the last one kept by top-p are kept as well.
    """
    kept = jnp.ones(log_p.shape, bool)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-log_p, axis=-1)
        reached = jnp.cumsum(jnp.exp(ordered), axis=-1) >= sampling.top_p
        last = jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), log_p.shape[-1] - 1)
        kept = log_p >= jnp.take_along_axis(ordered, last[..., None], axis=-1)
    if 0 < sampling.top_k < log_p.shape[-1]:
        _, best = jax.lax.top_k(log_p, sampling.top_k)
        none = jnp.zeros(log_p.shape[-1], bool)
        kept &= jax.vmap(lambda index: none.at[index].set(True))(best)
    return jnp.where(kept, log_p, -jnp.inf)

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
            (self.temperature >= 0, "temperature", "must not be negative; 0 is greedy"),
            (0 < self.top_p <= 1, "top_p", "must lie in (0, 1]; 1 turns it off"),
            (self.top_k >= 0, "top_k", "must not be negative; 0 turns it off"),
            (0 <= self.penalty_decay <= 1, "penalty_decay", "must lie in [0, 1]"),
            (abs(self.presence_penalty) < 1e6, "presence_penalty", "must be a finite number"),
            (abs(self.frequency_penalty) < 1e6, "frequency_penalty", "must be a finite number"),
        )
        for valid, name, remedy in checks:
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)}: it {remedy}")

    @property
    def penalizes(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def sample(
    logits: jax.Array,  # [B, W]
    keys: jax.Array,  # [B] PRNG keys
    sampling: Sampling,
    counts: jax.Array | None = None,  # [B, W] float32
) -> jax.Array:
    """The next token of each text, int32 [B].

    Args:
      logits: of the next token.
      keys: one for each text, so that a text does not depend on its neighbours.
      sampling: the rule.
      counts: decayed number of times each token was generated; None without penalties.
    """
    if counts is not None:
        logits = penalize(logits, counts, sampling)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = truncate(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), sampling)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys, logits / sampling.temperature).astype(jnp.int32)


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

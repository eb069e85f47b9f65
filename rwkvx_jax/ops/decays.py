"""Sums of log decays over parts of a chunk, and where they enter its matrix products.

By levels, without a subtraction, nothing cancels at any decay: for every pair j < i of tokens there
is one h of 1, 2, 4, .. C/2 such that i lies in the second and j in the first half of the same 2h
tokens. With m the border between the halves, D(i, j), what the tokens after j up to i leave of a
channel, is exp(E_h[i]) exp(S_h[j]), where E_h[i] sums log_w from m to i, and S_h[j] after j up to
m. Both are at most 0. Sums over more tokens are sums of those over fewer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def levels_of(log_w):
    """For h = 1, 2, 4, .. C: (before, after, total) of log_w [.., C, n] within blocks of h tokens.

    before [.., C, n] sums the block's tokens before each, after [.., C, n] those after each, total
    [.., C / h, n] all of them.
    """
    size = log_w.shape[-2]
    before = after = jnp.zeros_like(log_w)
    total = log_w
    levels = [(before, after, total)]
    for half in (1 << i for i in range(size.bit_length() - 1)):
        first, second = (halves(total, 1)[..., i, :, :] for i in (0, 1))  # [.., C / 2h, 1, n]
        zero = jnp.zeros_like(first)
        before = halves(before, half) + jnp.stack([zero, first], axis=-3)
        after = halves(after, half) + jnp.stack([second, zero], axis=-3)
        before, after = before.reshape(log_w.shape), after.reshape(log_w.shape)
        total = (first + second)[..., 0, :]
        levels.append((before, after, total))
    return levels


def halves(x, half):
    """Rows [.., C, n] as pairs of neighbouring blocks: [.., C / 2 half, 2, half, n]."""
    return x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])


def level_of(size):
    """[C, C]: for i > j the h of their level; 0 on the diagonal, -1 above it."""
    i, j = np.arange(size)[:, None], np.arange(size)[None, :]
    highest = 1 << np.maximum(0, np.frexp((i ^ j).astype(np.float64))[1] - 1)
    return np.where(i > j, highest, np.where(i == j, 0, -1))


def between(log_w: jax.Array) -> jax.Array:
    """Sums of log_w [.., C, 1] over the tokens between j and i, [.., i, j]; -inf where j >= i."""
    size = log_w.shape[-2]
    level = as_mask(level_of(size), log_w)
    sums = jnp.full((*log_w.shape[:-1], size), -jnp.inf)
    for n, (before, after, _) in enumerate(levels_of(log_w)[:-1]):
        sums = jnp.where(level == 1 << n, before + after.swapaxes(-1, -2), sums)
    return sums


def as_mask(mask, like):
    """A constant [i, j] in front of which axes of 1 stand, as many as `like` has."""
    return mask.reshape((1,) * (like.ndim - 2) + mask.shape)


def running_sum(x, reverse=False):
    """Sum over a chunk's tokens up to each (from each on), [.., C, K], as a triangular product.

    In full precision: rounded exponents would be errors of the decay itself.
    """
    size = x.shape[-2]
    triangle = np.tri(size, dtype=np.float32)
    triangle = jnp.broadcast_to(triangle.T if reverse else triangle, (*x.shape[:-1], size))
    return jnp.einsum("...ts,...sk->...tk", triangle, x, precision=jax.lax.Precision.HIGHEST)


class Decays(NamedTuple):
    """Where the decays of a chunk enter. n is K, or with one decay a head 1."""

    scale_a: jax.Array | float  # [N, B, H, C, n] e^(ge-g*); 1 with one decay a head
    scale_r: jax.Array | float  # [N, B, H, C, n] e^(gi-g*)
    scale_bk: jax.Array | float  # [N, B, H, C, n] e^(g*-gi)
    from_start: jax.Array  # [N, B, H, 1, K] e^g*, or [N, B, H, 2C, 1] [e^ge ; e^gi]
    to_end: jax.Array  # [N, B, H, 1, K] e^(gl-g*), or [N, B, H, 2C, 1] e^(gl-gi) twice
    keep: jax.Array  # [N, B, H, n, 1] e^gl
    scores: jax.Array | float  # [N, B, H, 2C, 2C] what multiplies A; 1 with decays of channels


def decays_of_channels(log_w) -> Decays:
    """From the middle of the chunk, whose decays must not be too strong (`MAX_EXPONENT`)."""
    size = log_w.shape[-2]
    total = running_sum(log_w)
    middle = total[..., max(size // 2 - 1, 0), :][..., None, :]
    including = total - middle
    from_start, to_end = jnp.exp(middle), jnp.exp(including[..., -1:, :])
    return Decays(
        scale_a=jnp.exp(including - log_w),
        scale_r=jnp.exp(including),
        scale_bk=jnp.exp(-including),
        from_start=from_start,
        to_end=to_end,
        keep=(from_start * to_end).swapaxes(-1, -2),
        scores=1.0,
    )


def decays_of_heads(log_w) -> Decays:
    """One decay a head multiplies the scores: it may be as strong as can be, even a reset."""
    before, after, total = levels_of(log_w)[-1]
    strict = between(log_w)
    level = as_mask(level_of(log_w.shape[-2]), log_w)
    inclusive = jnp.where(level == 0, 1.0, jnp.exp(strict + log_w))
    scores = jnp.concatenate([jnp.exp(strict), inclusive], axis=-2)
    return Decays(
        scale_a=1.0,
        scale_r=1.0,
        scale_bk=1.0,
        from_start=jnp.exp(jnp.concatenate([before, before + log_w], axis=-2)),
        to_end=jnp.exp(jnp.concatenate([after, after], axis=-2)),
        keep=jnp.exp(total),
        scores=jnp.concatenate([scores, scores], axis=-1),
    )

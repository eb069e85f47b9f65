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

_NOTHING_LEFT = -1e30  # e to this is 0, and 128 times it is finite


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


def as_mask(mask, like):
    """A constant [i, j] in front of which axes of 1 stand, as many as `like` has."""
    return mask.reshape((1,) * (like.ndim - 2) + mask.shape)


def _triangle(x, mask):
    """mask [.., i, C or 2C] times x [.., C or 2C, n], rows of tokens.

    In full precision: rounded exponents would be errors of the decay itself.
    """
    mask = jnp.broadcast_to(mask.astype(np.float32), (*x.shape[:-2], *mask.shape[-2:]))
    return jnp.einsum("...ts,...sk->...tk", mask, x, precision=jax.lax.Precision.HIGHEST)


class Decays(NamedTuple):
    """Where the decays of a chunk enter. n is K, or with one decay a head 1; m left factors."""

    left: tuple[jax.Array | float, ...]  # m of [N, B, H, C, n] e^(ge-g*) or e^(gi-g*), or 1
    right: jax.Array | float  # [N, B, H, C, n] e^(g*-gi), or with one decay a head 1
    from_start: jax.Array  # [N, B, H, 1, K] e^g*, or [N, B, H, mC, 1] e^ge or e^gi
    to_end: jax.Array  # [N, B, H, 1, K] e^(gl-g*), or [N, B, H, mC, 1] e^(gl-gi) m times
    keep: jax.Array  # [N, B, H, n, 1] e^gl
    scores: jax.Array | float  # [N, B, H, mC, mC] what multiplies A; 1 with decays of channels


def decays_of_channels(log_w: jax.Array, inclusive: tuple[bool, ...]) -> Decays:
    """From the middle of the chunk, whose decays must not be too strong (`MAX_EXPONENT`).

    `inclusive`: for each left factor whether its rows see their own token's decay.
    """
    size = log_w.shape[-2]
    total = _triangle(log_w, np.tri(size))
    middle = total[..., max(size // 2 - 1, 0), :][..., None, :]
    including = total - middle
    from_start, to_end = jnp.exp(middle), jnp.exp(including[..., -1:, :])
    return Decays(
        left=tuple(jnp.exp(including if i else including - log_w) for i in inclusive),
        right=jnp.exp(-including),
        from_start=from_start,
        to_end=to_end,
        keep=(from_start * to_end).swapaxes(-1, -2),
        scores=1.0,
    )


def decays_of_heads(log_w: jax.Array, inclusive: tuple[bool, ...]) -> Decays:
    """One decay a head multiplies the scores: it may be as strong as can be, even a reset.

    Column j of one product with a triangle has the sums over the tokens after j up to every i;
    no sum is a difference of others.
    """
    size = log_w.shape[-2]
    log_w = jnp.maximum(log_w, _NOTHING_LEFT)
    after = as_mask(np.tri(size, k=-1, dtype=bool), log_w)
    sums = jnp.concatenate([log_w, jnp.where(after, log_w, 0)], axis=-1)
    sums = jnp.exp(_triangle(sums, np.tri(size)))  # of column 0 from the start of the chunk
    below = as_mask(np.tri(size, dtype=bool), log_w)
    start, between = sums[..., :1], jnp.where(below, sums[..., 1:], 0)
    # Rows that do not see their own decay are those of the token before.
    shifted = lambda x, first: jnp.concatenate([first(x[..., :1, :]), x[..., :-1, :]], axis=-2)
    starts = [start if i else shifted(start, jnp.ones_like) for i in inclusive]
    scores = [between if i else shifted(between, jnp.zeros_like) for i in inclusive]
    to_end = between[..., -1:, :].swapaxes(-1, -2)
    repeated = lambda x, axis: jnp.concatenate([x] * len(inclusive), axis)
    return Decays(
        left=(1.0,) * len(inclusive),
        right=1.0,
        from_start=jnp.concatenate(starts, axis=-2),
        to_end=repeated(to_end, -2),
        keep=start[..., -1:, :],
        scores=repeated(jnp.concatenate(scores, axis=-2), -1),
    )


def running_sum(x):
    """Sums of [.., C, n] over the tokens up to each."""
    return _triangle(x, np.tri(x.shape[-2]))


def gradient_of_decays(log_w, *, pairs, own, written, kept, document):
    """The gradient of log_w [.., C, n] within a chunk; what is given has a column per channel.

    Args:
      pairs: [.., C, K] x dx of the left factors less y dy of the right ones, through the scores and
        the start state. A decay has part in what reads after it and not in what is written after.
      own: x dx of the left factors that do not see their own token's decay, or None.
      written: [.., C, K] y dy of the right factors through the end state.
      kept: [.., 1, K] the same of the start state.
      document: [.., C, 1] number of each token's document, of which alone it is told, or None.
    """
    if log_w.shape[-1] == 1:
        # A product with ones, as XLA's fused sums are many times slower on a CPU.
        pairs, own, written, kept = (
            None if x is None else _over_channels(x) for x in (pairs, own, written, kept)
        )
    size = log_w.shape[-2]
    later_and_earlier = np.concatenate([np.tri(size).T, np.tri(size, k=-1)], axis=1)
    nothing = jnp.isneginf(log_w)  # is left by a reset, whose gradient is exactly 0
    if document is not None:
        numbers = jnp.concatenate([document, document], axis=-2).swapaxes(-1, -2)
        later_and_earlier = jnp.where(document == numbers, later_and_earlier, 0)
        begins = jnp.diff(document, axis=-2, prepend=0)
        nothing |= begins > 0
    gradient = _triangle(jnp.concatenate([pairs, written], axis=-2), later_and_earlier) + kept
    gradient = gradient if own is None else gradient - own
    return jnp.where(nothing, 0, gradient)


def _over_channels(x):
    """[.., C, K] -> [.., C, 1]."""
    ones = np.ones(x.shape[-1], np.float32)
    return jnp.einsum("...k,k->...", x, ones, precision=jax.lax.Precision.HIGHEST)[..., None]

"""Short causal convolutions over time, of each channel by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rwkvx_jax.config.mixers import CONV
from rwkvx_jax.modules.parameters import uniform
from rwkvx_jax.modules.token_shift import previous_token


def first_taps(rngs: nnx.Rngs, width: int) -> jax.Array:
    """Taps [CONV, width] of a convolution, within the bound of a linear layer of CONV inputs."""
    return uniform(rngs.params(), (CONV, width), CONV**-0.5)


def convolutions(
    inputs: Sequence[Float[Array, "B T _"]],
    taps: Float[Array, "n X"],
    before: Float[Array, "B _"] | None,
    lengths: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[list[jax.Array], Float[Array, "B _"]]:
    """`short_convolution` of several arrays, X channels together.

    One by one, as each is sharded by its own heads, which all in one array could not be.
    """
    ends = list(accumulate(x.shape[-1] for x in inputs))[:-1]
    each_taps = jnp.split(taps, ends, axis=-1)
    kept = len(taps) - 1
    each_before: Sequence[jax.Array | None] = [None] * len(inputs)
    if before is not None:
        each_before = jnp.split(before, [kept * end for end in ends], axis=-1)
    results = [
        short_convolution(x, own, start, lengths, segment_ids)
        for x, own, start in zip(inputs, each_taps, each_before, strict=True)
    ]
    return [out for out, _ in results], jnp.concatenate([last for _, last in results], axis=-1)


def short_convolution(
    x: Float[Array, "B T X"],
    taps: Float[Array, "n X"],
    before: Float[Array, "B _"] | None,
    lengths: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B T"] | None = None,
    added_to: Float[Array, "B T X"] | None = None,
) -> tuple[Float[Array, "B T X"], Float[Array, "B _"]]:
    """Sum over j of taps[j] x[t - j]: a causal convolution of each channel.

    Args:
      x: inputs.
      taps: weights, that of the token itself first.
      before: the n - 1 inputs before x, oldest first, [B, (n - 1) X]; None: zeros.
      lengths: valid tokens of each row.
      segment_ids: numbers of packed documents, where nothing came `before`: no tap reaches into
        another.
      added_to: what the sum is added to; None: zeros.

    Returns:
      The result, and the n - 1 inputs before the next piece.
    """
    batch, time, width = x.shape
    taps = taps.astype(x.dtype)[:, None, None]
    count = len(taps) - 1
    if before is None:
        moved, out = x, taps[0] * x if added_to is None else added_to + taps[0] * x
        for tap in taps[1:]:
            moved = previous_token(moved, None, segment_ids)
            out += tap * moved
        padded = jnp.pad(x[:, max(0, time - count) :], ((0, 0), (max(0, count - time), 0), (0, 0)))
        return out, padded.reshape(batch, -1)
    rows = jnp.concatenate([before.astype(x.dtype).reshape(batch, count, width), x], axis=1)
    out = taps[0] * x
    for j in range(1, count + 1):
        out += taps[j] * rows[:, count - j : count - j + time]
    if added_to is not None:  # last, as ever: results of older versions were rounded so
        out = added_to + out
    ends = jnp.full(batch, time) if lengths is None else lengths
    cut = lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count)
    return out, jax.vmap(cut)(rows, ends).reshape(batch, -1)

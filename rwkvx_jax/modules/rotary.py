"""Rotary positions (RoPE, arXiv 2104.09864) of queries and keys, in the layout of Llama and Qwen2.

Channel i of a head and channel i + K / 2 are a pair, which the position t turns by the angle
t f_i, f_i = theta^(-2 i / K). The product of a query and a key then depends on the distance of
their positions alone.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rwkvx_jax.config import ModelConfig


def frequencies(config: ModelConfig) -> Float32[Array, " half"]:
    """f [K / 2], radians a token, rounded from float64.

    With `config.rope_scaling` as Llama 3.1 has them: waves longer than original / low_freq_factor
    tokens become slower by `factor`, those shorter than original / high_freq_factor stay, and those
    between go from one to the other, linearly in the number of waves in the original length.
    """
    size = config.head_size
    plain = config.rope_theta ** -(np.arange(0, size, 2) / size)
    if config.rope_scaling is None:
        return jnp.asarray(plain, jnp.float32)
    factor, low, high, original = config.rope_scaling
    waves = original * plain / (2 * math.pi)  # in the original length
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return jnp.asarray(plain * (kept + (1 - kept) / factor), jnp.float32)


def rotate(
    x: Float[Array, "B T H K"], positions: Int[Array, "#B T"], config: ModelConfig
) -> Float[Array, "B T H K"]:
    """x turned by the positions of its tokens, in x's dtype; angles and products in float32."""
    angles = positions[..., None, None].astype(jnp.float32)
    angles = angles * frequencies(config)[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)

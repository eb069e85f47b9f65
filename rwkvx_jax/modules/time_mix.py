"""Time mix of RWKV-7: token shift, low-rank gates and the matrix-state recurrence (spec 1.1)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.cache import TimeMixState
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules import context
from rwkvx_jax.modules.channel_mix import last_valid, previous_token
from rwkvx_jax.modules.parameters import (
    LayerConstants,
    low_rank_out,
    orthogonal,
    parameter,
    project,
    uniform,
)
from rwkvx_jax.modules.remat import keep
from rwkvx_jax.ops.recurrence import wkv7
from rwkvx_jax.sharding import constrain, per_device, sequence_parts

DECAY_BOUND = 0.6065306597126334  # exp(-1/2): log w lies in [-DECAY_BOUND, 0)
GROUP_NORM_EPS = 64e-5


def normalize_heads(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, in float32; finite gradients at zero."""
    squared = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x.astype(jnp.float32) * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


class TimeMix(nnx.Module):
    """Parameters, by the letters of RWKV-7:

    x_r x_w x_k x_v x_a x_g: share of the previous token in each input.
    receptance key value output: the four matrices, stored [in, out].
    w0 w1 w2: decay; a0 a1 a2: in-context learning rate; v0 v1 v2: mix of the first layer's
    values (never used in layer 0); g1 g2: output gate.
    k_k: scale of the removal key; k_a: how far the learning rate scales the key; r_k: bonus.
    ln_x: scale and bias of the per-head group norm.
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, heads, size = config.width, config.num_heads, config.head_size
        for name in "rwkvag":
            setattr(self, f"x_{name}", parameter(constants.token_shift(name), "vector"))
        starts = {
            "w": constants.decay(),
            "a": constants.learning_rate(),
            "v": constants.value_residual(),
        }
        for name, rank in config.ranks._asdict().items():
            first, second = jnp.zeros((width, rank)), low_rank_out(rngs.params(), (rank, width))
            setattr(self, f"{name}1", parameter(first, "embed", "rank"))
            setattr(self, f"{name}2", parameter(second, "rank", "heads"))
            if name in starts:
                setattr(self, f"{name}0", parameter(starts[name], "vector"))
        self.k_k = parameter(constants.removal_key(), "vector")
        self.k_a = parameter(constants.key_scale(), "vector")
        self.r_k = parameter(constants.bonus().reshape(heads, size), "heads", "head_size")
        for name, gain, bound in (
            ("receptance", 1.0, 0.5),
            ("key", 0.1, 0.05),
            ("value", 1.0, 0.5),
        ):
            shape = (width, width)
            if constants.new:
                matrix = orthogonal(rngs.params(), shape, gain)
            else:
                matrix = uniform(rngs.params(), shape, bound * width**-0.5)
            setattr(self, name, parameter(matrix, "embed", "heads"))
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        self.ln_x = GroupNorm(constants)

    def __call__(
        self,
        h: jax.Array,  # [B, T, D]
        v_first: jax.Array,  # [B, T, D], values of layer 0 (ignored in layer 0)
        first: jax.Array,  # bool scalar: is this layer 0?
        run: RunConfig,
        state: TimeMixState | None = None,
        lengths: jax.Array | None = None,  # [B], valid tokens of each row
    ) -> tuple[jax.Array, jax.Array, TimeMixState]:
        """Returns the output [B, T, D], v_first for the next layer, and the new state.

        Rows beyond `lengths` leave the state as it is; their outputs mean nothing.
        """
        heads = self.r_k.shape[0]
        split = lambda x: constrain(
            x.reshape(*x.shape[:2], heads, -1), "batch", "time", "heads", None
        )
        before = None if state is None else state.shift
        r, log_w, k, v, a, g, residual = self.projections(h, before)
        v_first = jnp.where(first, v, v_first)
        v = v + (v_first - v) * residual  # layer 0: the difference is exactly zero
        kk = normalize_heads(split(k * self._vector("k_k", k.dtype)))
        k = k * (1 + (a - 1) * self._vector("k_a")).astype(k.dtype)
        remove, write = (-kk).astype(h.dtype), (kk * split(a)).astype(h.dtype)
        r, log_w, k, v = split(r), split(log_w), split(k), split(v)
        if lengths is not None:
            valid = (jnp.arange(h.shape[1])[None] < lengths[:, None])[..., None, None]
            log_w = jnp.where(valid, log_w, 0.0)
            k, write = jnp.where(valid, k, 0), jnp.where(valid, write, 0)
        # A single token needs no chunks: one step of the recurrence as it is written.
        implementation = "sequential" if h.shape[1] == 1 else run.recurrence
        y, wkv = _recurrence((r, log_w, k, v, remove, write), state, implementation)
        bonus = (r * k).astype(jnp.float32) * self.r_k[...][None, None]
        y = self.ln_x(y) + bonus.sum(-1, keepdims=True) * v.astype(jnp.float32)
        y = y.reshape(h.shape).astype(h.dtype) * g
        out = project(y, self.output[...])
        return out, v_first, TimeMixState(last_valid(h, before, lengths), wkv)

    def projections(self, h: jax.Array, shift: jax.Array | None) -> tuple[jax.Array, ...]:
        """r, log_w (float32), k, v, a (float32), g and the share of v_first in v: [B, T, D]."""
        times = lambda x, name: project(x, getattr(self, name)[...])
        difference = previous_token(h, shift) - h
        mixed = {name: h + difference * self._vector(f"x_{name}", h.dtype) for name in "rwkvag"}
        # Second matrix of a low-rank pair: float32, as what follows is sensitive.
        low_rank = lambda inner, name: times(inner, name).astype(jnp.float32)

        # Not the second matrix of a low-rank pair: computing it again costs less than keeping it.
        product = lambda name, matrix: keep(times(mixed[name], matrix))

        r, k, v = product("r", "receptance"), product("k", "key"), product("v", "value")
        z = self._vector("w0") + low_rank(jnp.tanh(product("w", "w1")), "w2")
        log_w = -DECAY_BOUND * jax.nn.sigmoid(z)
        a = jax.nn.sigmoid(self._vector("a0") + low_rank(product("a", "a1"), "a2"))
        g = times(jax.nn.sigmoid(product("g", "g1")), "g2")
        residual = jax.nn.sigmoid(self._vector("v0") + low_rank(product("v", "v1"), "v2"))
        return r, log_w, k, v, a, g, residual.astype(h.dtype)

    def _vector(self, name: str, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """A per-channel parameter as [1, 1, D]."""
        return getattr(self, name)[...][None, None].astype(dtype)


def _recurrence(
    arrays: tuple[jax.Array, ...], state: TimeMixState | None, implementation: str | None
) -> tuple[jax.Array, jax.Array]:
    """`wkv7` on the mesh in force, by each device for its rows, heads and part of the sequence."""
    if state is None and sequence_parts(arrays[0].shape[1]) > 1:
        return context.recurrence(*arrays, implementation=implementation)
    arrays += () if state is None else (state.wkv,)
    tokens, matrix = ("batch", None, "heads", None), ("batch", "heads", None, None)
    return per_device(
        partial(wkv7, implementation=implementation),
        (tokens,) * 6 + (matrix,) * (len(arrays) - 6),
        (tokens, matrix),
    )(*arrays)


class GroupNorm(nnx.Module):
    """Normalisation of each head by itself with a scale and bias per channel, in float32."""

    def __init__(self, constants: LayerConstants):
        self.scale = parameter(constants.group_norm_scale(), "vector")
        self.bias = parameter(jnp.zeros(constants.config.width), "vector")

    def __call__(self, y: jax.Array) -> jax.Array:
        """y [B, T, H, V] -> float32 of the same shape."""
        y = y.astype(jnp.float32)
        heads = (1, 1, *y.shape[-2:])
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + GROUP_NORM_EPS)
        return y * self.scale[...].reshape(heads) + self.bias[...].reshape(heads)

"""Time mix of RWKV-7: token shift, low-rank gates and the matrix-state recurrence (spec 1.1)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int

from rwkvx_jax.cache import TimeMixState
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.config.values import require
from rwkvx_jax.modules.mixers.base import (
    GroupNorm,
    across_devices,
    implementation_for,
    per_channel,
    split_heads,
    unit_heads,
    without_padding,
)
from rwkvx_jax.modules.parameters import (
    LayerConstants,
    low_rank_out,
    matrix,
    parameter,
    project,
)
from rwkvx_jax.modules.remat import keep
from rwkvx_jax.modules.token_shift import last_valid, previous_token
from rwkvx_jax.ops.recurrence import wkv7, wkv7_affine
from rwkvx_jax.sharding import constrain

DECAY_BOUND = 0.6065306597126334  # exp(-1/2): log w lies in [-DECAY_BOUND, 0)
GROUP_NORM_EPS = 64e-5


class TimeMix(nnx.Module):
    """Parameters, by the letters of RWKV-7:

    x_r x_w x_k x_v x_a x_g: share of the previous token in each input.
    receptance key value output: the four matrices, stored [in, out].
    w0 w1 w2: decay; a0 a1 a2: in-context learning rate; v0 v1 v2: mix of the first layer's
    values (never used in layer 0); g1 g2: output gate.
    k_k: scale of the removal key; k_a: how far the learning rate scales the key; r_k: bonus.
    ln_x: scale and bias of the per-head group norm.
    initial_state [H, V, K], with `config.learned_state`: the state before a text's first token.
    """

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, heads, size, ranks = config.width, config.num_heads, config.head_size, config.ranks
        vector = lambda value: parameter(value, "vector")
        inner = lambda rank: parameter(jnp.zeros((width, rank)), "embed", "rank")
        outer = lambda rank: parameter(low_rank_out(rngs.params(), (rank, width)), "rank", "heads")
        square = partial(matrix, config, rngs)
        self.x_r, self.x_w, self.x_k = (vector(constants.token_shift(name)) for name in "rwk")
        self.x_v, self.x_a, self.x_g = (vector(constants.token_shift(name)) for name in "vag")
        self.w0 = vector(constants.decay())
        self.w1, self.w2 = inner(ranks.w), outer(ranks.w)
        self.a0 = vector(constants.learning_rate())
        self.a1, self.a2 = inner(ranks.a), outer(ranks.a)
        self.v0 = vector(constants.value_residual())
        self.v1, self.v2 = inner(ranks.v), outer(ranks.v)
        self.g1, self.g2 = inner(ranks.g), outer(ranks.g)
        self.k_k = vector(constants.removal_key())
        self.k_a = vector(constants.key_scale())
        self.r_k = parameter(constants.bonus().reshape(heads, size), "heads", "head_size")
        self.receptance, self.key, self.value = square(), square(0.1, 0.05), square()
        self.output = parameter(jnp.zeros((width, width)), "heads", "embed")
        scale = parameter(constants.group_norm_scale(), "vector")
        self.ln_x = GroupNorm(scale, parameter(jnp.zeros(width), "vector"), GROUP_NORM_EPS)
        self.learned_state = config.learned_state
        if config.learned_state:
            zeros = jnp.zeros((heads, size, size))
            self.initial_state = parameter(zeros, "heads", "head_size", "head_size")

    def begun(self, state: TimeMixState, fresh: Bool[Array, " B"]) -> TimeMixState:
        """`state`, but where fresh [B] the learned one, if there is one."""
        if not self.learned_state:
            return state
        learned = self.initial_state[...][None]
        return state._replace(wkv=jnp.where(fresh[:, None, None, None], learned, state.wkv))

    def __call__(
        self,
        h: Float[Array, "B T D"],
        v_first: Float[Array, "B T D"],  # values of layer 0 (ignored in layer 0)
        first: Bool[ArrayLike, ""],  # is this layer 0?
        run: RunConfig,
        state: TimeMixState | None = None,
        lengths: Int[Array, " B"] | None = None,  # valid tokens of each row
        segment_ids: Int[Array, "B T"] | None = None,  # numbers of packed documents
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], TimeMixState]:
        """Returns the output [B, T, D], v_first for the next layer, and the new state.

        Rows beyond `lengths` leave the state as it is; their outputs mean nothing.

        Raises:
          ConfigError: packed documents, and a learned state that each of them would begin with.
        """
        require(
            segment_ids is None or not self.learned_state,
            "model.learned_state: packed documents begin with zeros, not with a learned state; run "
            "each by itself, or without segment_ids",
        )
        heads = self.r_k.shape[0]
        split = partial(split_heads, heads=heads)
        before = None if state is None else state.shift
        r, log_w, k, v, a, g, residual = self.projections(h, before, segment_ids)
        v_first = jnp.where(first, v, v_first)
        v = v + (v_first - v) * residual  # layer 0: the difference is exactly zero
        kk = unit_heads(split(k * per_channel(self.k_k, k.dtype)))
        k = k * (1 + (a - 1) * per_channel(self.k_a)).astype(k.dtype)
        remove, write = (-kk).astype(h.dtype), (kk * split(a)).astype(h.dtype)
        r, log_w, k, v = split(r), split(log_w), split(k), split(v)
        tokens = {"r": r, "log_w": log_w, "k": k, "v": v, "a": remove, "b": write}
        if lengths is not None:
            tokens = without_padding(tokens, lengths)
        implementation = implementation_for(h, run)
        y, wkv = across_devices(
            partial(wkv7, implementation=implementation),
            partial(wkv7_affine, implementation=implementation),
            tuple(tokens.values()),
            self._start(h.shape[0]) if state is None else state.wkv,
            segment_ids,
            whole_texts=state is None,
        )
        bonus = (r * k).astype(jnp.float32) * self.r_k[...][None, None]
        y = self.ln_x(y) + bonus.sum(-1, keepdims=True) * v.astype(jnp.float32)
        y = y.reshape(h.shape).astype(h.dtype) * g
        out = project(y, self.output[...])
        return out, v_first, TimeMixState(last_valid(h, before, lengths), wkv)

    def _start(self, batch: int) -> Float32[Array, "B H V K"] | None:
        """The state before the first token of `batch` texts; None: zeros."""
        if not self.learned_state:
            return None
        learned = self.initial_state[...]
        whole = jnp.broadcast_to(learned[None], (batch, *learned.shape))
        return constrain(whole, "batch", "heads", None, None)

    def projections(
        self,
        h: Float[Array, "B T D"],
        shift: Float[Array, "B D"] | None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], ...]:
        """r, log_w (float32), k, v, a (float32), g and the share of v_first in v: [B, T, D]."""
        difference = previous_token(h, shift, segment_ids) - h
        mix = lambda share: h + difference * per_channel(share, h.dtype)
        for_r, for_w, for_k = mix(self.x_r), mix(self.x_w), mix(self.x_k)
        for_v, for_a, for_g = mix(self.x_v), mix(self.x_a), mix(self.x_g)
        # Of low-rank pairs only the first product: to compute the second again costs less than to
        # keep it. The second is made float32, as what follows is sensitive.
        product = lambda x, matrix: keep(project(x, matrix[...]))
        low_rank = lambda x, matrix: project(x, matrix[...]).astype(jnp.float32)

        r, k = product(for_r, self.receptance), product(for_k, self.key)
        v = product(for_v, self.value)
        z = per_channel(self.w0) + low_rank(jnp.tanh(product(for_w, self.w1)), self.w2)
        log_w = -DECAY_BOUND * jax.nn.sigmoid(z)
        a = jax.nn.sigmoid(per_channel(self.a0) + low_rank(product(for_a, self.a1), self.a2))
        g = project(jax.nn.sigmoid(product(for_g, self.g1)), self.g2[...])
        residual = low_rank(product(for_v, self.v1), self.v2)
        residual = jax.nn.sigmoid(per_channel(self.v0) + residual)
        return r, log_w, k, v, a, g, residual.astype(h.dtype)

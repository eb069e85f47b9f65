"""What the sequence mixers of the recurrent blocks have in common.

A mixer is a module with

    mixer(h, v_first, first, run, state, lengths, segment_ids) -> (output, v_first, new state)

as `LinearMixer.__call__` documents. The sizes of its state and its parameters are those of
`config.mixer_sizes`. A new mixer over the general recurrence derives from `LinearMixer`, says what
the recurrence is fed and what becomes of its output, and gets pieces, padding, sharding over
devices and decoding from here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int

from rwkvx_jax.cache import TimeMixState
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules import context
from rwkvx_jax.modules.parameters import LayerConstants
from rwkvx_jax.modules.token_shift import last_valid, previous_token
from rwkvx_jax.ops.delta_rule import affine, generalized_delta_rule
from rwkvx_jax.sharding import constrain, per_device, sequence_parts

Tokens = dict[str, jax.Array]
"""Arguments r, log_w, k, v (a, b) of `generalized_delta_rule`, [B, T, H, ..]; r and k of one head
serve all heads of v."""


class Fed(NamedTuple):
    """What a mixer makes of a piece of text."""

    tokens: Tokens
    shift: Float[Array, "B X"]  # what the next piece needs of this one's inputs
    rest: Any  # what `finish` needs


class LinearMixer(nnx.Module):
    """A mixer around `generalized_delta_rule`; subclasses define `feed` and `finish`."""

    read: Literal["after", "before"] = "after"
    decay_bound: float | None = None

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        raise NotImplementedError

    def feed(
        self,
        h: Float[Array, "B T D"],
        shift: Float[Array, "B X"] | None,
        lengths: Int[Array, " B"] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> Fed:
        """What the recurrence is fed for inputs h, given the shift of the piece before."""
        raise NotImplementedError

    def finish(self, y: Float[Array, "B T H V"], rest: Any) -> Float[Array, "B T D"]:
        """The mixer's output, from what the recurrence returned."""
        raise NotImplementedError

    def begun(self, state: TimeMixState, fresh: Bool[Array, " B"]) -> TimeMixState:
        """`state`: texts begin with zeros."""
        return state

    def __call__(
        self,
        h: Float[Array, "B T D"],
        v_first: Float[Array, "B T D"],  # RWKV-7's own business
        first: Bool[ArrayLike, ""],  # is this layer 0?
        run: RunConfig,
        state: TimeMixState | None = None,
        lengths: Int[Array, " B"] | None = None,  # valid tokens of each row
        segment_ids: Int[Array, "B T"] | None = None,  # numbers of packed documents
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], TimeMixState]:
        """Returns the output [B, T, D], v_first as it came, and the new state.

        Rows beyond `lengths` leave the state as it is; their outputs mean nothing. Documents begin
        with zeros.
        """
        fed = self.feed(h, None if state is None else state.shift, lengths, segment_ids)
        tokens = fed.tokens if lengths is None else without_padding(fed.tokens, lengths)
        options: dict[str, Any] = {
            "read": self.read,
            "decay_bound": self.decay_bound,
            "implementation": implementation_for(h, run),
        }

        def named(op):
            return lambda *arrays, **more: op(**dict(zip(tokens, arrays, strict=True)), **more)

        y, wkv = across_devices(
            named(partial(generalized_delta_rule, **options)),
            named(partial(affine, **options)),
            tuple(tokens.values()),
            None if state is None else state.wkv,
            segment_ids,
            whole_texts=state is None,
        )
        return self.finish(y, fed.rest), v_first, TimeMixState(fed.shift, wkv)


def implementation_for(h: jax.Array, run: RunConfig) -> str | None:
    """A single token needs no chunks: one step of the recurrence as it is written."""
    return "sequential" if h.shape[1] == 1 else run.recurrence


def without_padding(tokens: Tokens, lengths: Int[Array, " B"]) -> Tokens:
    """The tokens, those beyond `lengths` such that they leave the state alone."""
    valid = (jnp.arange(tokens["v"].shape[1])[None] < lengths[:, None])[..., None, None]
    kept = {name: jnp.where(valid, tokens[name], 0) for name in ("log_w", "k", "b")
            if name in tokens}  # fmt: skip
    return tokens | kept


def across_devices(
    whole: Callable[..., tuple[jax.Array, jax.Array]],
    stretch: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]],
    arrays: tuple[jax.Array, ...],
    start: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    whole_texts: bool,
) -> tuple[jax.Array, jax.Array]:
    """A recurrence on the mesh in force, by each device for its rows, heads and part of the text.

    Sequences are sharded over time where they are whole texts; pieces read into a cache are not.

    Args:
      whole: the op, of the arrays, and `state` and `segment_ids` as keywords.
      stretch: the same without `state`, an affine function of it (see `context.recurrence`).
      arrays: [B, T, H, ..] each; those of one head are for all heads.
      start: the state before the first token; None: zeros.
      segment_ids: numbers of packed documents [B, T], or None.
      whole_texts: whether nothing came before.
    """
    heads = max(x.shape[2] for x in arrays)
    place = lambda x: ("batch", None, "heads" if x.shape[2] == heads else None, None)
    if whole_texts and sequence_parts(arrays[0].shape[1]) > 1:
        return context.recurrence(stretch, arrays, start, segment_ids)
    matrix = ("batch", "heads", None, None)
    outputs = (("batch", None, "heads", None), matrix)

    def run(*arguments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        *arrays, start, segment_ids = arguments
        return whole(*arrays, state=start, segment_ids=segment_ids)

    inputs = (*map(place, arrays), matrix, ("batch", None))
    return per_device(run, inputs, outputs)(*arrays, start, segment_ids)


def split_heads(x: Float[Array, "B T X"], heads: int) -> Float[Array, "B T H K"]:
    """Channels as heads, sharded as these are."""
    return constrain(x.reshape(*x.shape[:2], heads, -1), "batch", "time", "heads", None)


def join_heads(y: Float[Array, "B T H V"]) -> Float[Array, "B T X"]:
    return y.reshape(*y.shape[:2], -1)


def unit_heads(x: Float[Array, "B T H K"]) -> Float32[Array, "B T H K"]:
    """x / max(|x|, 1e-12) over the last axis, in float32; finite gradients at zero."""
    squared = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return x.astype(jnp.float32) * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def per_channel(weight: nnx.Param | jax.Array, dtype=jnp.float32) -> Float[Array, "1 1 X"]:
    """A parameter [X] as [1, 1, X]."""
    return weight[...].reshape(1, 1, -1).astype(dtype)


def mixed(
    h: Float[Array, "B T D"],
    shift: Float[Array, "B D"] | None,
    lengths: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Callable[[nnx.Param | jax.Array], jax.Array], jax.Array]:
    """RWKV's token shift: a function that mixes each token with the one before, by a share of that
    one per channel (and token); and the shift of the next piece."""
    difference = previous_token(h, shift, segment_ids) - h

    def mix(share: nnx.Param | jax.Array) -> jax.Array:
        share = share[...]
        return h + difference * (share if share.ndim == 3 else share[None, None]).astype(h.dtype)

    return mix, last_valid(h, shift, lengths)


class GroupNorm(nnx.Module):
    """Normalisation of each head by itself with a scale and bias per channel, in float32."""

    def __init__(self, scale: nnx.Param, bias: nnx.Param, epsilon: float):
        self.scale, self.bias, self.epsilon = scale, bias, epsilon

    def __call__(self, y: Float[Array, "B T H V"]) -> Float32[Array, "B T H V"]:
        """y normalised."""
        y = y.astype(jnp.float32)
        heads = (1, 1, *y.shape[-2:])
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return y * self.scale[...].reshape(heads) + self.bias[...].reshape(heads)


def rms_norm(y: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """y over the root mean square of its last axis, in float32."""
    y = y.astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)

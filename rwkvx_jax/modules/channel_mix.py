"""Channel mixes, the second half of both block kinds: RWKV-7's, or that of Llama.

A channel mix is a module with

    channel_mix(h, shift, lengths, segment_ids) -> (output, new shift)

where the shift [B, X], of `config.channel_mix_shift` numbers, is what it needs of the token before,
and `segment_ids` number packed documents, which do not see each other (`ops.documents`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.parameters import (
    LayerConstants,
    input_matrix,
    output_matrix,
    parameter,
    project,
)
from rwkvx_jax.modules.remat import keep
from rwkvx_jax.modules.token_shift import last_valid, previous_token
from rwkvx_jax.sharding import constrain


class ChannelMix(nnx.Module):
    """RWKV-7's token-shifted squared-ReLU MLP (spec 1.2). x_k: share of the previous token; key,
    value: the two matrices."""

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden_width
        key = input_matrix(config, rngs.params(), (width, hidden), gain=1.0, bound=0.5)
        self.x_k = parameter(constants.channel_shift(), "vector")
        self.key = parameter(key, "embed", "ffn")
        self.value = parameter(output_matrix(config, rngs, (hidden, width)), "ffn", "embed")

    def __call__(
        self,
        h: Float[Array, "B T D"],
        shift: Float[Array, "B D"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
        """Returns the output [B, T, D] in h's dtype and the new shift [B, D]."""
        moved = previous_token(h, shift, segment_ids)
        x = h + (moved - h) * self.x_k[...][None, None].astype(h.dtype)
        hidden = keep(constrain(project(x, self.key[...]), "batch", "time", "ffn"))
        out = project(jnp.square(jax.nn.relu(hidden)), self.value[...])
        return out, last_valid(h, shift, lengths)


class SwiGLU(nnx.Module):
    """value(silu(gate(h)) * key(h)), arXiv 2002.05202: gate, key [D, F], value [F, D]."""

    def __init__(self, config: ModelConfig, constants: LayerConstants, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden_width
        matrix = lambda: parameter(
            input_matrix(config, rngs.params(), (width, hidden), gain=1.0, bound=0.5),
            "embed", "ffn",
        )  # fmt: skip
        self.gate, self.key = matrix(), matrix()
        self.value = parameter(output_matrix(config, rngs, (hidden, width)), "ffn", "embed")

    def __call__(
        self,
        h: Float[Array, "B T D"],
        shift: Float[Array, "B 0"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B 0"]]:
        """Returns the output [B, T, D] in h's dtype; there is no shift, so its row is empty."""
        inner = lambda matrix: keep(constrain(project(h, matrix[...]), "batch", "time", "ffn"))
        hidden = jax.nn.silu(inner(self.gate)) * inner(self.key)
        return project(hidden, self.value[...]), h[:, 0, :0]


CHANNEL_MIXES: dict[str, type[ChannelMix] | type[SwiGLU]] = {"rwkv": ChannelMix, "llama": SwiGLU}
"""By `ModelConfig.backbone`."""

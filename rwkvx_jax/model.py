"""RWKVX: RWKV-7 blocks with an attention block after every L / M of them.

One class holds the hybrid, plain RWKV-7 (`num_attention_blocks=0`) and the full-attention hybrid
(`attention="full"`). The forward pass scans over M groups, and inside a group over its RWKV-7
blocks, so that compile time does not grow with depth.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules.blocks import AttentionBlock, RWKVBlock, stack_blocks
from rwkvx_jax.modules.parameters import layer_norm, orthogonal, parameter, uniform
from rwkvx_jax.sharding import constrain

Params = dict[str, Any]


class Head(nnx.Module):
    """The output projection: weight [D, W], no bias, not tied to the embedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, vocab = config.width, config.vocab_size
        gain = 0.5 * max(1.0, vocab / width) ** 0.5
        weight = orthogonal(rngs.params(), (width, vocab), gain)
        self.weight = parameter(weight, "embed", "vocab")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Float32 logits [..., W] of features [..., D]."""
        weight = self.weight[...].astype(x.dtype)
        return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


class RWKVX(nnx.Module):
    """A language model over tokens.

    embed [W, D]; ln0: norm of the embedding; blocks: L stacked RWKV-7 blocks; attention_blocks:
    M stacked attention blocks (absent if M is 0); ln_out; head.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, run: RunConfig | None = None):
        self.config = config
        self.run = run or RunConfig()
        width, vocab = config.width, config.vocab_size
        self.embed = parameter(uniform(rngs.params(), (vocab, width), 1e-4), "vocab", "embed")
        self.head = Head(config, rngs)
        self.ln0 = layer_norm(width, rngs, self.dtype)
        self.ln_out = layer_norm(width, rngs, self.dtype)
        self.blocks = stack_blocks(RWKVBlock, config.num_blocks, config, rngs, self.dtype)
        if config.num_attention_blocks:
            self.attention_blocks = stack_blocks(
                AttentionBlock, config.num_attention_blocks, config, rngs, self.dtype
            )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.run.compute_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, T, W] in float32 of int32 tokens [B, T]."""
        return self.head(self.features(tokens))

    def features(self, tokens: jax.Array) -> jax.Array:
        """Normalised outputs of the last block, [B, T, D] in the compute dtype."""
        x = constrain(self.embed_tokens(tokens), "batch", "time", None)
        first = jnp.arange(self.config.num_blocks) == 0

        def rwkv(carry, scanned):
            block, first = scanned
            x, v_first, _ = block(*carry, first, self.run)
            return (x, v_first), None

        def attention(x, block):
            return block(x, lambda attention, h: attention(h, self.run))[0]

        if self.run.remat == "block":
            rwkv = jax.checkpoint(rwkv, prevent_cse=False)
            attention = jax.checkpoint(attention, prevent_cse=False)

        def group(carry, scanned):
            blocks, attention_block = scanned
            (x, v_first), _ = jax.lax.scan(rwkv, carry, blocks)
            return (x if attention_block is None else attention(x, attention_block), v_first), None

        (x, _), _ = jax.lax.scan(group, (x, jnp.zeros_like(x)), self.grouped((self.blocks, first)))
        return self.ln_out(x)

    def grouped(self, stacked: Any) -> tuple[Any, Any]:
        """Per-layer trees [L, ...] as groups [M, L / M, ...], beside the attention blocks [M]."""
        groups = max(1, self.config.num_attention_blocks)
        split = lambda p: p.reshape(groups, self.config.blocks_per_group, *p.shape[1:])
        attention = self.attention_blocks if self.config.num_attention_blocks else None
        return jax.tree.map(split, stacked), attention

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Normalised embeddings, [B, T, D]."""
        return self.ln0(self.embed[...][tokens])


def create_model(config: ModelConfig, run: RunConfig | None = None) -> RWKVX:
    """A freshly initialised model; the seed is part of the config."""
    return RWKVX(config, rngs=nnx.Rngs(config.init_seed), run=run)


def abstract_model(config: ModelConfig, run: RunConfig | None = None) -> RWKVX:
    """The model with shapes in place of arrays: costs nothing, whatever its size."""
    return jax.eval_shape(lambda: create_model(config, run))


def get_params(model: RWKVX) -> Params:
    """All parameters as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model))


def with_params(model: RWKVX, params: Params) -> RWKVX:
    """The same model (concrete or abstract) around other parameters; nothing is copied."""
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def param_axes(model: RWKVX) -> Params:
    """Logical axes of every parameter, in the structure of `get_params`; stacks get "layers"."""
    axes = lambda v: ("layers",) * (v.ndim - len(v.axes)) + tuple(v.axes)
    return nnx.to_pure_dict(
        jax.tree.map(axes, nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))
    )

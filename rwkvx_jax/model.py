"""RWKVX: recurrent blocks with an attention block after every L / M of them.

One class holds the hybrid, plain RWKV-7 (`num_attention_blocks=0`), the full-attention hybrid
(`attention="full"`) and the Transformer (`num_blocks=0`). The forward pass scans over M groups, and
inside a group over its recurrent blocks, so that compile time does not grow with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int, Int32

from rwkvx_jax.cache import (
    AttentionState,
    Cache,
    CachePolicy,
    Gate,
    Shared,
    check_room,
    init_cache,
    spread,
)
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.modules.attention import Attention
from rwkvx_jax.modules.blocks import AttentionBlock, RWKVBlock, stack_blocks
from rwkvx_jax.modules.parameters import first_embedding, first_head, norm, parameter
from rwkvx_jax.modules.remat import block_input, rematerialize
from rwkvx_jax.modules.token_shift import last_valid
from rwkvx_jax.modules.trees import Params, is_list, scan_layers, where_or_zeros
from rwkvx_jax.ops.documents import check_segment_ids
from rwkvx_jax.ops.precision import precision_of
from rwkvx_jax.sharding import constrain


class Head(nnx.Module):
    """The output projection, without bias: weight [D, W]. With config.tied_embeddings it is [W, D]
    and the table of embeddings as well."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.tied = config.tied_embeddings
        if self.tied:
            self.weight = parameter(first_embedding(config, rngs.params()), "vocab", "embed")
        else:
            self.weight = parameter(first_head(config, rngs.params()), "embed", "vocab")

    def __call__(self, x: Float[Array, "*any D"]) -> Float32[Array, "*any W"]:
        """Logits of features."""
        weight = self.weight[...].astype(x.dtype)
        return jnp.matmul(
            x,
            weight.T if self.tied else weight,
            precision=precision_of(x.dtype),
            preferred_element_type=jnp.float32,
        )


class RWKVX(nnx.Module):
    """A language model over tokens.

    embed [W, D] (absent if the head is tied); ln0: norm of the embedding (backbone "rwkv"); blocks:
    L stacked recurrent blocks (absent if L is 0); attention_blocks: M stacked attention blocks
    (absent if M is 0; a single one if it is shared); ln_out; head.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, run: RunConfig | None = None):
        self.config = config
        self.run = run or RunConfig()
        if not config.tied_embeddings:
            self.embed = parameter(first_embedding(config, rngs.params()), "vocab", "embed")
        self.head = Head(config, rngs)
        if config.backbone == "rwkv":
            self.ln0 = norm(config, rngs, self.dtype)
        self.ln_out = norm(config, rngs, self.dtype)
        stack = lambda kind, count: stack_blocks(kind, count, config, rngs, self.dtype)
        if config.num_blocks:
            self.blocks = stack(RWKVBlock, config.num_blocks)
        if config.num_attention_blocks:
            self.attention_blocks = stack(AttentionBlock, config.attention_layers)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.run.compute_dtype)

    def __call__(
        self, tokens: Int[ArrayLike, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float32[Array, "B T W"]:
        """Logits of tokens.

        Args:
          tokens: rows of text.
          segment_ids: numbers of the documents packed in each row, 1, 2, ... in their order; 0 is
            padding, whose logits mean nothing. No document sees anything of another: each gets the
            logits that it has alone, but for sparse attention to a document that does not begin at
            a chunk and lies in more than `top_k` of them, where chunks are cut elsewhere. None: a
            row is one text.

        Raises:
          ValueError: segment_ids that number no documents (where their values are known, outside
            `jax.jit`), or a named implementation that takes none.
          ConfigError: segment_ids and a learned initial state.
        """
        return self.head(self.features(tokens, segment_ids))

    def features(
        self, tokens: Int[ArrayLike, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Normalised outputs of the last block, in the compute dtype; as `__call__`."""
        return self.observe(tokens, lambda attention, h: None, segment_ids)[0]

    def observe(
        self,
        tokens: Int[ArrayLike, "B T"],
        look: Callable[[Attention, jax.Array], Any],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        choosing: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """`features`, and what `look` returns for each attention module and its input [B, T, D],
        stacked [M, ...] (None without attention blocks). `choosing`: zeros for the blocks that read
        what another one chose."""
        if segment_ids is not None:
            check_segment_ids("model", segment_ids, *jnp.shape(tokens))
        x = self.embed_tokens(tokens)

        def rwkv(carry, scanned):
            block, first = scanned
            inputs = map(block_input, carry)
            x, v_first, _ = block(*inputs, first, self.run, segment_ids=segment_ids)
            return (x, v_first), None

        def attention(x, choice, block, chooses):
            x = block_input(x)

            def attend(attention, h):
                own = choice
                if choice is None:
                    out = attention(h, self.run, segment_ids)
                else:
                    out, own = attention.sharing(h, self.run, segment_ids, chooses, choice)
                see = lambda: look(attention, h)
                return out, (own, where_or_zeros(chooses, see) if choosing else see())

            x, _, (choice, seen) = block(x, attend, segment_ids=segment_ids)
            return x, choice, seen

        rwkv, attention = (rematerialize(f, self.run.remat) for f in (rwkv, attention))

        attention_blocks, shared = self.attentions()

        def group(carry, scanned):
            (carry, choice), (blocks, block, chooses), seen = carry, scanned, None
            if self.config.num_blocks:
                carry, _ = jax.lax.scan(rwkv, carry, blocks)
            (x, v_first), block = carry, block if shared is None else shared
            if block is not None:
                x, choice, seen = attention(x, choice, block, chooses)
            return ((x, v_first), choice), seen

        beyond = x.shape[1] > self.config.chunk_size * self.config.top_k  # else all is read
        carry = (x, jnp.zeros_like(x)), self._no_choice(*x.shape[:2]) if beyond else None
        groups = self.grouped(self.recurrent()), attention_blocks, self._choosing()
        ((x, _), _), seen = jax.lax.scan(group, carry, groups)
        return self.ln_out(x), seen

    def init_cache(
        self,
        batch: int,
        max_length: int,
        *,
        gate: Gate = "per_head",
        policy: CachePolicy | None = None,
    ) -> Cache:
        """An empty decode state for `batch` texts of at most `max_length` tokens; see cache.py."""
        return init_cache(self.config, self.dtype, batch, max_length, gate, policy)

    def prefill(
        self,
        tokens: Int32[Array, "B T"],
        cache: Cache,
        lengths: Int32[Array, " B"] | None = None,
    ) -> tuple[Float32[Array, "B W"], Cache]:
        """Reads a piece of text; any split of a prompt into pieces gives the same result.

        Args:
          tokens: right-padded where rows differ in length.
          cache: state before the piece. Under `jit` the caller sees to it that the piece fits in.
          lengths: valid tokens of each row (None: all); the rest changes nothing.

        Returns:
          Float32 logits [B, W] after each row's last valid token (meaningless where a row has
          none), and the new state.

        Raises:
          ConfigError: more tokens than the cache holds, where their number is not traced.
        """
        batch, time = tokens.shape
        lengths = jnp.full(batch, time, jnp.int32) if lengths is None else lengths
        check_room(cache, lengths)
        if cache.policy is None or not self.config.num_attention_blocks:
            features, cache = self.read(tokens, cache, lengths)
            last = last_valid(features, None, lengths)
        else:
            last, cache = self._read_in_segments(tokens, cache, lengths)
        return self.head(last), cache

    def decode(self, token: Int[Array, " B"], cache: Cache) -> tuple[Float32[Array, "B W"], Cache]:
        """Reads one token of each text: logits, and the new state."""
        check_room(cache, 1)
        features, cache = self.read(token[:, None], cache, jnp.ones_like(token))
        return self.head(features[:, 0]), cache

    def read(
        self, tokens: Int[Array, "B T"], cache: Cache, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Features of a piece of text (as `features` gives them of a whole one) and the
        new state; arguments as `prefill` takes them. A policy is applied before the first token
        only."""
        config, start = self.config, cache.length
        x = self.embed_tokens(tokens)
        attention_blocks, shared = self.attentions()

        def rwkv(carry, scanned):
            (block, first), state = scanned
            state = block.begun(state, start == 0)  # a text has no rows before its first token
            x, v_first, state = block(*carry, first, self.run, state, lengths)
            return (x, v_first), state

        def group(carry, scanned):
            x, v_first, pages, (choice, kept) = carry
            blocks, states, (layer, block, state, (chooses, rows)) = scanned
            if config.num_blocks:
                (x, v_first), states = scan_layers(rwkv, (x, v_first), (blocks, states))
            block = block if shared is None else shared
            if block is not None:
                attend = lambda attention, h: attention.cached(
                    h,
                    pages,
                    layer,
                    start,
                    lengths,
                    cache.position,
                    cache.gate,
                    cache.policy,
                    state.key_tail,
                    None if chooses is None else Shared(chooses, rows, choice, kept),
                )
                x, shift, (pages, tail, handed) = block(x, attend, state.ffn_shift, lengths)
                state = AttentionState(shift, tail)
                choice, kept = (None, None) if handed is None else handed[2:]
            return (x, v_first, pages, (choice, kept)), (states, state)

        blocks, states = self.grouped((self.recurrent(), cache.blocks))
        layers = cache.layers
        if layers is None:
            layers = jnp.arange(max(1, config.num_attention_blocks))
        choosing, handed = self._handed_on(cache, layers, *tokens.shape)
        (x, _, pages, _), (states, attention) = scan_layers(
            group,
            (x, jnp.zeros_like(x), cache.pages, handed),
            (blocks, states, (layers, attention_blocks, cache.attention, choosing)),
        )
        flat = lambda p: p.reshape(config.num_blocks, *p.shape[2:])
        rows = start if cache.policy is None else cache.policy.rows_after(start)
        rows = jnp.where(lengths > 0, rows, start)
        cache = dataclasses.replace(
            cache,
            length=rows + lengths,
            position=cache.position + lengths,
            blocks=jax.tree.map(flat, states),
            attention=attention,
            pages=pages,
        )
        return self.ln_out(x), spread(cache)

    def _read_in_segments(
        self, tokens: Int[Array, "B T"], cache: Cache, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B D"], Cache]:
        """`read` under a policy, as if token by token: the last features [B, D] and the new state.

        A compression falls due at the token that finds more rows than the trigger allows, and
        uses that token's query; so each row's text is cut before every such token, and a segment
        never holds more tokens than the pages have room for.
        """
        policy = cache.policy
        assert policy is not None
        size = min(tokens.shape[1], policy.trigger - policy.keep + 1)
        padded = jnp.pad(tokens, ((0, 0), (0, size)))

        def unfinished(carry):
            done, _, _ = carry
            return jnp.any(done < lengths)

        def segment(carry):
            done, last, cache = carry
            room = policy.trigger + 1 - policy.rows_after(cache.length)
            count = jnp.minimum(jnp.minimum(lengths - done, room), size)
            part = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (size,)))(
                padded, done
            )
            features, cache = self.read(part, cache, count)
            last = jnp.where((count > 0)[:, None], last_valid(features, None, count), last)
            return done + count, last, cache

        nothing = jnp.zeros((tokens.shape[0], self.config.width), self.dtype)
        carry = (jnp.zeros_like(lengths), nothing, cache)
        _, last, cache = jax.lax.while_loop(unfinished, segment, carry)
        return last, cache

    def recurrent(self) -> tuple[Any, Array]:
        """The recurrent blocks [L] (None if L is 0), and whether each is the first [L]."""
        return getattr(self, "blocks", None), jnp.arange(self.config.num_blocks) == 0

    def attentions(self) -> tuple[Any, Any]:
        """The attention blocks of the groups [M], or the one that all of them share; else None."""
        if not self.config.shared_attention:
            return getattr(self, "attention_blocks", None), None
        blocks = self.attention_blocks
        return None, blocks[0] if is_list(blocks) else jax.tree.map(lambda p: p[0], blocks)

    def _choosing(self) -> Bool[Array, " M"] | None:
        """Which attention blocks choose chunks; None: all of them, or there are none."""
        config = self.config
        if config.choosing_blocks == config.num_attention_blocks:
            return None
        return jnp.arange(config.num_attention_blocks) % config.share_selection_every == 0

    def _no_choice(self, batch: int, time: int) -> Int32[Array, "B T S J"] | None:
        """Choices of no chunk, for the first block to choose others; None: none are handed on."""
        if not self.config.shares_choices:
            return None
        shape = (batch, time, self.config.choices, self.config.top_k - 1)
        return constrain(jnp.full(shape, -1, jnp.int32), "batch", "time", "heads", None)

    def _handed_on(self, cache: Cache, layers: Int[Array, " M"], batch: int, time: int) -> Any:
        """Of each attention block whether it chooses and where the rows of its selector lie, both
        [M]; and what the first one gets handed, choices and rows that a policy keeps. None where
        each block chooses for itself."""
        config, rows, kept = self.config, None, None
        chooses = self._choosing()
        if chooses is not None:
            rows = layers[jnp.arange(len(layers)) // config.share_selection_every]
            if cache.policy is not None and config.shares_choices:
                rows_kept = jnp.zeros((batch, config.kv_heads, cache.policy.keep), jnp.int32)
                kept = constrain(rows_kept, "batch", "heads", None)
        return (chooses, rows), (self._no_choice(batch, time), kept)

    def grouped(self, stacked: Any) -> Any:
        """Trees by recurrent block [L, ...] as groups [M, L / M, ...]."""
        groups, size = max(1, self.config.num_attention_blocks), self.config.blocks_per_group

        def split(p):
            if isinstance(p, nnx.List):
                return [p[i * size : (i + 1) * size] for i in range(groups)]
            return p.reshape(groups, size, *p.shape[1:])

        return jax.tree.map(split, stacked, is_leaf=is_list)

    def embed_tokens(self, tokens: Int[ArrayLike, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings in the compute dtype, normalised with the backbone "rwkv"."""
        table = self.head.weight if self.config.tied_embeddings else self.embed
        # First as the table lies, its width over fsdp: the partitioner finds no way of its own from
        # there to whole rows where other axes are in use too, and would copy everything everywhere.
        x = constrain(jnp.asarray(table[...])[tokens], "replica", "time", "embed")
        x = constrain(x, "batch", "time", None)
        return self.ln0(x) if self.config.backbone == "rwkv" else x.astype(self.dtype)


def unstack(model: RWKVX) -> RWKVX:
    """The same model with each layer's parameters in arrays of their own, for reading from a cache.

    Its loops over layers are written out when traced: a scan would first copy each layer's weights
    out of the stack, which costs a decode step on a CPU a third of its time. The arrays are copies,
    made one layer after the other.
    """
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state)
    for name in ("blocks", "attention_blocks"):
        if (stack := getattr(model, name, None)) is not None:
            count = jax.tree.leaves(stack)[0].shape[0]
            layer = lambda i, stack=stack: jax.tree.map(lambda p: p[i], stack)
            setattr(model, name, nnx.List([layer(i) for i in range(count)]))
    return model


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

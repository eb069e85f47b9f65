"""Decode state: recurrent states, token shifts, and the pages of the attention blocks.

Everything has a static shape, so one compilation serves a whole generation. Keys and values of an
attention block lie in pages of one chunk each, [M, B, G, N, C, K], so that reading a chosen chunk
reads contiguous memory; R running rows of each page (its sum of keys, or what else the selector
keeps) serve the gate. Rows are written in place: pages travel through the layer scan as a carry.

Where a mesh is in force the cache is spread over it (`cache_axes`): texts over `data` and `fsdp`,
heads over `tensor`, and over `context` each text's pages, in stretches of equal length.

`CachePolicy` bounds the pages (the paper's K/V compression, spec section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.ops.selection import selector_of
from rwkvx_jax.sharding import check_heads, check_shared_choices, constrain, ways

Gate = Literal["per_head", "shared"]

Axes = tuple[str | None, ...]
"""Logical axes of an array, as `sharding.RULES` names them."""

MOST_ROWS = 2**31 - 1
"""Rows of a cache: they are numbered by int32."""


class TimeMixState(NamedTuple):
    """What the mixer of a recurrent block carries from one token to the next."""

    shift: Float[Array, "B X"]  # of RWKV the previous input; of convolutions the last few
    wkv: Float32[Array, "B H V K"]


class BlockState(NamedTuple):
    """What one recurrent block carries from one token to the next."""

    time_mix: TimeMixState
    ffn_shift: Float[Array, "B X"]  # of the channel mix; X is 0 where it looks at no other token


class AttentionState(NamedTuple):
    """What one attention block carries from one token to the next, beside its pages."""

    ffn_shift: Float[Array, "B X"]
    key_tail: Float[Array, "B X"]  # keys that the convolution still needs: key_conv - 1


class Shared(NamedTuple):
    """What one attention block hands to the next, where blocks share choices of chunks."""

    chooses: Bool[Array, ""]  # whether this block chooses; only then the pages get rows of it
    rows: Int[Array, ""]  # where in the pages the rows of the last block that chose lie
    choice: Int32[Array, "B T S J"] | None  # what that block chose; None: full attention
    kept: Int32[Array, "B G keep"] | None  # rows that it kept last; None without a policy


class Pages(NamedTuple):
    """Keys and values of all attention blocks; N pages of C rows for each of their G heads."""

    keys: Float[Array, "M B G N C K"]
    values: Float[Array, "M B G N C K"]
    # What the selector keeps of each page's keys, in blocks that choose; G and K are those of what
    # it scores.
    key_sums: Float32[Array, "M2 B G2 NR K2"]
    span_rows: Float32[Array, "M2 B G2 NS K2"] | None = None  # and of spans of pages, if any
    value_sums: Float32[Array, "M B G N K"] | None = None  # for the compressed branch of NSA


@dataclass(frozen=True)
class CachePolicy:
    """Bounds the rows of an attention block: when a token finds more than `trigger` rows, only
    `keep` stay: the last `window`, and those of the older ones which this token's query weighs
    most, each head choosing for itself (heads that share keys by the sum of their scores). Chosen
    rows are ordered by weight, as in the original.
    """

    trigger: int
    keep: int
    window: int

    def __post_init__(self):
        if not 0 < self.window < self.keep <= self.trigger:
            raise ConfigError(
                f"cache policy needs 0 < window < keep <= trigger, not window {self.window}, "
                f"keep {self.keep}, trigger {self.trigger}"
            )

    def due(self, rows: jax.Array) -> jax.Array:
        """Whether a token that finds this many rows has them compressed first."""
        return rows > self.trigger

    def rows_after(self, rows: jax.Array) -> jax.Array:
        """Rows that stay when a token finds `rows` of them."""
        return jnp.where(self.due(rows), self.keep, rows)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("length", "position", "blocks", "attention", "pages", "layers"),
    meta_fields=("gate", "policy"),
)
@dataclass(frozen=True)
class Cache:
    """State after reading `length` rows; made by `init_cache`, advanced by prefill and decode."""

    length: Int32[Array, " B"]  # rows in the pages: tokens read, less what a policy dropped
    position: Int32[Array, " B"]  # of the next token in its text: tokens read
    blocks: BlockState  # stacked [L, ...]
    attention: AttentionState | None  # stacked [M, ...]; None without attention blocks
    pages: Pages
    gate: Gate
    policy: CachePolicy | None
    # Where in `pages` each attention block lies; None: block i at i. See `snapshots.row_of`.
    layers: Int32[Array, " M"] | None = None

    @property
    def capacity(self) -> int:
        """Rows that the pages hold."""
        return self.pages.keys.shape[3] * self.pages.keys.shape[4]


def check_room(cache: Cache, count: int | jax.Array) -> None:
    """Refuses to read more rows than the pages hold, where the numbers are known (not traced).

    Args:
      cache: state before the piece.
      count: tokens to be read, for all rows or of each row [B].

    Raises:
      ConfigError: names the row count that would be needed and the capacity.
    """
    known = not any(isinstance(x, jax.core.Tracer) for x in (cache.length, count))
    if cache.policy is not None or not known or not cache.pages.keys.shape[0]:
        return
    if (rows := int(jnp.max(cache.length + count))) > cache.capacity:
        raise ConfigError(
            f"{rows} tokens do not fit into the cache of {cache.capacity} rows: make it with a "
            "larger max_length, or with a CachePolicy"
        )


def init_cache(
    config: ModelConfig,
    dtype: jnp.dtype,
    batch: int,
    max_length: int,
    gate: Gate = "per_head",
    policy: CachePolicy | None = None,
) -> Cache:
    """An empty cache, spread over the mesh in force; then it may have some more pages, so that
    `context` divides them.

    Args:
      config: the model.
      dtype: of shifts and pages; recurrent states and key sums are float32.
      batch: B.
      max_length: most tokens ever read without a policy (with one, memory is bounded by it).
      gate: "per_head" as trained, or "shared" as the original package decodes.
      policy: compression of the pages, or None to keep every row.

    Raises:
      ConfigError: a size below 1 or beyond what rows are numbered by, a gate that is not known,
        heads that the mesh does not divide, or spans or shared choices where it parts pages.
    """
    if batch < 1 or max_length < 1:
        raise ConfigError(f"cache needs batch and max_length >= 1, not {batch}, {max_length}")
    _check_gate(gate, config)
    rows = _rows(config, max_length, policy)
    if rows > MOST_ROWS:
        raise ConfigError(
            f"a cache of {rows:,} rows: it can have {MOST_ROWS:,}; lower max_length, or give a "
            "CachePolicy"
        )
    if config.attention == "nsa":
        _check_nsa(policy)
    count = _pages(config, rows)
    arguments = config, dtype, batch, count, gate, policy
    if jax.sharding.get_abstract_mesh().empty:
        return _empty(*arguments)
    if config.num_attention_blocks:
        check_heads(config, ways("heads"))
    check_spans(config)
    check_shared_choices(config, ways("pages"))
    # Compiled, so that every device makes its own part.
    return jax.jit(lambda: spread(_empty(*arguments)))()


def _empty(
    config: ModelConfig,
    dtype: jnp.dtype,
    batch: int,
    count: int,  # of pages
    gate: Gate,
    policy: CachePolicy | None,
) -> Cache:
    layers, attention = config.num_blocks, config.num_attention_blocks
    heads, size, shift = config.kv_heads, config.head_size, config.channel_mix_shift
    mixer, selector = config.mixer_sizes, selector_of(config)
    pages = (attention, batch, heads, count, config.chunk_size, size)
    scored = lambda rows: selector.start(
        (config.choosing_blocks, batch, config.scored_heads, rows, config.scored_size)
    )
    return Cache(
        length=jnp.zeros(batch, jnp.int32),
        position=jnp.zeros(batch, jnp.int32),
        blocks=BlockState(
            TimeMixState(
                jnp.zeros((layers, batch, mixer.shift), dtype),
                jnp.zeros((layers, batch, mixer.heads, mixer.values, mixer.keys), jnp.float32),
            ),
            jnp.zeros((layers, batch, shift), dtype),
        ),
        attention=AttentionState(
            jnp.zeros((attention, batch, shift), dtype),
            jnp.zeros((attention, batch, max(0, config.key_conv - 1) * config.kv_width), dtype),
        )
        if attention
        else None,
        pages=Pages(
            jnp.zeros(pages, dtype),
            jnp.zeros(pages, dtype),
            scored(count * selector.rows),
            scored(count // selector.span * 2) if selector.span else None,
            scored(count) if config.attention == "nsa" else None,
        ),
        gate=gate,
        policy=policy,
    )


def page_axes(gate: Gate) -> tuple[Axes, Axes, Axes, Axes, Axes]:
    """Logical axes of `Pages`. Under the shared gate, which scores a chunk by the keys of all
    heads, every device has the sums of all."""
    rows = ("layers", "batch", "heads", "pages", None, None)
    scored = "heads" if gate == "per_head" else None
    sums = ("layers", "batch", scored, "pages", None)
    return rows, rows, sums, sums, sums


def cache_axes(cache: Cache) -> Any:
    """Logical axes of every array of a cache, as a tree with tuples for leaves."""
    texts, rows, states = ("batch",), ("layers", "batch", None), ("layers", "batch", "heads")
    layers = None if cache.layers is None else ("layers",)
    axes: Any = (texts, texts, rows, (*states, None, None), layers)
    length, position, shift, wkv, blocks = axes
    pages = zip(page_axes(cache.gate), cache.pages, strict=True)
    there: Any = (None if x is None else axes for axes, x in pages)
    return replace(
        cache,
        length=length,
        position=position,
        blocks=BlockState(TimeMixState(shift, wkv), shift),
        attention=None if cache.attention is None else AttentionState(shift, shift),
        pages=Pages(*there),
        layers=blocks,
    )


def over_cache(fn: Callable[..., Any], cache: Cache) -> Cache:
    """The cache with `fn(axes, array)` in place of each array."""
    leaf = lambda x: type(x) is tuple
    return jax.tree.map(fn, cache_axes(cache), cache, is_leaf=leaf)


def spread(cache: Cache) -> Cache:
    """The cache, asked to lie over the mesh in force by its logical axes."""
    return over_cache(lambda axes, x: constrain(x, *axes), cache)


def _check_gate(gate: Gate, config: ModelConfig) -> None:
    """Raises ConfigError for a gate that is not known, or that the model can't have."""
    if gate not in ("per_head", "shared"):
        raise ConfigError(f'gate is {gate!r}: choose "per_head" or "shared"')
    if gate == "shared" and config.attention == "nsa":
        raise ConfigError(
            'gate "shared" is the original package\'s, which knows no attention "nsa": use '
            'gate="per_head"'
        )
    if gate == "shared" and config.selector != "mean":
        raise ConfigError(
            f'gate "shared" is the original package\'s, whose selector is "mean", not '
            f'{config.selector!r}: use gate="per_head"'
        )
    if gate == "shared" and config.shares_choices:
        raise ConfigError(
            f'gate "shared" is the original package\'s, in which each attention block chooses, but '
            f"model.share_selection_every is {config.share_selection_every}: use "
            'gate="per_head"'
        )
    if gate == "shared" and config.kv_heads != config.num_heads:
        raise ConfigError(
            f'gate "shared" scores a chunk by all channels of queries and keys, of which there are '
            f'{config.width} and {config.kv_width}: use gate="per_head"'
        )


def _check_nsa(policy: CachePolicy | None) -> None:
    """Raises ConfigError for what the compressed branch of NSA can't read from."""
    if policy is not None:
        raise ConfigError(
            f'{policy} drops rows, but attention "nsa" reads the means of whole chunks and the '
            "last tokens by their places: use policy=None"
        )
    if ways("pages") > 1:
        raise ConfigError(
            f"mesh.context {ways('pages')} would part the chunks that the compressed branch of "
            'attention "nsa" reads together in decoding: use mesh.context 1'
        )


def check_spans(config: ModelConfig) -> None:
    """Raises ConfigError where the mesh in force would part the spans of a selector."""
    if config.selection_span and ways("pages") > 1:
        raise ConfigError(
            f"mesh.context {ways('pages')} would part the spans of model.selection_span "
            f"{config.selection_span}: use mesh.context 1, or selection_span 0"
        )


def _rows(config: ModelConfig, max_length: int, policy: CachePolicy | None) -> int:
    """Rows of an attention block's pages; without any such block nothing is kept in them."""
    if not config.num_attention_blocks:
        return 1
    return max_length if policy is None else min(max_length, policy.trigger + 1)


def _pages(config: ModelConfig, rows: int) -> int:
    """Pages that hold so many rows: whole spans of them, as many on each device."""
    unit = (config.selection_span or 1) * ways("pages")
    return -(-rows // (config.chunk_size * unit)) * unit


def cache_bytes(
    config: ModelConfig,
    dtype: jnp.dtype,
    batch: int,
    max_length: int,
    policy: CachePolicy | None = None,
) -> int:
    """Bytes of the cache that `init_cache` would make, on all devices of the mesh in force
    together, known without making it."""
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    least = _pages(config, 1)
    one = jax.eval_shape(lambda: _empty(config, dtype, 1, least, "per_head", None))
    pages, count = bytes_of(one.pages), _pages(config, _rows(config, max_length, policy)) // least
    return batch * (bytes_of(one) - pages + count * pages)

"""Which options of the choice of chunks go together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rwkvx_jax.config.values import require

if TYPE_CHECKING:
    from rwkvx_jax.config.model import ModelConfig


LEARNED = ("index", "seer")
"""Selectors that are learned, by `Stage.selection_loss`."""


def check_choices(config: ModelConfig) -> None:
    """Raises ConfigError for options of the choice of chunks that do not go together."""
    if config.attention == "nsa":
        _check_nsa(config)
    require(
        config.selector not in ("max", "pooled", "index")
        or (config.selector_blocks >= 1 and config.chunk_size % config.selector_blocks == 0),
        f"model.selector_blocks {config.selector_blocks} does not divide model.chunk_size "
        f"{config.chunk_size}, as the selector {config.selector!r} needs it to",
    )
    heads = config.num_heads
    require(
        config.selection_groups >= 0 and heads % config.choices == 0,
        f"model.selection_groups is {config.selection_groups}: it must divide the {heads} heads "
        "of queries, or be 0 for a choice of each head",
    )
    within = config.choices % config.kv_heads == 0
    require(
        within or config.selector == "index",
        f"model.selection_groups is {config.selection_groups}, but heads that choose together by "
        f"the selector {config.selector!r} score the same keys: use a multiple of the "
        f'{config.kv_heads} heads of keys (model.num_kv_heads), or selector="index"',
    )
    require(
        within or config.kv_heads % config.choices == 0,
        f"model.selection_groups is {config.selection_groups}: of it and of the {config.kv_heads} "
        "heads of keys (model.num_kv_heads) one must divide the other",
    )
    require(
        config.index_size >= 0 and (config.learned_selector or config.index_size == 0),
        f'model.index_size is {config.index_size}: it is of the selectors "index" and "seer", not '
        f"of {config.selector!r}, and 0 is head_size",
    )
    require(
        config.share_selection_every >= 1,
        f"model.share_selection_every is {config.share_selection_every}: use 1, so that each "
        "attention block chooses for itself, or more",
    )
    if not config.selection_span:
        return
    require(
        config.selection_span > 1 and config.selector in ("bounds", "index"),
        f"model.selection_span is {config.selection_span} with the selector {config.selector!r}: "
        'spans have 2 chunks or more, and are chosen by the selectors "bounds" and "index"; '
        "use 0 for none",
    )
    require(
        (config.selection_spans - 1) * config.selection_span >= config.top_k - 1,
        f"model.selection_spans {config.selection_spans} of model.selection_span "
        f"{config.selection_span} chunks may hold fewer past chunks than model.top_k "
        f"{config.top_k} asks for: raise one of them",
    )


def _check_nsa(config: ModelConfig) -> None:
    """Raises ConfigError where options contradict how NSA chooses."""
    require(
        config.top_k >= 3,
        f'model.top_k is {config.top_k}, but attention "nsa" always reads the own chunk, the one '
        "before it and the first: use 3 or more",
    )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in ("selector", "selection_join", "selection_span", "share_selection_every"):
        value, own = getattr(config, name), defaults[name]
        require(
            value == own,
            f'model.{name} is {value!r}, but the chunks of attention "nsa" are chosen by its '
            f"compressed branch: leave it {own!r}",
        )
    require(
        config.forced_chunks in ("none", "both"),
        f'model.forced_chunks is {config.forced_chunks!r}, but attention "nsa" always reads both '
        'the first chunk and the previous one: leave it "none"',
    )
    require(
        config.selection_groups in (0, config.kv_heads),
        f'model.selection_groups is {config.selection_groups}, but with attention "nsa" the heads '
        f"of each of the {config.kv_heads} heads of keys (model.num_kv_heads) choose together: "
        "leave it 0",
    )

"""Is it RWKV-7 that makes the hybrid good, or the attention? Every mixer in the same small recipe.

    python train.py --config configs/twins_4k.py:kda --data.path 'books/[!d]*.txt'
    python train.py --config configs/twins_4k.py:kda-alone --data.path 'books/[!d]*.txt'
    python train.py --config configs/twins_4k.py:transformer --data.path 'books/[!d]*.txt'

The small recipe of `recall_64k` (3.3 M tokens, lengths up to 4,096) on three recurrent blocks and
one of sparse attention; `-alone`: on four recurrent blocks. Variants are the values of
`ModelConfig.mixer`, each with `-alone` too; the RWKV-7 hybrid has no variant. `transformer` and
`transformer-sparse` are four blocks of Llama with rotary positions, with full attention or with the
hybrid's sparse one; all their stages train everything. The channel mixes are as wide as makes the
parameters equal to those of the RWKV-7 hybrid within 2 %. All read the same tokens in the same
order. Expected: docs/recurrences.md says which of them have been trained.
"""

import dataclasses
from typing import get_args

from rwkvx_jax.config import Config, ModelConfig
from rwkvx_jax.config.mixers import MixerName
from rwkvx_jax.experiment_files import load_config

MIXERS = get_args(MixerName)
TRANSFORMERS = {"transformer": "full", "transformer-sparse": "sparse"}
VARIANTS = (*MIXERS[1:], *(f"{mixer}-alone" for mixer in MIXERS), *TRANSFORMERS)


def as_large(model: ModelConfig, parameters: int) -> ModelConfig:
    """The model with the channel mix that brings its parameters closest to that number."""
    with_width = lambda width: dataclasses.replace(model, ffn_width=width)
    each = with_width(2).num_parameters - with_width(1).num_parameters
    return with_width(1 + round((parameters - with_width(1).num_parameters) / each))


def get_config(variant: str = "") -> Config:
    mixer, alone, _ = (variant or "rwkv7").partition("-alone")
    config = load_config("recall_64k:small")
    hybrid = dataclasses.replace(config.model, num_blocks=3, num_attention_blocks=1)
    if variant in TRANSFORMERS:
        model = dataclasses.replace(
            hybrid,
            num_blocks=0,
            num_attention_blocks=4,
            backbone="llama",
            attention=TRANSFORMERS[variant],
            rope_theta=10_000.0,
            key_conv=0,
            attention_init="zero",
        )
    else:
        model = dataclasses.replace(hybrid, mixer=mixer)
    if alone:
        model = dataclasses.replace(model, num_blocks=4, num_attention_blocks=0, key_conv=0)
    if alone or variant in TRANSFORMERS:  # nothing is expanded, and nothing preheated
        stages = tuple(
            dataclasses.replace(s, trainable="all", expanded=s.expanded or not alone)
            for s in config.stages
        )
        config = dataclasses.replace(config, stages=stages)
    return dataclasses.replace(config, model=as_large(model, hybrid.num_parameters))

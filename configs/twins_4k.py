"""Is it RWKV-7 that makes the hybrid good, or the attention? Every mixer in the same small recipe.

    python train.py --config configs/twins_4k.py:kda --data.path 'books/[!d]*.txt'
    python train.py --config configs/twins_4k.py:kda-alone --data.path 'books/[!d]*.txt'

The small recipe of `recall_64k` (3.3 M tokens, lengths up to 4,096) on three recurrent blocks and
one of sparse attention; `-alone`: on four recurrent blocks. Variants are the values of
`ModelConfig.mixer`, each with `-alone`; without a variant it is RWKV-7. The channel mixes are as
wide as makes the parameters equal to those of the RWKV-7 hybrid within 2 %. All read the same
tokens in the same order. Expected: docs/recurrences.md says which of them have been trained.
"""

import dataclasses
from typing import get_args

from rwkvx_jax.config import Config, ModelConfig
from rwkvx_jax.config.mixers import MixerName
from rwkvx_jax.experiment_files import load_config

MIXERS = get_args(MixerName)
VARIANTS = (*MIXERS, *(f"{mixer}-alone" for mixer in MIXERS))


def as_large(model: ModelConfig, parameters: int) -> ModelConfig:
    """The model with the channel mix that brings its parameters closest to that number."""
    with_width = lambda width: dataclasses.replace(model, ffn_width=width)
    each = with_width(2).num_parameters - with_width(1).num_parameters
    return with_width(1 + round((parameters - with_width(1).num_parameters) / each))


def get_config(variant: str = "") -> Config:
    mixer, alone, _ = (variant or "rwkv7").partition("-alone")
    config = load_config("recall_64k:small")
    hybrid = dataclasses.replace(config.model, num_blocks=3, num_attention_blocks=1)
    model = dataclasses.replace(hybrid, mixer=mixer)
    if alone:
        model = dataclasses.replace(model, num_blocks=4, num_attention_blocks=0, key_conv=0)
        stages = tuple(dataclasses.replace(s, trainable="all") for s in config.stages)
        config = dataclasses.replace(config, stages=stages)
    return dataclasses.replace(config, model=as_large(model, hybrid.num_parameters))

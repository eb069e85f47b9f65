"""The plain RWKV-7 beside recall_64k.py: as many blocks, as many parameters, the same tokens.

    python train.py --config configs/recall_64k_rwkv7.py --data.path 'books/[!d]*.txt'

Four RWKV-7 blocks, their channel mix narrower so that the number of parameters differs by 0.2 %.
There is nothing to expand or preheat: all stages train everything, whatever their names say.
"""

import dataclasses
from pathlib import Path

from rwkvx_jax.cli import load_config
from rwkvx_jax.config import Config


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("recall_64k.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, num_blocks=4, num_attention_blocks=0, ffn_width=190, key_conv=0
        ),
        stages=tuple(dataclasses.replace(stage, trainable="all") for stage in base.stages),
    )

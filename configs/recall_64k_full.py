"""The full-attention hybrid beside recall_64k.py: the same parameters, every query reads it all.

    python train.py --config configs/recall_64k_full.py --data.path 'books/[!d]*.txt'

Up to 16,384 bytes only: time per byte grows with the length.
"""

import dataclasses
from pathlib import Path

from rwkvx_jax.cli import load_config
from rwkvx_jax.config import Config


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("recall_64k.py"))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, attention="full"),
        stages=tuple(stage for stage in base.stages if stage.seq_len <= 16_384),
    )

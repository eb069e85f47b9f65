"""recall_64k.py in small, for ablations: 3.3 M tokens, lengths up to 4,096, LongCE at the end.

    python train.py --config configs/recall_4k.py --data.path 'books/[!d]*.txt' --model.top-k 4

Any field can be changed on the command line.
"""

import dataclasses
from pathlib import Path

from rwkvx_jax.cli import load_config
from rwkvx_jax.config import Config, LongCEConfig

STEPS = {"rwkv7": 150, "preheat": 50, "grow-256": 700, "grow-1024": 200, "grow-4096": 80}


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("recall_64k.py"))
    stages = [
        dataclasses.replace(stage, steps=STEPS[stage.name])
        for stage in base.stages
        if stage.name in STEPS
    ]
    last = dataclasses.replace(
        stages[-1],
        schedule="linear",
        final_lr=1e-4,
        loss="longce",
        longce=LongCEConfig(window=1024, stride=1024),
    )
    return dataclasses.replace(base, stages=(*stages[:-1], last))

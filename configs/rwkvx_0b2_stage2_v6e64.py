"""RWKV-X 0.22B, stage 2, on 64 chips of TPU v6e (8x8).

    python train.py --config configs/rwkvx_0b2_stage2_v6e64.py --data.path DIR/prolong64k \\
        --init-from runs/rwkvx_0b2_stage1

The recipe is that of rwkvx_0b2_stage2.py: one sample a chip at once, in two parts.
"""

import dataclasses
from pathlib import Path

from rwkvx_jax.cli import load_config
from rwkvx_jax.config import Config, MeshConfig


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("rwkvx_0b2_stage2.py"))
    (stage,) = base.stages
    return dataclasses.replace(
        base,
        mesh=MeshConfig(data=64, platform="tpu"),
        run=dataclasses.replace(base.run, loss_block=262144),
        stages=(dataclasses.replace(stage, accumulation=2),),
    )

"""RWKV-X 3.6B, stage 2, on 256 chips of TPU v5e (16x16).

    python train.py --config configs/rwkvx_3b6_stage2_v5e256.py --data.path DIR/prolong64k \\
        --init-from runs/rwkvx_3b6_stage1

The recipe is that of rwkvx_3b6_stage2.py but for the length: 65,536 tokens instead of 64,000, as
each sample is cut over chips, into whole chunks of 2048 tokens; accordingly fewer steps.
"""

import dataclasses
from pathlib import Path

from rwkvx_jax.cli import load_config
from rwkvx_jax.config import Config, MeshConfig


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("rwkvx_3b6_stage2.py"))
    (stage,) = base.stages
    return dataclasses.replace(
        base,
        mesh=MeshConfig(data=1, fsdp=16, tensor=2, context=8, platform="tpu"),
        stages=(dataclasses.replace(stage, seq_len=65_536, steps=977),),
    )

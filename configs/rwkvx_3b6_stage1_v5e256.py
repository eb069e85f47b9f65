"""RWKV-X 3.6B, stage 1, on 256 chips of TPU v5e (16x16).

    python train.py --config configs/rwkvx_3b6_stage1_v5e256.py --data.path DIR/minipile \\
        --init-from RWKV-x070-World-2.9B-v3-20250211-ctx4096.pth

The recipe is that of rwkvx_3b6_stage1.py: parameters over 64 chips, one sample a chip at once, in
four parts.
"""

import dataclasses
from pathlib import Path

from rwkvx_jax.cli import load_config
from rwkvx_jax.config import Config, MeshConfig


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("rwkvx_3b6_stage1.py"))
    (stage,) = base.stages
    return dataclasses.replace(
        base,
        mesh=MeshConfig(data=4, fsdp=64, platform="tpu"),
        run=dataclasses.replace(base.run, loss_block=524288),
        stages=(dataclasses.replace(stage, accumulation=4),),
    )

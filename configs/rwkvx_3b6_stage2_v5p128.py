"""RWKV-X 3.6B, stage 2, on 128 chips of TPU v5p (4x4x8), each sample cut over eight of them.

    python train.py --config configs/rwkvx_3b6_stage2_v5p128.py --data.path DIR/prolong64k \\
        --init-from runs/rwkvx_3b6_stage1

The recipe is that of rwkvx_3b6_stage2.py but for the length: 65,536 tokens instead of 64,000, so
that each chip has whole chunks of 2048 tokens; accordingly fewer steps. For 128K- or 1M-token
samples set `--stages.0.seq-len` and `--run.remat block` besides (docs/plan.md says what fits).
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
        mesh=MeshConfig(data=1, fsdp=16, context=8, platform="tpu"),
        run=dataclasses.replace(base.run, loss_block=524288, remat="save_projections"),
        stages=(dataclasses.replace(stage, seq_len=65_536, steps=977),),
    )

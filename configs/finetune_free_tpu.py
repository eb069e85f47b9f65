"""LoRA fine-tuning of RWKV-7 World 1.5B on free TPUs: one chip of v5e (Colab), or eight (Kaggle).

    python train.py --config configs/finetune_free_tpu.py:colab --data.path 'books/*.txt' \\
        --init-from RWKV-x070-World-1.5B-v3-20250127-ctx4096.pth

Adapters of rank 16 beside the matrices of all blocks train on samples of 1,024 tokens. Each chip
takes 32 samples a step, in 4 parts. A checkpoint has about 6 GB. Without a variant: `colab`, on any
devices. Variants:

    colab     one chip: 32 samples a step, 300 steps, 9.8 M tokens
    kaggle    eight chips (2x4): 256 samples a step, 100 steps, 26 M tokens

Estimated, compiled, never run (Python 3.11, jax 0.10.2, libtpu 0.0.42.1):

    colab     13.7 of 15.75 GiB, 2.64 s a step, 12,400 tokens/s, all steps in 0.22 hours
    kaggle    13.7 of 15.75 GiB a chip, 2.65 s a step, 99,000 tokens/s, all steps in 0.07 hours

    python -m rwkvx_jax.plan --config configs/finetune_free_tpu.py:kaggle --topology v5e:2x4
    python -m rwkvx_jax.plan --config configs/finetune_free_tpu.py:colab --topology v5e:2x2 \\
        --mesh.data 4 --stages.0.global-batch 128

The second command is for `colab`: the planner knows no topology of a single v5e chip, so four were
compiled, each with the share of one. A quarter of their tokens/s is given.

Expected: at step 1 the loss is that of the pretrained model; the held-out loss falls from there.
"""

import dataclasses

from rwkvx_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    Stage,
)

VARIANTS = ("colab", "kaggle")


def get_config(variant: str = "") -> Config:
    config = Config(
        # The shapes of RWKV-7 World 1.5B.
        model=ModelConfig(num_blocks=24, num_attention_blocks=0, width=2048),
        data=DataConfig(
            tokenizer="world",
            path="data/books",
            sources=(SourceConfig("text"),),
            reset_at_documents=False,  # the TPU kernels, which the estimates are of, take no resets
        ),
        optimizer=OptimizerConfig(weight_decay=0.0),
        # A checkpoint of the 1.5B model has 6 GB.
        run=RunConfig(checkpoint_every=50, keep_checkpoints=1),
        stages=(
            Stage(
                "adapt",
                seq_len=1024,
                global_batch=32,
                steps=300,
                peak_lr=2e-4,
                trainable="lora",
                lora=LoRAConfig(rank=16),
                schedule="cosine",
                final_lr=2e-5,
                warmup_steps=10,
                accumulation=4,
            ),
        ),
    )
    match variant:
        case "colab":
            return dataclasses.replace(config, mesh=MeshConfig(data=1, platform="tpu"))
        case "kaggle":
            (stage,) = config.stages
            return dataclasses.replace(
                config,
                mesh=MeshConfig(data=8, platform="tpu"),
                stages=(dataclasses.replace(stage, global_batch=256, steps=100),),
            )
    return config

"""Fine-tuning on free TPUs: one chip of v5e (Colab), or eight (Kaggle).

    python train.py --config configs/finetune_free_tpu.py:colab --data.path 'books/*.txt' \\
        --init-from RWKV-x070-World-1.5B-v3-20250127-ctx4096.pth
    python train.py --config configs/finetune_free_tpu.py:kaggle --data.path 'books/*.txt' \\
        --init-from RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth

Without a variant: `colab`, on any devices.

    colab     one chip: adapters of rank 16 for RWKV-7 World 1.5B, on samples of 1,024 tokens
    kaggle    eight chips (2x4): World 0.1B becomes RWKV-X 0.22B. Its attention blocks are
              preheated on 512 tokens, then everything trains on 16,384 tokens with LongCE

@PLAN@
"""

import dataclasses

from rwkvx_jax.config import (
    Config,
    DataConfig,
    LongCEConfig,
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
        data=DataConfig(tokenizer="world", path="data/books", sources=(SourceConfig("text"),)),
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
            return dataclasses.replace(
                config,
                model=ModelConfig.rwkvx_0b2(),
                mesh=MeshConfig(data=8, platform="tpu"),
                stages=(
                    Stage("preheat", 512, 64, 500, 1e-4, trainable="attention", warmup_steps=10),
                    Stage(
                        "long",
                        seq_len=16_384,
                        global_batch=8,
                        steps=250,
                        peak_lr=1e-5,
                        loss="longce",
                        longce=LongCEConfig(window=2000, stride=2000),
                    ),
                ),
            )
    return config

"""A small RWKV-X from nothing to looking up one of 64 numbers, on a CPU in a few minutes.

    python train.py --config configs/tiny_cpu.py

A plain RWKV-7 over bytes is trained on short texts. It is expanded with two attention blocks, which
are preheated while the rest is frozen. Then everything trains on documents full of names and
numbers, 256 bytes long at first and 2,048 at last, where 64 pairs are more than the recurrent state
holds. Expected: `make demo` draws 90 to 100 % of right answers with the attention blocks, and at
most 10 % without, at 2,048 bytes and at four times that.
"""

from rwkvx_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    Stage,
)

# Shares of the sources in the base model, while the hybrid learns to look up, and then from afar.
# The base is trained briefly: after 60 steps instead of 20 the look-up is learned much later.
BASE, SHORT, LONG = (0.5, 0.5, 0.0, 0.0), (0.1, 0.9, 0.0, 0.0), (0.1, 0.0, 0.3, 0.6)


def get_config() -> Config:
    rate = 2e-3
    return Config(
        model=ModelConfig(
            vocab_size=257,
            num_blocks=2,
            num_attention_blocks=2,
            width=128,
            head_size=64,
            ffn_width=256,
            chunk_size=32,
            top_k=64,
            selector="bounds",
            key_conv=2,
            attention_init="aligned",
        ),
        data=DataConfig(
            tokenizer="byte",
            sources=(
                SourceConfig("text"),
                SourceConfig("pairs", pairs=8),
                SourceConfig("pairs", pairs=64),
                SourceConfig("recall", pairs=64, questions=24, targets="answers"),
            ),
            reset_at_documents=False,  # so the expected results were measured
        ),
        optimizer=OptimizerConfig(policy="rwkv_lm", weight_decay=0.1),
        run=RunConfig(compute_dtype="float32", remat="none", eval_batches=0),
        stages=(
            Stage("rwkv7", 128, 16, 20, rate, expanded=False, warmup_steps=20, source_weights=BASE),
            Stage(
                "preheat",
                256,
                8,
                10,
                rate,
                trainable="attention",
                warmup_steps=10,
                source_weights=SHORT,
            ),
            Stage("grow-256", 256, 8, 260, rate, warmup_steps=20, source_weights=SHORT),
            Stage(
                "grow-2048",
                2048,
                2,
                60,
                rate,
                schedule="linear",
                final_lr=rate / 10,
                loss_average="sample",
                source_weights=LONG,
            ),
        ),
    )

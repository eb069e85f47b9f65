"""A small RWKV-X from nothing to passkeys 4096 bytes away, on a CPU.

    python train.py --config configs/tiny_cpu.py

A plain RWKV-7 over bytes learns prose and passkeys on short texts; it is expanded with an
attention block, which is preheated while the rest is frozen; then everything trains on lengths
that grow to 4096, four times what one query of the sparse attention reads (chunk_size x top_k).
Expected: `passkey_accuracy` of the last probe at least 0.95.
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


def get_config() -> Config:
    rate = 2e-3
    # Long samples hold few answers: there, most of them are passkeys.
    long = (0.1, 0.9)
    return Config(
        model=ModelConfig.tiny(),
        data=DataConfig(
            tokenizer="byte",
            sources=(SourceConfig("text", weight=0.3), SourceConfig("passkey", weight=0.7)),
        ),
        optimizer=OptimizerConfig(policy="rwkv_lm", weight_decay=0.1),
        run=RunConfig(compute_dtype="float32", probe_trials=20, eval_batches=2),
        stages=(
            Stage("rwkv7", 128, 64, 150, rate, expanded=False, warmup_steps=20),
            Stage("preheat", 128, 64, 40, rate, trainable="attention", warmup_steps=10),
            Stage("grow-256", 256, 32, 150, rate, warmup_steps=10),
            Stage("grow-1024", 1024, 8, 100, rate, warmup_steps=5, source_weights=long),
            Stage(
                "grow-4096",
                4096,
                4,
                90,
                rate,
                schedule="linear",
                final_lr=rate / 10,
                source_weights=long,
            ),
        ),
    )

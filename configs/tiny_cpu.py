"""A small RWKV-X from nothing to long passkeys on a CPU.

    python train.py --config configs/tiny_cpu.py

A plain RWKV-7 over bytes learns prose and passkeys on short texts; it is expanded with an
attention block, which is preheated; then everything trains on growing lengths up to 4096.
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
    return Config(
        model=ModelConfig.tiny(),
        data=DataConfig(
            tokenizer="byte",
            sources=(SourceConfig("text", 0.5), SourceConfig("passkey", 0.5)),
        ),
        optimizer=OptimizerConfig(policy="rwkv_lm", weight_decay=0.1),
        run=RunConfig(compute_dtype="float32", probe_trials=10, checkpoint_every=100),
        stages=(
            Stage("rwkv7", 128, 64, 200, rate, expanded=False, warmup_steps=20),
            Stage("preheat", 256, 32, 100, rate, trainable="attention", warmup_steps=10),
            Stage("grow-256", 256, 32, 300, rate, warmup_steps=10),
            Stage("grow-1024", 1024, 8, 50, rate),
            Stage("grow-4096", 4096, 2, 50, rate, schedule="linear"),
        ),
    )

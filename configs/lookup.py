"""Retrieval in words that were never trained on: facts in many wordings, passages that come again.

    python train.py --config configs/lookup.py --data.path 'books/[!d]*.txt'

Three RWKV-7 blocks and one of sparse attention (0.66 M parameters over bytes), nothing preheated,
cross-entropy: what `results/ablations.sh` found best in small. 8.6 M tokens, lengths up to 4,096.
The documents state facts in many wordings, in filler and in books, and ask for some of them;
`eval.py lookup` asks in wordings, about attributes and in notations that are kept from training.

Variants, such as `--config configs/lookup.py:rwkv7`:

    rwkv7    the plain RWKV-7 as a baseline: four blocks, parameters equal within 2 %
"""

import dataclasses

from rwkvx_jax.config import Config, SourceConfig, Stage
from rwkvx_jax.experiment_files import load_config

# Each source with its share in the stages of 256, 1024 and 4096 tokens. Pairs come first: they
# teach to look up, since nearly every line of theirs can be known; wordings follow.
ANSWERS, BALANCED = {"targets": "answers"}, {"targets": "balanced"}
SOURCES = (
    (SourceConfig("text"), (0.25, 0.15, 0.15)),
    (SourceConfig("pairs", pairs=8), (0.4, 0.1, 0)),
    (SourceConfig("pairs", pairs=64), (0, 0.1, 0.1)),
    (SourceConfig("book-copy", **BALANCED), (0.1, 0.1, 0.15)),
    (SourceConfig("lookup", pairs=2, questions=2, **ANSWERS), (0.25, 0.1, 0)),
    (SourceConfig("lookup", pairs=16, questions=12, **ANSWERS), (0, 0.25, 0.2)),
    (SourceConfig("book-lookup", pairs=16, questions=8, **BALANCED), (0, 0.2, 0.4)),
)

VARIANTS = ("rwkv7",)


def get_config(variant: str = "") -> Config:
    twin = load_config("twins_4k:rwkv7-alone" if variant else "twins_4k")
    sources, shares = zip(*SOURCES, strict=True)
    mix_256, mix_1024, mix_4096 = zip(*shares, strict=True)
    sample = {"loss_average": "sample"}
    stages = (
        Stage("grow-256", 256, 8, 600, 2e-3, warmup_steps=50, source_weights=mix_256),
        Stage("grow-1024", 1024, 4, 1200, 2e-3, source_weights=mix_1024, **sample),
        Stage(
            "grow-4096", 4096, 2, 300, 2e-3, schedule="linear", final_lr=1e-4,
            source_weights=mix_4096, **sample,
        ),
    )  # fmt: skip
    data = dataclasses.replace(twin.data, sources=sources)
    return dataclasses.replace(twin, data=data, stages=stages)

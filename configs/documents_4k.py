"""What resets between documents buy: the small hybrid on windows full of short documents.

    python tools/cut_documents.py 'books/[!d]*.txt' --output documents.jsonl
    python train.py --config configs/documents_4k.py --data.path documents.jsonl
    python train.py --config configs/documents_4k.py:carried --data.path documents.jsonl

Windows of 4,096 bytes hold three or four documents of 200 to 2,000 bytes, unrelated to each other.
By default each is read from an empty state and attention stays within it; in `carried`, state and
attention run on from one to the next, as in the original trainer. All else is the same: windows,
their order, initial values, 2.9 M tokens. The model is that of `twins_4k`. Results are in
results/README.md.
"""

import dataclasses

from rwkvx_jax.config import Config, Stage
from rwkvx_jax.experiment_files import load_config

VARIANTS = ("carried",)


def get_config(variant: str = "") -> Config:
    config = load_config("twins_4k")
    (text,) = (source for source in config.data.sources if source.kind == "text")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            sources=(dataclasses.replace(text, kind="jsonl", samples="window"),),
            reset_at_documents=variant != "carried",
        ),
        stages=(
            Stage("rwkv7", 4096, 1, 300, 2e-3, expanded=False, warmup_steps=50),
            Stage("preheat", 4096, 1, 50, 2e-3, trainable="attention", warmup_steps=20),
            Stage("grow", 4096, 1, 360, 2e-3, schedule="linear", final_lr=2e-4, warmup_steps=20),
        ),
    )

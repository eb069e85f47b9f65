"""RWKV-7 at L12 D768 from scratch on MiniPile: the public loss curve of RWKV-LM.

    python train.py --config configs/minipile_l12d768.py --data.path DIR/minipile

`minipile.bin` and `minipile.idx` are MiniPile in World tokens in the RWKV/Megatron format
(1,498,226,207 tokens), as RWKV-LM offers it for download.

The recipe is RWKV-LM's `train_temp`: 8192 tokens a step, 6e-4 falling to 6e-5 as a cosine over one
pass of the data, 10 warm-up steps, AdamW (0.9, 0.99, 1e-18), decay 0.001 on the weight matrices
alone, w0 at twice the rate, its order of samples (the magic prime 2926181) and its initial values.

Expected result, from RWKV-LM's README and log (not a run of ours): the mean training loss of each
mini-epoch of 40320 samples, which is 2520 steps, within 0.01:

    mini-epoch   0       1       2       3       4       5
    loss         4.8759  4.0286  3.8016  3.6631  3.5790  3.5109
    mini-epoch   6       7       8       9       10      11
    loss         3.4623  3.4122  3.3767  3.3369  3.3134  3.2959

The log stops there, of about 72.6. It is a few days older than the present initial values of
RWKV-LM, which are used here; it may come from the older ones (model.init="rwkvx").

Every step is a line of metrics.jsonl, so that the table's means can be taken exactly.
"""

import dataclasses

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
    model = dataclasses.replace(ModelConfig.rwkvx_0b2().without_attention(), init="rwkv_lm")
    return Config(
        model=model,
        data=DataConfig(
            tokenizer="world",
            path="data/minipile",
            sources=(SourceConfig("binidx"),),
            held_out=0.0,  # the original trains on every window
            order="rwkv_lm",
            reset_at_documents=False,  # as in the original: windows run on through documents
        ),
        optimizer=OptimizerConfig(policy="rwkv_lm", weight_decay=0.001),
        run=RunConfig(log_every=1, eval_batches=0, checkpoint_every=2520),
        stages=(
            Stage(
                "minipile",
                seq_len=512,
                global_batch=16,
                steps=182_889,
                peak_lr=6e-4,
                final_lr=6e-5,
                schedule="cosine",
                warmup_steps=10,
                expanded=False,
            ),
        ),
    )

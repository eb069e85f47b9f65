"""Chat fine-tuning of a pretrained RWKV-7: only what the assistant says counts in the loss.

    python train.py --config configs/sft_chat.py --data.path chats.jsonl \\
        --init-from RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth

Every line of `chats.jsonl` is a conversation (docs/data.md). Each conversation is a sample of its
own, cut at 1024 tokens, and all conversations of a batch weigh alike. All parameters train for 300
steps of 32 conversations. The model is RWKV-7 World 0.1B. For another checkpoint set the fields of
`--model` (of a hybrid also `--model.num-attention-blocks`): training refuses other shapes and
lists the differences.

Variants train less, at a higher rate:

    lora     adapters of rank 16 beside the matrices of all blocks (2.7 M parameters); every reader
             of the run adds them to the matrices
    state    the initial states of the 12 RWKV-7 blocks (0.6 M parameters)

The tuned model, as an official file and in a conversation:

    python train.py --config configs/sft_chat.py:lora --data.path chats.jsonl \\
        --init-from RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth --workdir runs/chat
    python -m rwkvx_jax.convert runs/chat chat.pth
    python -m rwkvx_jax.generate --checkpoint runs/chat --chat

Expected: at step 1 the loss on the answers is that of the pretrained model, in every variant; the
held-out loss falls from there. The tests run all variants on a tiny model, where the held-out
loss falls within 6 steps. No variant has run at this size.
"""

import dataclasses

from rwkvx_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    Stage,
)

VARIANTS = ("lora", "state")


def get_config(variant: str = "") -> Config:
    model = ModelConfig.rwkvx_0b2().without_attention()
    stage = Stage(
        "chat",
        seq_len=1024,
        global_batch=32,
        steps=300,
        peak_lr=1e-5,
        schedule="cosine",
        final_lr=1e-6,
        warmup_steps=10,
        loss_average="sample",
        accumulation=4,
    )
    match variant:
        case "lora":
            stage = dataclasses.replace(
                stage, trainable="lora", lora=LoRAConfig(), peak_lr=2e-4, final_lr=2e-5
            )
        case "state":
            model = dataclasses.replace(model, learned_state=True)
            stage = dataclasses.replace(stage, trainable="state", peak_lr=1e-1, final_lr=1e-3)
    return Config(
        model=model,
        data=DataConfig(
            tokenizer="world",
            path="data/chats.jsonl",
            sources=(SourceConfig("jsonl", samples="document"),),
        ),
        optimizer=OptimizerConfig(weight_decay=0.0),
        run=RunConfig(checkpoint_every=50, eval_every=50),
        stages=(stage,),
    )

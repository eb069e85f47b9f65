"""RWKV-X 0.22B, stage 1: the new attention blocks learn while the RWKV-7 stays frozen.

    python train.py --config configs/rwkvx_0b2_stage1.py --data.path DIR/minipile \\
        --init-from RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth

12 RWKV-7 blocks of the World 0.1B model gain 4 attention blocks of 2048-token chunks, top-k 3;
1.5 B tokens of MiniPile in World tokens.

The paper gives no numbers for this stage of this model but the data and the tokens, so the rest is
the script of the RWKV-X repository (`training-run_minipile.sh`): samples of 512 tokens, 16 a step,
learning rate 1e-5 throughout after 10 warm-up steps, AdamW (0.9, 0.99, 1e-18), decay 0.001,
clipping at 1, plain cross-entropy, samples in the magic-prime order.

Where the sources contradict each other:
- context: 1024 in section 3 of the paper, 4096 in its appendix (for 3.6B), 512 in the repository.
- decay and warm-up: 0 and 0 in the paper (for the other stages), 0.001 and 10 in the repository.
- start of the new blocks: the paper says zero-initialised (taken here: the hybrid begins as exactly
  the RWKV-7), the repository copies the projections of the preceding block
  (`--model.attention-init copy`). Which one made the released weights is not stated.

512 tokens fit into one chunk: in this stage attention is in fact full.
"""

from rwkvx_jax.config import Config, DataConfig, ModelConfig, RunConfig, SourceConfig, Stage


def get_config() -> Config:
    return Config(
        model=ModelConfig.rwkvx_0b2(),
        data=DataConfig(
            tokenizer="world",
            path="data/minipile",
            sources=(SourceConfig("binidx"),),
            held_out=0.0,  # as in the original: every window is trained on
            order="rwkvx",
            reset_at_documents=False,  # as in the original: windows run on through documents
        ),
        run=RunConfig(eval_batches=0, checkpoint_every=2000),
        stages=(
            Stage(
                "align",
                seq_len=512,
                global_batch=16,
                steps=182_889,  # 1,498,226,207 tokens
                peak_lr=1e-5,
                warmup_steps=10,
                trainable="attention",
            ),
        ),
    )

"""An official RWKV-7 becomes a hybrid for long text, on text of your own.

    python train.py --config configs/expand_pretrained.py --data.path 'books/*.txt' \\
        --init-from RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth

RWKV-7 World 0.1B gains 4 attention blocks of 2048-token chunks, top-k 3 (0.22 B parameters). First
only those train, on short samples; then everything trains on growing lengths, the last with LongCE.
Each stage takes 16.4 M tokens:

    preheat       512 tokens; only the attention blocks train, at a rate of 1e-4
    grow-4096     4,096 tokens, 2 chunks: every query reads all of them
    grow-16384    16,384 tokens: every query reads 3 of up to 8 chunks
    long-32768    32,768 tokens with LongCE, windows of 4,000 + 4,000 tokens

The order of the stages, LongCE's windows and the rate of 1e-5 are the paper's. Lengths and numbers
of tokens are smaller, for a corpus of your own; the paper's are in `rwkvx_0b2_stage1.py` and
`rwkvx_0b2_stage2.py`. For another size set `--model.num-blocks`, `--model.width` and
`--model.num-attention-blocks`: a checkpoint of another shape is refused with all differences.

Expected: at step 1 the hybrid equals the RWKV-7, and the held-out loss falls from there; `python
eval.py long-loss` then shows the loss by position. The tests run all stages on a made-up RWKV-7,
with lengths divided by 64 and 2 steps a stage. The recipe has not run at this size.
"""

from rwkvx_jax.config import (
    Config,
    DataConfig,
    LongCEConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    Stage,
)


def get_config() -> Config:
    rate = 1e-5
    return Config(
        model=ModelConfig.rwkvx_0b2(),
        data=DataConfig(tokenizer="world", path="data/books", sources=(SourceConfig("text"),)),
        optimizer=OptimizerConfig(weight_decay=0.0),
        run=RunConfig(checkpoint_every=50, eval_every=100),
        stages=(
            Stage("preheat", 512, 32, 1000, 1e-4, trainable="attention", warmup_steps=10),
            Stage("grow-4096", 4096, 8, 500, rate, warmup_steps=10),
            Stage("grow-16384", 16_384, 4, 250, rate, accumulation=4),
            Stage(
                "long-32768",
                32_768,
                4,
                125,
                rate,
                loss="longce",
                longce=LongCEConfig(window=4000, stride=4000),
                accumulation=4,
            ),
        ),
    )

"""What the hybrid buys: 0.66 M parameters that learn to look things up in up to 65,536 bytes.

    python train.py --config configs/recall_64k.py --data.path 'books/[!d]*.txt'

A plain RWKV-7 reads books; it is expanded with an attention block after each of its two blocks,
which are preheated while the rest is frozen; then everything trains on lengths that grow from 256
to 65,536, LongCE at the end, on books mixed with documents that hide numbers in filler or in books.
One query of the sparse attention reads 2,048 of those bytes (chunk_size x top_k). Results are in
results/README.md; dracula.txt is held out there.

Variants, such as `--config configs/recall_64k.py:rwkv7`:

    rwkv7    the plain RWKV-7 as a baseline: four blocks, their channel mix narrower so that the
             number of parameters differs by 0.2 %, on the same tokens in the same order. There is
             nothing to expand or preheat: every stage trains all parameters
    full     the full-attention hybrid: the same parameters, every query reads everything. Up to
             16,384 bytes only, as its time per byte grows with the length
    small    the same in small, for ablations: 3.3 M tokens, lengths up to 4,096, LongCE at the end.
             Change one thing on the command line, such as `--model.top-k 4`
    small-index  `small` with chunks of 128 bytes instead of 32, of which a query reads 16, chosen
             by learned vectors (docs/selectors.md). They are taught from 1,024 bytes on: at 256,
             every chunk is read
"""

import dataclasses

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

VARIANTS = ("rwkv7", "full", "small", "small-index")


def hybrid() -> Config:
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
        # Windows run on through documents, a book each: so the published results were measured.
        data=DataConfig(tokenizer="byte", sources=sources, reset_at_documents=False),
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


# Steps of the stages that `small` keeps.
SMALL_STEPS = {"rwkv7": 150, "preheat": 50, "grow-256": 700, "grow-1024": 200, "grow-4096": 80}


def small_stages(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    *first, last = [
        dataclasses.replace(stage, steps=SMALL_STEPS[stage.name])
        for stage in stages
        if stage.name in SMALL_STEPS
    ]
    last = dataclasses.replace(
        last,
        schedule="linear",
        final_lr=1e-4,
        loss="longce",
        longce=LongCEConfig(window=1024, stride=1024),
    )
    return (*first, last)


# Factors of the loss that teaches which chunks to choose.
SELECTION_LOSS = {"preheat": 1.0, "grow-1024": 0.1, "grow-4096": 0.1}


def small_index(config: Config) -> Config:
    stages = {stage.name: stage for stage in small_stages(config.stages)}
    longer = {name: getattr(stages["grow-1024"], name) for name in ("seq_len", "source_weights")}
    stages["preheat"] = dataclasses.replace(stages["preheat"], global_batch=2, **longer)
    for name, factor in SELECTION_LOSS.items():
        stages[name] = dataclasses.replace(stages[name], selection_loss=factor)
    model = dataclasses.replace(config.model, chunk_size=128, top_k=16, selector="index")
    return dataclasses.replace(config, model=model, stages=tuple(stages.values()))


def get_config(variant: str = "") -> Config:
    config = hybrid()
    match variant:
        case "rwkv7":
            return dataclasses.replace(
                config,
                model=dataclasses.replace(
                    config.model, num_blocks=4, num_attention_blocks=0, ffn_width=190, key_conv=0
                ),
                stages=tuple(dataclasses.replace(s, trainable="all") for s in config.stages),
            )
        case "full":
            return dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, attention="full"),
                stages=tuple(s for s in config.stages if s.seq_len <= 16_384),
            )
        case "small":
            return dataclasses.replace(config, stages=small_stages(config.stages))
        case "small-index":
            return small_index(config)
    return config

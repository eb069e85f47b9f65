"""A whole experiment: optimizer and stages beside data, model, implementation and machine."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

from rwkvx_jax.config.data import DataConfig, check_mixture
from rwkvx_jax.config.model import ModelConfig
from rwkvx_jax.config.run import MeshConfig, RunConfig
from rwkvx_jax.config.values import FLOAT32_RANGE, Checked, require, require_positive

Matrix = Literal[
    "time_mix.receptance",
    "time_mix.key",
    "time_mix.value",
    "time_mix.output",
    "channel_mix.gate",
    "channel_mix.key",
    "channel_mix.value",
    "attention.receptance",
    "attention.key",
    "attention.value",
    "attention.output",
]
ADAPTERS = "lora"
"""First part of the names of adapters among the parameters of a stage."""
INITIAL_STATE = "blocks.time_mix.initial_state"
"""Name of the learned initial states among the parameters of a model."""

# Steps are counted in int32.
_MOST_STEPS = 2**31 - 1


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW; the learning rate and its schedule belong to each stage."""

    policy: Literal["rwkvx", "rwkv_lm"] = "rwkvx"
    """Which parameters decay and which learn faster; see training/optimizer.py."""
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-18
    """Added to the root of the second moment: above 0 in float32, as that root may be 0."""
    weight_decay: float = 0.001
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}: it must lie in [0, 1)")
        require(
            self.eps >= FLOAT32_RANGE[0],
            f"optimizer.eps is {self.eps}: an update would divide 0 by 0; use at least 1.2e-38, "
            "the smallest normal float32",
        )
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} is {value}: it must not be negative")


@dataclass(frozen=True)
class LongCEConfig(Checked):
    """Windows of the LongCE weights: context lengths in tokens."""

    window: int = 4000
    """Tokens of short context before the first weighted position of a window; also where the first
    window starts, so that the first 2 x window predictions weigh 1."""
    stride: int = 4000
    """Weighted tokens of a window; windows start this far apart."""
    cap: float = 10.0
    """Largest weight."""
    at_once: int = 1
    """Windows of a sequence that run at once, on each of the devices that share it. More take more
    memory, and collect parameters that are sharded over `fsdp` less often."""

    def __post_init__(self):
        super().__post_init__()
        require_positive("longce", window=self.window, stride=self.stride, at_once=self.at_once)
        require(self.cap > 0, f"longce.cap is {self.cap}: it must be positive")


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Low-rank adapters: each target matrix W becomes W + alpha / rank A B; A and B train."""

    rank: int = 16
    alpha: float = 32.0
    """The product of A and B counts alpha / rank times."""
    targets: tuple[Matrix, ...] = (
        "time_mix.receptance",
        "time_mix.key",
        "time_mix.value",
        "time_mix.output",
        "channel_mix.key",
        "channel_mix.value",
    )
    """Matrices, in every block that has them: "channel_mix" is in both kinds of blocks, "time_mix"
    in recurrent blocks, "attention" in attention blocks; "channel_mix.gate" is of the backbone
    "llama"."""

    def __post_init__(self):
        super().__post_init__()
        require_positive("lora", rank=self.rank)
        require(self.alpha > 0, f"lora.alpha is {self.alpha}: it must be positive")
        require(len(self.targets) > 0, "lora.targets is empty: name at least one matrix")
        repeated = sorted({name for name in self.targets if self.targets.count(name) > 1})
        require(not repeated, f"lora.targets names {repeated} twice: name each matrix once")

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied with."""
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the parameter of this dotted name is a target."""
        return name.partition(".")[2] in self.targets


@dataclass(frozen=True)
class Stage(Checked):
    """One stage of the curriculum: a length, a batch, a rate, and what trains."""

    name: str
    seq_len: int
    """Tokens per sample."""
    global_batch: int
    """Samples per step over all hosts."""
    steps: int
    peak_lr: float
    trainable: Literal["attention", "indexer", "all", "lora", "state"] = "all"
    """"attention": only the attention blocks train (the preheat stage); "indexer": of these only
    what `selection_loss` trains; "lora": only low-rank adapters beside frozen matrices; "state":
    only the initial states of `model.learned_state`."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters of a stage with trainable="lora"."""
    expanded: bool = True
    """False: the stage trains the plain RWKV-7 that the first expanded stage expands."""
    loss: Literal["ce", "longce"] = "ce"
    longce: LongCEConfig = field(default_factory=LongCEConfig)
    loss_average: Literal["token", "sample"] = "token"
    """Mean over all valid tokens, or of the samples' own means (packed: of the documents')."""
    l2wrap: float = 0.5e-4
    """Factor of max_logit^2 per token in the loss; 0 turns it off."""
    selection_loss: float = 0.0
    """Factor of the loss that teaches a learned selector which chunks full attention looks at:
    the mean over queries, choices and blocks of the divergence of its scores from the mass of each
    past chunk. Its gradient reaches the indexers alone. It costs the scores of full attention;
    0 turns it off."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate from the end of the warm-up on."""
    final_lr: float = 0.0
    """Rate at the end of a cosine or linear schedule."""
    warmup_steps: int = 0
    """Steps in which the rate climbs from 1 % of its peak."""
    accumulation: int = 1
    """Equal parts into which each batch is cut to save memory."""
    source_weights: tuple[float, ...] = ()
    """Weights of `data.sources` in this stage; empty: their own."""

    def __post_init__(self):
        super().__post_init__()
        owner = f"stage {self.name!r}"
        require(bool(self.name), "a stage has an empty name")
        require_positive(
            owner,
            seq_len=self.seq_len,
            global_batch=self.global_batch,
            steps=self.steps,
            accumulation=self.accumulation,
        )
        require(
            self.steps <= _MOST_STEPS, f"{owner}: steps is {self.steps}: at most {_MOST_STEPS} fit"
        )
        require(self.peak_lr > 0, f"{owner}: peak_lr is {self.peak_lr}: it must be positive")
        for name in ("final_lr", "l2wrap", "selection_loss"):
            value = getattr(self, name)
            require(value >= 0, f"{owner}: {name} is {value}: it must not be negative")
        require(
            0 <= self.warmup_steps <= self.steps,
            f"{owner}: warmup_steps {self.warmup_steps} does not fit into its {self.steps} steps",
        )
        require(
            self.global_batch % self.accumulation == 0,
            f"{owner}: accumulation {self.accumulation} does not divide global_batch "
            f"{self.global_batch}",
        )
        require(
            self.expanded or self.trainable not in ("attention", "indexer"),
            f"{owner}: trainable={self.trainable!r} needs expanded=True (it has no attention "
            "blocks)",
        )
        require(
            self.selection_loss > 0 or self.trainable != "indexer",
            f'{owner}: trainable="indexer", but nothing teaches it; set selection_loss',
        )
        require(
            self.selection_loss == 0
            or (self.expanded and self.trainable in ("attention", "indexer", "all")),
            f"{owner}: selection_loss {self.selection_loss} trains indexers, which "
            f"trainable={self.trainable!r} with expanded={self.expanded} does not: set it to 0",
        )
        if self.loss == "longce":
            require(
                2 * self.longce.window < self.seq_len,
                f"{owner}: longce.window {self.longce.window} leaves no weighted position in "
                f"{self.seq_len} tokens; twice the window must be below seq_len",
            )

    @property
    def tokens(self) -> int:
        return self.seq_len * self.global_batch * self.steps

    @property
    def trained_part(self) -> str:
        """`trainable` for people."""
        return f"lora (rank {self.lora.rank})" if self.trainable == "lora" else self.trainable

    def trains(self, name: str) -> bool:
        """Whether the parameter of this dotted name trains."""
        match self.trainable:
            case "attention":
                return name.startswith("attention_blocks.")
            case "indexer":
                return ".indexer." in name
            case "lora":
                return name.startswith(f"{ADAPTERS}.")
            case "state":
                return name == INITIAL_STATE
        return True


@dataclass(frozen=True)
class Config(Checked):
    """A whole experiment."""

    model: ModelConfig
    stages: tuple[Stage, ...]
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        super().__post_init__()
        require(len(self.stages) > 0, "stages is empty: name at least one stage")
        require(
            self.model.mixer != "rwkv4" or self.mesh.context == 1,
            f'model.mixer "rwkv4" has no context parallelism, but mesh.context is '
            f"{self.mesh.context}: set it to 1",
        )
        require(
            not (self.model.learned_state and self.data.segmented),
            "model.learned_state: of several documents in a sample each would begin with zeros, "
            'not with the learned state; use samples="document", or data.reset_at_documents=False',
        )
        names = [stage.name for stage in self.stages]
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, f"stage names {repeated} occur twice: give each stage its own")
        expanded = [stage.expanded for stage in self.stages]
        require(
            expanded == sorted(expanded),
            "a stage with expanded=False follows an expanded one: blocks are never removed again",
        )
        for stage in self.stages:
            require(
                self.model.num_blocks > 0 or stage.expanded,
                f"stage {stage.name!r}: expanded=False trains the model without its attention "
                "blocks, but a Transformer (model.num_blocks = 0) has no others; set expanded=True",
            )
            require(
                self.model.num_attention_blocks > 0 or stage.trainable != "attention",
                f'stage {stage.name!r}: trainable="attention", but the model has no attention '
                "blocks; set model.num_attention_blocks",
            )
            require(
                self.model.learned_state or stage.trainable != "state",
                f'stage {stage.name!r}: trainable="state", but the model starts from zeros; set '
                "model.learned_state",
            )
            align = self.data.align_documents
            require(
                stage.seq_len % align == 0,
                f"stage {stage.name!r}: data.align_documents {align} does not divide its seq_len "
                f"{stage.seq_len}: use a divisor, or change the length",
            )
            if stage.trainable == "lora":
                self._check_adapters(stage)
            if stage.selection_loss:
                self._check_selection_loss(stage)
            weights, sources = stage.source_weights, self.data.sources
            require(
                len(weights) in (0, len(sources)),
                f"stage {stage.name!r}: {len(weights)} source_weights for {len(sources)} sources",
            )
            require(
                not weights or (min(weights) >= 0 and sum(weights) > 0),
                f"stage {stage.name!r}: source_weights {weights} must be >= 0 with a positive sum",
            )
            check_mixture(f"stage {stage.name!r}: source_weights", weights)

    def _check_adapters(self, stage: Stage) -> None:
        """Raises ConfigError for adapters that the model of a stage has no matrices for."""
        model, owner = self.stage_model(stage), f"stage {stage.name!r}: lora"
        for part, there, what in (
            ("attention.", model.num_attention_blocks > 0, "no attention blocks"),
            ("time_mix.", model.num_blocks > 0, "no recurrent blocks"),
            ("channel_mix.gate", model.backbone == "llama", "RWKV's channel mix, without a gate"),
        ):
            absent = [name for name in stage.lora.targets if name.startswith(part)]
            require(
                there or not absent,
                f"{owner}.targets names {absent}: the model has {what}; leave them out",
            )
        require(
            stage.lora.rank < model.width,
            f"{owner}.rank {stage.lora.rank} is not below model.width {model.width}: such adapters "
            'are no smaller than the matrices; lower it, or use trainable="all"',
        )

    def _check_selection_loss(self, stage: Stage) -> None:
        """Raises ConfigError where there is nothing to learn from the loss of a selector."""
        owner, chunk = f"stage {stage.name!r}: selection_loss", self.model.chunk_size
        require(
            self.model.learned_selector and self.model.num_attention_blocks > 0,
            f'{owner} trains the selector "index" or "seer" of attention blocks, but '
            f"model.selector is {self.model.selector!r} and model.num_attention_blocks "
            f"{self.model.num_attention_blocks}: set it to 0, or change these",
        )
        require(
            stage.seq_len > 2 * chunk,
            f"{owner} needs a choice of past chunks: seq_len {stage.seq_len} must be above twice "
            f"model.chunk_size {chunk}; set it to 0 in this stage, or lengthen it",
        )
        require(
            self.mesh.context == 1,
            f"{owner} needs whole sequences, but mesh.context is {self.mesh.context}: set it to 1, "
            "or train the selector in a stage of shorter sequences before",
        )

    def stage_model(self, stage: Stage) -> ModelConfig:
        """The model that a stage trains."""
        return self.model if stage.expanded else self.model.without_attention()

    def trained_length(self, step: int) -> int | None:
        """Longest sequence of the stages that have begun after `step` steps of the whole run."""
        ends = itertools.accumulate((stage.steps for stage in self.stages), initial=0)
        begun = [stage.seq_len for stage, end in zip(self.stages, ends, strict=False) if end < step]
        return max(begun, default=None)

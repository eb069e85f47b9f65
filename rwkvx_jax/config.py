"""Configuration: frozen dataclasses, presets, validation and their JSON form.

Mathematics (`ModelConfig`), implementation (`RunConfig`) and machine (`MeshConfig`) are separate:
a checkpoint's meaning depends on the first alone. `Config` adds data, optimizer and the list of
training stages. Everything here is plain Python; no jax arrays, no imports from other rooms.
Invalid values raise `ConfigError`, which names the value and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

LowRankRule = Literal["rwkvx", "rwkv_lm"]


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the value and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(owner: str, **values: int | float) -> None:
    for name, value in values.items():
        _require(value >= 1, f"{owner}.{name} is {value}: it must be at least 1")


class _Checked:
    """Base of the dataclasses here: refuses values that are not of a field's declared type."""

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            if problem := _mismatch(hint, value := getattr(self, name)):
                raise ConfigError(f"{type(self).__name__}.{name} is {value!r}: {problem}")


def _mismatch(hint: Any, value: Any) -> str:
    """Why a value is not of a declared type, as a remedy; "" if it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "" if value in arguments else f"choose one of {list(arguments)}"
    if origin in (typing.Union, types.UnionType):
        problems = [_mismatch(argument, value) for argument in arguments]
        return "" if "" in problems else problems[0]
    if origin is tuple:
        if not isinstance(value, tuple):
            return "write a tuple"
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            return f"write {len(arguments)} values"
        pairs = zip(arguments, value, strict=True)
        return next(filter(None, (_mismatch(a, v) for a, v in pairs)), "")
    kinds = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
    if isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)):
        return ""
    return f"expected {getattr(hint, '__name__', hint)}"


class LowRankWidths(NamedTuple):
    """Widths R of the four low-rank pairs of a time mix."""

    w: int  # decay
    a: int  # in-context learning rate
    v: int  # value residual
    g: int  # output gate


# (factor, exponent) of R = max(32, round(factor * D**exponent / 32) * 32), per pair (w, a, v, g).
# "rwkvx": the RWKV-X repository and RWKV-LM before July 2025; "rwkv_lm": RWKV-LM since then.
_LOW_RANK_RULES = {
    "rwkvx": ((1.8, 0.5), (1.8, 0.5), (1.3, 0.5), (0.6, 0.8)),
    "rwkv_lm": ((2.5, 0.5), (2.5, 0.5), (1.7, 0.5), (5.0, 0.5)),
}


def low_rank_widths(width: int, rule: LowRankRule) -> LowRankWidths:
    """The low-rank widths that a rule gives at model width D."""
    return LowRankWidths(
        *(max(32, int(round(c * width**p / 32) * 32)) for c, p in _LOW_RANK_RULES[rule])
    )


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The mathematics of a model; with the parameters it determines every logit."""

    vocab_size: int = 65536
    """W: rows of the embedding and columns of the head."""
    num_blocks: int = 12
    """L: RWKV-7 blocks."""
    num_attention_blocks: int = 4
    """M: attention blocks, one after every L / M RWKV-7 blocks; 0 is plain RWKV-7."""
    width: int = 768
    """D: residual stream."""
    head_size: int = 64
    """K = V: channels of one head, in both block kinds."""
    ffn_width: int = 0
    """F: hidden width of the channel mix; 0 means 4 D."""
    attention: Literal["sparse", "full"] = "sparse"
    """Kind of the attention blocks; "full" is the full-attention hybrid (a baseline)."""
    chunk_size: int = 2048
    """Tokens of one chunk of the sparse attention."""
    top_k: int = 3
    """Chunks a query reads: its own and the top_k - 1 best past ones."""
    low_rank: LowRankRule = "rwkvx"
    """Formula of the low-rank widths."""
    low_rank_override: tuple[int, int, int, int] | None = None
    """Explicit low-rank widths (w, a, v, g) of a checkpoint that follows neither formula."""
    init: Literal["rwkvx", "rwkv_lm"] = "rwkv_lm"
    """Initialisation family: "rwkvx" (the older constants) or "rwkv_lm" (since May 2025)."""
    attention_init: Literal["zero", "copy"] = "zero"
    """New attention blocks at expansion: zero output projections (the paper) or copies of the
    preceding RWKV-7 block's projections (the repository)."""
    init_seed: int = 0
    """Seed of every random initial value."""

    def __post_init__(self):
        super().__post_init__()
        _positive(
            "model",
            vocab_size=self.vocab_size,
            num_blocks=self.num_blocks,
            width=self.width,
            head_size=self.head_size,
            chunk_size=self.chunk_size,
            top_k=self.top_k,
        )
        _require(
            self.num_attention_blocks >= 0,
            f"model.num_attention_blocks is {self.num_attention_blocks}: use 0 for plain RWKV-7",
        )
        _require(self.ffn_width >= 0, f"model.ffn_width is {self.ffn_width}: use 0 for 4 x width")
        _require(
            self.width % self.head_size == 0,
            f"model.width {self.width} is not divisible by model.head_size {self.head_size}",
        )
        _positive("model.low_rank_override", **self.ranks._asdict())
        blocks, attention = self.num_blocks, self.num_attention_blocks
        if attention:
            divisors = [m for m in range(1, blocks + 1) if blocks % m == 0]
            _require(
                blocks % attention == 0,
                f"model.num_attention_blocks {attention} does not divide model.num_blocks "
                f"{blocks}: trailing RWKV-7 blocks would have no place; choose one of {divisors}",
            )

    @property
    def num_heads(self) -> int:
        return self.width // self.head_size

    @property
    def hidden_width(self) -> int:
        return self.ffn_width or 4 * self.width

    @property
    def ranks(self) -> LowRankWidths:
        if self.low_rank_override is not None:
            return LowRankWidths(*self.low_rank_override)
        return low_rank_widths(self.width, self.low_rank)

    @property
    def blocks_per_group(self) -> int:
        """RWKV-7 blocks before each attention block (all of them if there is none)."""
        return self.num_blocks // max(1, self.num_attention_blocks)

    def without_attention(self) -> ModelConfig:
        """The plain RWKV-7 which block expansion turns into this model."""
        return dataclasses.replace(self, num_attention_blocks=0)

    @classmethod
    def rwkvx_0b2(cls) -> ModelConfig:
        """RWKV-X 0.22B: RWKV-7 World 0.1B with 4 attention blocks."""
        return cls(num_blocks=12, num_attention_blocks=4, width=768)

    @classmethod
    def rwkvx_3b6(cls) -> ModelConfig:
        """RWKV-X 3.6B: RWKV-7 World 2.9B with 8 attention blocks."""
        return cls(num_blocks=32, num_attention_blocks=8, width=2560)

    @classmethod
    def tiny(cls) -> ModelConfig:
        """A model of about 0.8 M parameters over bytes, trained in minutes on a CPU."""
        return cls(
            vocab_size=257,
            num_blocks=2,
            num_attention_blocks=1,
            width=128,
            head_size=64,
            chunk_size=256,
            top_k=4,
        )


@dataclass(frozen=True)
class RunConfig(_Checked):
    """How to compute and what to report; nothing here changes what is learned but by rounding."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and matrix products; parameters and states stay float32."""
    remat: Literal["none", "block"] = "block"
    """"block": recompute each block in the backward pass instead of saving its activations."""
    recurrence: str | None = None
    """Implementation of the recurrence; None lets the op choose."""
    sparse_attention: str | None = None
    """Implementation of sparse attention; None lets the op choose."""
    loss_block: int = 4096
    """Tokens whose logits exist at once while the loss is computed."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between held-out losses; 0: at the end of each stage only."""
    eval_batches: int = 4
    """Batches of one held-out loss; 0 turns it off."""
    probe_trials: int = 0
    """Passkey prompts of the probe beside each held-out loss; 0 turns it off."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the end of a stage always makes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the last one of each stage is kept besides."""
    data_workers: int = 0
    """Processes that prepare batches; 0 prepares them in threads of this process."""
    bad_step: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite, or whose gradient is a spike: stop, or skip its
    update and count it."""
    spike_factor: float = 0.0
    """A gradient norm above this multiple of its running mean is a spike; 0 turns that off."""
    max_skipped: int = 10
    """Skipped steps in a row after which "skip" stops as well."""
    profile_steps: str = ""
    """"10:13" writes a trace of steps 10 to 12 for TensorBoard."""
    compilation_cache: str = ""
    """Directory of compiled programs that later runs use again; empty: none."""

    def __post_init__(self):
        super().__post_init__()
        _positive(
            "run",
            loss_block=self.loss_block,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        for name in (
            "eval_every",
            "eval_batches",
            "probe_trials",
            "data_workers",
            "max_skipped",
            "spike_factor",
        ):
            value = getattr(self, name)
            _require(value >= 0, f"run.{name} is {value}: it must not be negative")
        _require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"run.spike_factor is {self.spike_factor}: ordinary steps would count as spikes; use a "
            "factor such as 10, or 0 for none",
        )
        self.profile_range()

    def profile_range(self) -> tuple[int, int] | None:
        """First step of the trace and the step after its last, or None."""
        if not self.profile_steps:
            return None
        first, colon, last = self.profile_steps.partition(":")
        valid = bool(colon) and first.isdecimal() and last.isdecimal() and int(first) < int(last)
        _require(valid, f'run.profile_steps is "{self.profile_steps}": write FIRST:LAST, as 10:13')
        return int(first), int(last)


@dataclass(frozen=True)
class MeshConfig(_Checked):
    """Devices along each mesh axis; one of them may be -1: whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    platform: Literal["any", "cpu", "gpu", "tpu"] = "any"
    """Kind of device that must be there; "any" takes what JAX finds."""

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "context")}

    def __post_init__(self):
        super().__post_init__()
        sizes = self.sizes
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name} is {size}: use -1 or at least 1")
        fill = [name for name, size in sizes.items() if size == -1]
        _require(len(fill) <= 1, f"mesh axes {fill} are all -1: only one can be filled in")


@dataclass(frozen=True)
class SourceConfig(_Checked):
    """One ingredient of the training mixture."""

    kind: Literal["text", "jsonl", "binidx", "passkey"] = "text"
    """"text": text files; "jsonl": a document or conversation a line; "binidx": token ids in the
    RWKV/Megatron format; "passkey": synthetic documents made on the fly. See docs/data.md."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources."""
    path: str = ""
    """File, directory or glob; empty: `data.path`, and if that is empty the embedded corpus."""
    samples: Literal["window", "document"] = "window"
    """"window": windows of the stream of all documents; "document": each document by itself, cut
    or padded to the length (for conversations)."""

    def __post_init__(self):
        super().__post_init__()
        _require(
            math.isfinite(self.weight) and self.weight > 0,
            f"data source weight is {self.weight}: it must be positive",
        )


@dataclass(frozen=True)
class DataConfig(_Checked):
    """What is read, in which order."""

    tokenizer: Literal["byte", "world"] = "byte"
    vocab_file: str = ""
    """Vocabulary of the World tokenizer; empty: the one of the pyrwkv-tokenizer package."""
    path: str = ""
    """Default path of sources that read files; empty: the embedded corpus."""
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    held_out: float = 0.02
    """Share of each source's tokens, at its end, kept for the held-out loss."""
    seed: int = 0
    """Seed of the order and of synthetic documents."""
    order: Literal["shuffle", "rwkvx", "rwkv_lm"] = "shuffle"
    """"shuffle": another random order in each epoch; "rwkvx", "rwkv_lm": the magic-prime orders
    of the original trainers (with held_out=0 over exactly the same windows)."""
    cache_dir: str = ""
    """Where tokenized text is cached; empty: `data-cache` in the work directory."""
    cache_per_host: bool = False
    """Each host writes a cache of its own: for hosts that share no disk."""

    def __post_init__(self):
        super().__post_init__()
        _require(len(self.sources) > 0, "data.sources is empty: name at least one source")
        _require(
            0 <= self.held_out < 1, f"data.held_out is {self.held_out}: use a share such as 0.02"
        )
        _require(self.seed >= 0, f"data.seed is {self.seed}: it must not be negative")
        _require(
            self.order == "shuffle" or all(s.samples == "window" for s in self.sources),
            f'data.order "{self.order}" is one of windows: use samples="window" or order="shuffle"',
        )


@dataclass(frozen=True)
class OptimizerConfig(_Checked):
    """AdamW; the learning rate and its schedule belong to each stage."""

    policy: Literal["rwkvx", "rwkv_lm"] = "rwkvx"
    """Which parameters decay and which learn faster; see training/optimizer.py."""
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-18
    weight_decay: float = 0.001
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}: it must lie in [0, 1)")
        for name in ("eps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} is {value}: it must not be negative")


@dataclass(frozen=True)
class LongCEConfig(_Checked):
    """Windows of the LongCE weights: context lengths in tokens."""

    window: int = 4000
    """Tokens of short context before the first weighted position of a window."""
    stride: int = 4000
    """Weighted tokens of a window; windows start this far apart."""
    cap: float = 10.0
    """Largest weight."""

    def __post_init__(self):
        super().__post_init__()
        _positive("longce", window=self.window, stride=self.stride)
        _require(self.cap > 0, f"longce.cap is {self.cap}: it must be positive")


@dataclass(frozen=True)
class Stage(_Checked):
    """One stage of the curriculum: a length, a batch, a rate, and what trains."""

    name: str
    seq_len: int
    """Tokens per sample."""
    global_batch: int
    """Samples per step over all hosts."""
    steps: int
    peak_lr: float
    trainable: Literal["attention", "all"] = "all"
    """"attention": only the attention blocks train (the preheat stage)."""
    expanded: bool = True
    """False: the stage trains the plain RWKV-7 that the first expanded stage expands."""
    loss: Literal["ce", "longce"] = "ce"
    longce: LongCEConfig = field(default_factory=LongCEConfig)
    loss_average: Literal["token", "sample"] = "token"
    """Mean over all valid tokens, or of the samples' own means."""
    l2wrap: float = 0.5e-4
    """Factor of max_logit^2 per token in the loss; 0 turns it off."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after the warm-up."""
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
        _require(bool(self.name), "a stage has an empty name")
        _positive(
            owner,
            seq_len=self.seq_len,
            global_batch=self.global_batch,
            steps=self.steps,
            accumulation=self.accumulation,
        )
        _require(self.peak_lr > 0, f"{owner}: peak_lr is {self.peak_lr}: it must be positive")
        for name in ("final_lr", "l2wrap"):
            value = getattr(self, name)
            _require(value >= 0, f"{owner}: {name} is {value}: it must not be negative")
        _require(
            0 <= self.warmup_steps <= self.steps,
            f"{owner}: warmup_steps {self.warmup_steps} does not fit into its {self.steps} steps",
        )
        _require(
            self.global_batch % self.accumulation == 0,
            f"{owner}: accumulation {self.accumulation} does not divide global_batch "
            f"{self.global_batch}",
        )
        _require(
            self.expanded or self.trainable == "all",
            f'{owner}: trainable="attention" needs expanded=True (it has no attention blocks)',
        )
        if self.loss == "longce":
            _require(
                self.longce.window + self.longce.stride < self.seq_len,
                f"{owner}: longce.window {self.longce.window} + stride {self.longce.stride} leave "
                f"no weighted position in {self.seq_len} tokens; their sum must be below seq_len",
            )

    @property
    def tokens(self) -> int:
        return self.seq_len * self.global_batch * self.steps


@dataclass(frozen=True)
class Config(_Checked):
    """A whole experiment."""

    model: ModelConfig
    stages: tuple[Stage, ...]
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        super().__post_init__()
        _require(len(self.stages) > 0, "stages is empty: name at least one stage")
        names = [stage.name for stage in self.stages]
        repeated = sorted({name for name in names if names.count(name) > 1})
        _require(not repeated, f"stage names {repeated} occur twice: give each stage its own")
        expanded = [stage.expanded for stage in self.stages]
        _require(
            expanded == sorted(expanded),
            "a stage with expanded=False follows an expanded one: blocks are never removed again",
        )
        for stage in self.stages:
            _require(
                self.model.num_attention_blocks > 0 or stage.trainable == "all",
                f'stage {stage.name!r}: trainable="attention", but the model has no attention '
                "blocks; set model.num_attention_blocks",
            )
            weights, sources = stage.source_weights, self.data.sources
            _require(
                len(weights) in (0, len(sources)),
                f"stage {stage.name!r}: {len(weights)} source_weights for {len(sources)} sources",
            )
            _require(
                not weights or (min(weights) >= 0 and sum(weights) > 0),
                f"stage {stage.name!r}: source_weights {weights} must be >= 0 with a positive sum",
            )

    def stage_model(self, stage: Stage) -> ModelConfig:
        """The model that a stage trains."""
        return self.model if stage.expanded else self.model.without_attention()


def to_dict(config: Any) -> dict[str, Any]:
    """JSON form of any dataclass of this module."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: Any, where: str = "config") -> Any:
    """Rebuilds a dataclass of this module from its JSON form.

    Raises:
      ConfigError: an unknown key (with the known ones), or a missing required one.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}: expected an object with named fields")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"{where}: unknown key {unknown}; known are {sorted(hints)}")
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    _require(not missing, f"{where}: missing key {missing}")
    return kind(
        **{name: _from_json(hints[name], v, f"{where}.{name}") for name, v in values.items()}
    )


def _from_json(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _from_json(inner[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_json(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
    return value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines "field: old -> new" for every leaf in which two configs of one kind differ."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        return [
            line
            for f in dataclasses.fields(old)
            for line in differences(
                getattr(old, f.name), getattr(new, f.name), f"{where}.{f.name}".lstrip(".")
            )
        ]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]

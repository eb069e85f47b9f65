"""The mathematics of a model: shapes and hyperparameters that determine every logit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rwkvx_jax.config.mixers import MIXER_TITLES, MixerName, MixerSizes, mixer_sizes
from rwkvx_jax.config.values import Checked, require, require_positive

LowRankRule = Literal["rwkvx", "rwkv_lm"]


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
class ModelConfig(Checked):
    """The mathematics of a model; with the parameters it determines every logit."""

    vocab_size: int = 65536
    """W: rows of the embedding and columns of the head."""
    num_blocks: int = 12
    """L: recurrent blocks, RWKV-7 unless `mixer` says otherwise."""
    num_attention_blocks: int = 4
    """M: attention blocks, one after every L / M RWKV-7 blocks; 0 is plain RWKV-7."""
    width: int = 768
    """D: residual stream."""
    head_size: int = 64
    """K = V: channels of one head, in both block kinds."""
    mixer: MixerName = "rwkv7"
    """How a recurrent block mixes tokens: "rwkv7", or for comparison one of its neighbours; see
    docs/recurrences.md. The channel mix and all else stay as they are."""
    ffn_width: int = 0
    """F: hidden width of the channel mix; 0 means 4 D."""
    attention: Literal["sparse", "full"] = "sparse"
    """Kind of the attention blocks; "full" is the full-attention hybrid (a baseline)."""
    chunk_size: int = 2048
    """Tokens of one chunk of the sparse attention."""
    top_k: int = 3
    """Chunks a query reads: its own and the top_k - 1 best past ones."""
    selector: Literal["mean", "max", "pooled", "bounds"] = "mean"
    """How a query scores a past chunk: by its mean key (the paper), by the best or the pooled mean
    keys of parts of it, or by bounds of its keys; see ops/selection.py."""
    selector_blocks: int = 8
    """Parts of a chunk for the selectors "max" and "pooled"; divides chunk_size."""
    key_conv: int = 0
    """Width of a causal convolution over time on each channel of the attention keys (FlashMoBA,
    arXiv 2511.11571), the identity at first; 0 for none."""
    learned_state: bool = False
    """Each RWKV-7 block reads a text from a learned state [H, V, K] on (zeros before training),
    not from zeros; `Stage.trainable="state"` trains these alone."""
    low_rank: LowRankRule = "rwkvx"
    """Formula of the low-rank widths."""
    low_rank_override: tuple[int, int, int, int] | None = None
    """Explicit low-rank widths (w, a, v, g) of a checkpoint that follows neither formula."""
    init: Literal["rwkvx", "rwkv_lm"] = "rwkv_lm"
    """Initialisation family: "rwkvx" (the older constants) or "rwkv_lm" (since May 2025)."""
    attention_init: Literal["zero", "copy", "aligned"] = "zero"
    """New attention blocks: zero output projections (the paper); at expansion copies of the
    preceding RWKV-7 block's projections (the repository); or "aligned": zero output projections,
    key matrices that equal the query matrices, and (with key_conv of 2 or more) the key of the
    token before added to each key, so that a token finds its own earlier occurrences and what
    followed them before anything is learned."""
    init_seed: int = 0
    """Seed of every random initial value."""

    def __post_init__(self):
        super().__post_init__()
        require_positive(
            "model",
            vocab_size=self.vocab_size,
            num_blocks=self.num_blocks,
            width=self.width,
            head_size=self.head_size,
            chunk_size=self.chunk_size,
            top_k=self.top_k,
        )
        require(
            self.num_attention_blocks >= 0,
            f"model.num_attention_blocks is {self.num_attention_blocks}: use 0 for plain RWKV-7",
        )
        require(self.key_conv >= 0, f"model.key_conv is {self.key_conv}: use 0 for none")
        require(
            self.selector not in ("max", "pooled")
            or (self.selector_blocks >= 1 and self.chunk_size % self.selector_blocks == 0),
            f"model.selector_blocks {self.selector_blocks} does not divide model.chunk_size "
            f"{self.chunk_size}, as the selector {self.selector!r} needs it to",
        )
        require(self.ffn_width >= 0, f"model.ffn_width is {self.ffn_width}: use 0 for 4 x width")
        require(
            self.width % self.head_size == 0,
            f"model.width {self.width} is not divisible by model.head_size {self.head_size}",
        )
        require_positive("model.low_rank_override", **self.ranks._asdict())
        require(
            self.mixer == "rwkv7" or not self.learned_state,
            f"model.learned_state is for the mixer 'rwkv7', not {self.mixer!r}: leave it False",
        )
        require(
            self.mixer != "mamba2" or self.attention_init != "copy",
            'model.attention_init "copy" takes the matrices of the recurrent blocks, which have '
            'other shapes with the mixer "mamba2": use "zero" or "aligned"',
        )
        blocks, attention = self.num_blocks, self.num_attention_blocks
        if attention:
            divisors = [m for m in range(1, min(blocks, 256) + 1) if blocks % m == 0]
            require(
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
    def mixer_sizes(self) -> MixerSizes:
        """Sizes of the mixer of a recurrent block."""
        return mixer_sizes(self.mixer, self.width, self.head_size, self.ranks)

    @property
    def mixer_title(self) -> str:
        """Name of the mixer for people."""
        return MIXER_TITLES[self.mixer]

    @property
    def num_parameters(self) -> int:
        """Numbers in all arrays of the model; costs nothing, whatever its size."""
        width = self.width
        norm, square = 2 * width, width * width
        channel_mix = width + 2 * width * self.hidden_width
        time_mix = self.mixer_sizes.parameters + self.learned_state * width * self.head_size
        attention = 4 * square + self.key_conv * width
        return (
            2 * self.vocab_size * width
            + 2 * norm
            + self.num_blocks * (2 * norm + time_mix + channel_mix)
            + self.num_attention_blocks * (2 * norm + attention + channel_mix)
        )

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

"""The mathematics of a model: shapes and hyperparameters that determine every logit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rwkvx_jax.config.choices import LEARNED, check_choices
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
    """L: recurrent blocks, RWKV-7 unless `mixer` says otherwise; 0 is a Transformer."""
    num_attention_blocks: int = 4
    """M: attention blocks, one after every L / M recurrent blocks; 0 is plain RWKV-7."""
    backbone: Literal["rwkv", "llama"] = "rwkv"
    """What surrounds the mixers of all blocks: "rwkv" (LayerNorm, RWKV-7's channel mix, a norm of
    the embedding) or "llama" (RMSNorm, SwiGLU without token shift, the embedding as it is)."""
    norm_eps: float = 1e-5
    """Added to the variance by the norms of the backbone "llama"; RWKV's have 1e-5."""
    tied_embeddings: bool = False
    """The head is the embedding, transposed, instead of a matrix of its own."""
    width: int = 768
    """D: residual stream."""
    head_size: int = 64
    """K = V: channels of one head, in both block kinds."""
    mixer: MixerName = "rwkv7"
    """How a recurrent block mixes tokens: "rwkv7", or for comparison one of its neighbours; see
    docs/recurrences.md. The channel mix and all else stay as they are."""
    ffn_width: int = 0
    """F: hidden width of the channel mix; 0 means 4 D."""
    attention: Literal["sparse", "full", "nsa"] = "sparse"
    """Kind of the attention blocks; "full" is the full-attention hybrid (a baseline), "nsa" Native
    Sparse Attention (arXiv 2502.11089), see docs/attention.md."""
    num_kv_heads: int = 0
    """G: heads of keys and values, each for H / G heads of queries (arXiv 2305.13245); 0: as many
    as heads of queries."""
    qkv_bias: bool = False
    """The projections to queries, keys and values have biases (Qwen2)."""
    rope_theta: float = 0.0
    """Base of the rotary positions of queries and keys (arXiv 2104.09864), a channel paired with
    the one half a head later; 0 for attention without positions."""
    rope_scaling: tuple[float, float, float, float] | None = None
    """Llama 3.1's change of the rotary frequencies: factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings; None for none. See modules/rotary.py."""
    shared_attention: bool = False
    """All attention blocks are one block, used M times (Zamba, arXiv 2405.16712): one set of
    parameters, but keys and values of each use."""
    chunk_size: int = 2048
    """Tokens of one chunk of the sparse attention."""
    top_k: int = 3
    """Chunks a query reads: its own and the top_k - 1 best past ones."""
    window_size: int = 512
    """Keys that the window branch of attention "nsa" reads, a query's own position included."""
    selector: Literal["mean", "max", "pooled", "bounds", "index", "seer"] = "mean"
    """How a query scores a past chunk: by its mean key (the paper), by the best or the pooled mean
    keys of parts of it, by bounds of its keys, by bounds of learned vectors ("index"), or by
    learned maps of its smallest, largest and mean keys ("seer"); see docs/selectors.md."""
    selector_blocks: int = 8
    """Parts of a chunk for the selectors "max", "pooled" and "index"; divides chunk_size."""
    index_size: int = 0
    """Channels of the learned vectors of the selectors "index" and "seer"; 0: head_size."""
    selection_groups: int = 0
    """S: choices of chunks, each shared by H / S neighbouring heads of queries; 0: each head
    chooses for itself."""
    selection_join: Literal["sum", "max"] = "sum"
    """What the scores of heads that choose together count as: their sum or the largest. The
    selectors "index" and "seer" have one score a choice."""
    forced_chunks: Literal["none", "previous", "first", "both"] = "none"
    """Past chunks that every query reads, among its top_k: the one before its own, the first of the
    text, or both."""
    share_selection_every: int = 1
    """Attention block i reads the chunks that block (i // n) * n chose: only every n-th block
    chooses (IndexShare); 1: each chooses for itself."""
    selection_span: int = 0
    """Chunks of a span, with the selectors "bounds" and "index": queries choose spans by bounds of
    all their keys first, and then chunks of these alone; 0: among all chunks."""
    selection_spans: int = 8
    """Spans that a query chooses among, its own included, if there are spans."""
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
            width=self.width,
            head_size=self.head_size,
            chunk_size=self.chunk_size,
            top_k=self.top_k,
            window_size=self.window_size,
        )
        require(
            self.num_attention_blocks >= 0,
            f"model.num_attention_blocks is {self.num_attention_blocks}: use 0 for plain RWKV-7",
        )
        require(
            self.num_blocks >= (0 if self.num_attention_blocks else 1),
            f"model.num_blocks is {self.num_blocks}: it must be at least 1, or 0 for a Transformer "
            "of num_attention_blocks blocks",
        )
        require(self.ffn_width >= 0, f"model.ffn_width is {self.ffn_width}: use 0 for 4 x width")
        require(
            self.width % self.head_size == 0,
            f"model.width {self.width} is not divisible by model.head_size {self.head_size}",
        )
        require(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}: it must be positive")
        require(
            self.backbone == "llama" or self.norm_eps == 1e-5,
            f'model.norm_eps is {self.norm_eps}, but the norms of the backbone "rwkv" have 1e-5: '
            'leave it, or use backbone="llama"',
        )
        self._check_recurrent_blocks()
        self._check_attention()
        check_choices(self)
        self._check_rotary()
        self._check_attention_init()

    def _check_recurrent_blocks(self) -> None:
        """Raises ConfigError for options of recurrent blocks that do not go together."""
        require_positive("model.low_rank_override", **self.ranks._asdict())
        require(
            self.mixer == "rwkv7" or not self.learned_state,
            f"model.learned_state is for the mixer 'rwkv7', not {self.mixer!r}: leave it False",
        )
        require(
            self.num_blocks > 0 or (self.mixer == "rwkv7" and not self.learned_state),
            "model.mixer and model.learned_state are of recurrent blocks, but model.num_blocks is "
            "0: leave them as they are",
        )
        blocks, attention = self.num_blocks, self.num_attention_blocks
        if attention:
            divisors = [m for m in range(1, min(blocks, 256) + 1) if blocks % m == 0]
            require(
                blocks % attention == 0,
                f"model.num_attention_blocks {attention} does not divide model.num_blocks "
                f"{blocks}: trailing RWKV-7 blocks would have no place; choose one of {divisors}",
            )

    def _check_attention(self) -> None:
        """Raises ConfigError for options of attention that do not go together."""
        require(self.key_conv >= 0, f"model.key_conv is {self.key_conv}: use 0 for none")
        require(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads is {self.num_kv_heads}: it must divide the {self.num_heads} heads "
            "of queries, or be 0 for as many",
        )
        require(
            not self.shared_attention or self.num_attention_blocks > 0,
            "model.shared_attention is True, but model.num_attention_blocks is 0: leave it False",
        )

    def _check_rotary(self) -> None:
        """Raises ConfigError for rotary positions that make no sense."""
        require(
            self.rope_theta == 0 or self.rope_theta > 1,
            f"model.rope_theta is {self.rope_theta}: use a base such as 10000, or 0 for none",
        )
        require(
            self.rope_theta == 0 or self.head_size % 2 == 0,
            f"model.head_size {self.head_size} is odd: rotary positions turn pairs of channels",
        )
        if self.rope_scaling is None:
            return
        require(
            self.rope_theta > 0,
            f"model.rope_scaling is {self.rope_scaling}, but model.rope_theta is 0: there are no "
            "positions to scale",
        )
        factor, low, high, original = self.rope_scaling
        require(
            factor >= 1 and 0 < low < high and original >= 1,
            f"model.rope_scaling is {self.rope_scaling}: it is (factor, low_freq_factor, "
            "high_freq_factor, original_max_position_embeddings) with factor >= 1 and "
            "0 < low_freq_factor < high_freq_factor",
        )

    def _check_attention_init(self) -> None:
        """Raises ConfigError for initial values that the attention blocks can't have."""
        grouped = self.kv_heads != self.num_heads
        require(
            self.mixer != "mamba2" or self.attention_init != "copy",
            'model.attention_init "copy" takes the matrices of the recurrent blocks, which have '
            'other shapes with the mixer "mamba2": use "zero" or "aligned"',
        )
        require(
            self.attention_init != "copy"
            or (self.num_blocks > 0 and self.backbone == "rwkv" and not self.shared_attention),
            'model.attention_init "copy" takes the matrices of the RWKV block before each '
            'attention block: without such blocks, with backbone="llama" or shared_attention use '
            '"zero"',
        )
        require(
            not grouped or self.attention_init == "zero",
            f"model.attention_init {self.attention_init!r} sets keys from queries or from blocks "
            f'with as many heads, but model.num_kv_heads is {self.num_kv_heads}: use "zero"',
        )

    @property
    def num_heads(self) -> int:
        return self.width // self.head_size

    @property
    def kv_heads(self) -> int:
        """G: heads of keys and values in an attention block."""
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        """Channels of the keys (and of the values) of an attention block."""
        return self.kv_heads * self.head_size

    @property
    def choices(self) -> int:
        """S: choices of chunks that a token makes in an attention block."""
        each = self.kv_heads if self.attention == "nsa" else self.num_heads
        return self.selection_groups or each

    @property
    def learned_selector(self) -> bool:
        """Whether the selector has parameters, those of an indexer."""
        return self.selector in LEARNED

    @property
    def asking_heads(self) -> int:
        """Heads of what the selector asks with: of queries, or one learned query a choice."""
        return self.choices if self.learned_selector else self.num_heads

    @property
    def choosing_blocks(self) -> int:
        """Attention blocks that choose chunks; the others read what one of these chose."""
        return -(-self.num_attention_blocks // self.share_selection_every)

    @property
    def shares_choices(self) -> bool:
        """Whether some attention block reads the chunks that another one chose."""
        shared = self.choosing_blocks < self.num_attention_blocks
        return shared and self.attention == "sparse" and self.top_k > 1

    @property
    def scored_heads(self) -> int:
        """Heads of what the selector keeps: of keys, or of the learned vectors."""
        return self.choices if self.selector == "index" else self.kv_heads

    @property
    def index_channels(self) -> int:
        """I: channels of the learned vectors."""
        return self.index_size or self.head_size

    @property
    def scored_size(self) -> int:
        """Channels of each of the scored heads."""
        return self.index_channels if self.selector == "index" else self.head_size

    @property
    def gate_matrix(self) -> int:
        """Numbers in the matrix by which one attention block makes the gates of its branches."""
        return 3 * self.width * self.num_heads if self.attention == "nsa" else 0

    @property
    def indexer_matrices(self) -> int:
        """Numbers in the matrices by which one attention block makes its learned vectors."""
        if not self.learned_selector:
            return 0
        of_keys = 3 * self.choices if self.selector == "seer" else max(self.choices, self.kv_heads)
        return (self.num_heads + of_keys) * self.head_size * self.index_channels

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
    def title(self) -> str:
        """Kind of the model for people."""
        if not self.num_blocks:
            return "Transformer"
        return "RWKV-X" if self.num_attention_blocks else self.mixer_title

    @property
    def blocks_title(self) -> str:
        """Numbers and kinds of the blocks for people."""
        kinds = (self.num_blocks, self.mixer_title), (self.num_attention_blocks, "attention")
        return " and ".join(f"{count} {kind}" for count, kind in kinds if count) + " blocks"

    @property
    def attention_layers(self) -> int:
        """Attention blocks that have parameters of their own."""
        return (
            min(1, self.num_attention_blocks)
            if self.shared_attention
            else self.num_attention_blocks
        )

    @property
    def channel_mix_matrices(self) -> int:
        """Numbers in the matrices of one channel mix."""
        return (3 if self.backbone == "llama" else 2) * self.width * self.hidden_width

    @property
    def attention_matrices(self) -> int:
        """Numbers in the four matrices of one attention, and in that of its gates."""
        return 2 * self.width * (self.width + self.kv_width) + self.gate_matrix

    @property
    def channel_mix_shift(self) -> int:
        """Numbers of a token that the channel mix of the next one needs."""
        return self.width if self.backbone == "rwkv" else 0

    @property
    def num_parameters(self) -> int:
        """Numbers in all arrays of the model; costs nothing, whatever its size."""
        width, llama = self.width, self.backbone == "llama"
        norm = width if llama else 2 * width
        channel_mix = self.channel_mix_matrices + (0 if llama else width)
        time_mix = self.mixer_sizes.parameters + self.learned_state * width * self.head_size
        attention = self.attention_matrices + self.indexer_matrices
        attention += self.key_conv * self.kv_width
        attention += self.qkv_bias * (width + 2 * self.kv_width)
        return (
            (1 if self.tied_embeddings else 2) * self.vocab_size * width
            + (1 if llama else 2) * norm
            + self.num_blocks * (2 * norm + time_mix + channel_mix)
            + self.attention_layers * (2 * norm + attention + channel_mix)
        )

    @property
    def blocks_per_group(self) -> int:
        """RWKV-7 blocks before each attention block (all of them if there is none)."""
        return self.num_blocks // max(1, self.num_attention_blocks)

    def without_attention(self) -> ModelConfig:
        """The plain RWKV-7 which block expansion turns into this model."""
        require(
            self.num_blocks > 0,
            "a Transformer (model.num_blocks = 0) is nothing without its attention blocks: only "
            "models with recurrent blocks are expanded or compared without attention",
        )
        return dataclasses.replace(self, num_attention_blocks=0, shared_attention=False)

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

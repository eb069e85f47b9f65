"""What is read: sources, their mixture and order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rwkvx_jax.config.values import Checked, require, require_positive

Targets = Literal["all", "answers", "balanced"]

# Sources drawn more seldom than this, relative to another, would hardly ever be seen.
_LARGEST_RATIO = 1e6


def check_mixture(owner: str, weights: tuple[float, ...]) -> None:
    """Raises ConfigError for weights of sources that make no sensible mixture."""
    used = [weight for weight in weights if weight > 0]
    require(
        max(used, default=1.0) <= _LARGEST_RATIO * min(used, default=1.0),
        f"{owner} are {weights}: one is over {_LARGEST_RATIO:g} times another, so that the smaller "
        "would hardly ever be drawn; leave that source out, or bring them closer together",
    )


@dataclass(frozen=True)
class SourceConfig(Checked):
    """One ingredient of the training mixture."""

    kind: Literal[
        "text", "jsonl", "binidx",
        "passkey", "book-passkey", "recall", "book-recall", "pairs",
        "lookup", "book-lookup", "book-copy",
    ] = "text"  # fmt: skip
    """"text": text files; "jsonl": a document or conversation a line; "binidx": token ids in the
    RWKV/Megatron format; made on the fly: "passkey" (a number hidden in filler), "book-passkey" (in
    pieces of text files), "recall" and "book-recall" (many names with numbers, likewise), "pairs"
    (names with numbers, stated again and again), "lookup" and "book-lookup" (facts in many
    wordings), "book-copy" (text in which passages come again). See docs/data.md."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources."""
    path: str = ""
    """File, directory or glob; empty: `data.path`, and if that is empty the embedded corpus."""
    samples: Literal["window", "document", "packed"] = "window"
    """"window": windows of the stream of all documents (see `data.reset_at_documents`); "document":
    each document by itself, cut or padded to the length (for conversations); "packed": whole
    documents side by side in windows, none of which sees or predicts another."""
    targets: Targets = "all"
    """Tokens of documents made on the fly that count in the loss: "answers" leaves out the text
    around them, so that a long document's few answers are not lost in it; "balanced" gives the
    answers together the weight of all the text around them (where a window has any)."""
    pairs: int = 64
    """"recall", "book-recall": names with numbers in a document; "pairs", "lookup", "book-lookup":
    at most so many."""
    questions: int = 1
    """"recall", "book-recall": how many of them are asked for at its end; "lookup", "book-lookup":
    at most so many."""

    def __post_init__(self):
        super().__post_init__()
        require_positive("data source", pairs=self.pairs, questions=self.questions)
        require(
            self.questions <= self.pairs,
            f"data source: {self.questions} questions about {self.pairs} pairs; ask for fewer",
        )
        require(
            self.targets == "all" or not self.reads_text,
            f'data source "{self.kind}": targets is "{self.targets}", but text has no answers; use '
            '"all"',
        )
        require(
            self.samples != "packed" or self.reads_text,
            f'data source "{self.kind}": samples is "packed", but its documents are made to fill '
            'windows, one each; leave samples at "window"',
        )
        require(
            self.kind != "pairs" or self.pairs >= 2,
            f'data source "pairs": pairs is {self.pairs}; a document has at least 2',
        )
        require(self.weight > 0, f"data source weight is {self.weight}: it must be positive")

    @property
    def reads_text(self) -> bool:
        """Whether documents are read, not made on the fly."""
        return self.kind in ("text", "jsonl", "binidx")


@dataclass(frozen=True)
class DataConfig(Checked):
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
    reset_at_documents: bool = True
    """Where documents begin inside of samples="window" everything begins anew, as with "packed": no
    document sees or predicts another. False: they run on into each other, as in the original."""
    align_documents: int = 1
    """Documents of samples="packed" start at multiples of it in their windows; model.chunk_size
    gives every document chunks of its own."""
    cache_dir: str = ""
    """Where tokenized text is cached; empty: `data-cache` in the work directory."""
    cache_per_host: bool = False
    """Each host writes a cache of its own: for hosts that share no disk."""
    verify: Literal["sampled", "full"] = "sampled"
    """How token files are compared with the hashes that were stored of them: "sampled" reads at
    most 64 MiB of each when a run starts, "full" every byte."""

    def __post_init__(self):
        super().__post_init__()
        require(len(self.sources) > 0, "data.sources is empty: name at least one source")
        check_mixture("weights of data.sources", tuple(s.weight for s in self.sources))
        require(
            0 <= self.held_out < 1, f"data.held_out is {self.held_out}: use a share such as 0.02"
        )
        require(self.seed >= 0, f"data.seed is {self.seed}: it must not be negative")
        require_positive("data", align_documents=self.align_documents)
        require(
            self.align_documents == 1 or self.packed,
            f"data.align_documents is {self.align_documents}, but no source has samples="
            '"packed": documents of other samples start where they do; leave it at 1',
        )
        require(
            self.order == "shuffle" or all(s.samples == "window" for s in self.sources),
            f'data.order "{self.order}" is one of windows: use samples="window" or order="shuffle"',
        )

    @property
    def packed(self) -> bool:
        """Whether a source packs documents."""
        return any(source.samples == "packed" for source in self.sources)

    @property
    def segmented(self) -> bool:
        """Whether a source puts several documents into a sample that do not see each other: all
        batches of the run then have segment ids."""
        windows = any(s.samples == "window" and s.reads_text for s in self.sources)
        return self.packed or (windows and self.reset_at_documents)

"""Long documents for evaluations of running text: parts of text files, all of one length."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rwkvx_jax.cache import MOST_ROWS
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.models import EvalOptions, require_at_least_1
from rwkvx_jax.storage import WorkPath, files_below
from rwkvx_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextOptions(EvalOptions):
    """Flags of every task that reads documents."""

    text: WorkPath
    """A .txt file, or a folder of them: each is cut into documents."""
    length: int = 32768
    """Tokens of a document."""
    skip: int = 2048
    """Tokens left out at the beginning of every file (title pages, contents)."""
    documents: int = 10
    """Most documents, taken from the files in turn."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "length", "documents")
        if self.length > MOST_ROWS:
            raise ConfigError(f"--length is {self.length:,}: a text has at most {MOST_ROWS:,}")
        if self.skip < 0:
            raise ConfigError(f"--skip is {self.skip}: it must not be negative")


class Document(NamedTuple):
    """A part of a file: its name, and where it starts in the file's tokens."""

    file: str
    start: int


def read_documents(
    options: TextOptions,
    tokenizer: Tokenizer,
    length: int | None = None,
    shorten: str = "--length or --skip",
) -> dict[Document, np.ndarray]:
    """The documents, each with length + 1 tokens (the last one is only predicted).

    Args:
      options: which texts, and how many parts of them.
      tokenizer: of the models.
      length: of a document; None: as the options say.
      shorten: flags to lower where no text is long enough.

    Raises:
      ConfigError: no text there, or no file with enough tokens for a single document.
    """
    files = [options.text] if options.text.is_file() else files_below(options.text, ".txt")
    if not files:
        raise ConfigError(f"--text {options.text}: no such .txt file, nor a folder with any")
    length = length or options.length
    parts: list[list[tuple[Document, np.ndarray]]] = []
    sizes = {}
    for file in files:
        name = file.name if options.text.is_file() else str(file.relative_to(options.text))
        tokens = tokenizer.encode_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
        sizes[name] = len(tokens)
        starts = range(options.skip, len(tokens) - length, length)
        parts.append([(Document(name, s), tokens[s : s + length + 1]) for s in starts])
    longest = max(map(len, parts))
    in_turn = [own[i] for i in range(longest) for own in parts if i < len(own)]
    if not in_turn:
        largest = max(sizes, key=sizes.get)
        raise ConfigError(
            f"no file has {options.skip} + {length} + 1 tokens of the {tokenizer.name} "
            f"tokenizer: the longest, {largest}, has {sizes[largest]}; lower {shorten}"
        )
    return dict(in_turn[: options.documents])

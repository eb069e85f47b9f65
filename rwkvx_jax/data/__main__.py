"""Tokenizes text into a binidx file for training: `python -m rwkvx_jax.data SRC DST`.

A run that was interrupted goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rwkvx_jax.cli import command_line, parse
from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.binidx import Binidx, binidx_file
from rwkvx_jax.data.sources import open_corpus
from rwkvx_jax.data.token_cache import build
from rwkvx_jax.tokenizer import TokenizerName, load_tokenizer

_MOST_WORKERS = 1024


@dataclass(frozen=True)
class Arguments:
    """Tokenizes text or jsonl files into DST.bin and DST.idx (DST.mask for conversations), with
    their hashes in DST.hash."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """File, directory or glob, local or gs://; "embedded" is the text that comes with Python."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Path of the new files without extension, on a local disk."""
    tokenizer: TokenizerName = "world"
    vocab_file: str = ""
    """Vocabulary of the World tokenizer; empty: the one of the pyrwkv-tokenizer package."""
    kind: Literal["auto", "text", "jsonl"] = "auto"
    """"text": a document a file; "jsonl": a document a line; "auto": by the end of SRC."""
    workers: int = 0
    """Processes; 0: one for each core."""


def tokenize(arguments: Arguments) -> None:
    """Runs the command.

    Raises:
      ConfigError: anything in the source or destination that can't work.
    """
    index = binidx_file(arguments.destination, "idx")
    if index.exists():
        raise ConfigError(f"{index} exists: choose another destination or remove it")
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.vocab_file)
    kind = arguments.kind
    if kind == "auto":
        kind = "jsonl" if arguments.source.lower().endswith(".jsonl") else "text"
    source = "" if arguments.source == "embedded" else arguments.source
    if not 0 <= arguments.workers <= _MOST_WORKERS:
        raise ConfigError(f"--workers is {arguments.workers}: use 0 to {_MOST_WORKERS}")
    workers = arguments.workers or os.cpu_count() or 1
    build(
        open_corpus(kind, source),
        tokenizer,
        arguments.destination,
        workers=workers if workers > 1 else 0,
    )
    written = Binidx(arguments.destination)
    written.check_vocabulary(tokenizer.vocab_size)
    print(f"{index.with_suffix('')}: {len(written.sizes):,} documents, {len(written):,} tokens")


def main(argv: list[str], prog: str = "python -m rwkvx_jax.data") -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with command_line(prog, argv):
        tokenize(parse(Arguments, argv, prog))


if __name__ == "__main__":
    main(sys.argv[1:])

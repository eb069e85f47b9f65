"""Cuts books into short documents, for training on many of them in a window.

    python tools/cut_documents.py 'books/[!d]*.txt' --output documents.jsonl
    python tools/cut_documents.py books/dracula.txt --output held_out/

Each document ends with the sentence in which it reaches a length drawn between --least and --most
bytes, or at --most. Their order is random over all books, so that what stands before a document
tells nothing about it. A .jsonl file gets a line a document; a folder gets a .txt file each.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("books", help="a text file, or a glob of them")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file, or a folder")
    parser.add_argument("--least", type=int, default=200, help="bytes of a document")
    parser.add_argument("--most", type=int, default=2000, help="bytes of a document")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 0 < options.least < options.most:
        parser.error(f"--least is {options.least}, --most {options.most}: must be 0 < least < most")
    files = sorted(Path(name) for name in glob.glob(options.books))
    if not files:
        parser.error(f"{options.books}: no such file")
    if options.output.exists():
        parser.error(f"{options.output} exists: remove it, or name another --output")
    rng = np.random.default_rng(options.seed)
    documents = [
        document
        for file in files
        for document in cut(file.read_text(encoding="utf-8"), options.least, options.most, rng)
    ]
    rng.shuffle(documents)
    part = options.output.with_name(f"part-{options.output.name}")  # a stopped run leaves no output
    if part.exists():
        parser.error(f"{part} is left of a run that was stopped: remove it")
    write(documents, part)
    part.rename(options.output)
    print(f"{options.output}: {len(documents):,} documents of {len(files)} files")


def cut(text: str, least: int, most: int, rng: np.random.Generator) -> Iterator[str]:
    """Documents of at least `least` and at most `most` bytes. Left out are what a sentence has
    beyond `most`, and a shorter rest at the end of the text."""
    goal, document = rng.integers(least, most + 1), ""
    for sentence in re.split(r"(?<=[.!?]\s)", text.replace("\r\n", "\n")):
        document += sentence
        if len(document.encode()) >= goal:
            yield document.encode()[:most].decode(errors="ignore").strip()
            goal, document = rng.integers(least, most + 1), ""


def write(documents: list[str], output: Path) -> None:
    if output.suffix == ".jsonl":
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return
    output.mkdir(parents=True)
    for index, text in enumerate(documents):
        (output / f"{index:06}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

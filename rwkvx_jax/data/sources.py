"""Corpora of text: which files they consist of, and how a piece of one becomes token ids.

A corpus names its documents in a fixed order and cuts them into parts of a few megabytes which can
be tokenized independently, in any process: large files are cut only where that can't change an id.
Paths may be local or of any storage that etils.epath knows (gs://, s3://).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from etils import epath

from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.chat import render_chat
from rwkvx_jax.tokenizer import Tokenizer

CorpusKind = Literal["text", "jsonl", "embedded"]

_log = logging.getLogger(__name__)
_SUFFIXES = {"text": ".txt", "jsonl": ".jsonl"}
_PART_BYTES = 8 << 20
_CUT_WINDOW = 1 << 16  # bytes searched at a time for a place to cut
_HASH_BLOCK = 1 << 24


@dataclass(frozen=True)
class Range:
    """Bytes begin..end of a file; `closes`: a document ends there."""

    path: str
    begin: int
    end: int
    closes: bool


@dataclass(frozen=True)
class Part:
    """What one task tokenizes: whole documents, or one piece of a long one."""

    kind: CorpusKind
    ranges: tuple[Range, ...] = ()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(r.end - r.begin for r in self.ranges)


@dataclass(frozen=True)
class Encoded:
    """Tokens of a part.

    Attributes:
      tokens: int32 [N], each document closed by token 0.
      sizes: tokens of each document, or of the piece of it that lies in this part.
      closed: whether the last document ends here.
      mask: uint8 [N], or None where all tokens count in the loss.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    closed: bool
    mask: np.ndarray | None


class EmbeddedCorpus:
    """Python's own documentation prose, in every CPython: about 0.5 MB of real text.

    It differs between Python versions, hence its fingerprint.
    """

    name = f"the embedded corpus (documentation of Python {platform.python_version()})"
    kind: CorpusKind = "embedded"

    def fingerprint(self) -> str:
        """Hash of the text."""
        return hashlib.sha256("\0".join(_embedded_documents()).encode()).hexdigest()

    def listing(self) -> list[list]:
        """Cheap identity: changes whenever the contents do."""
        return [["embedded", self.fingerprint()]]

    def parts(self, tokenizer: Tokenizer) -> list[Part]:
        """The pieces that are tokenized one by one, in their order."""
        return [Part("embedded")]


class FileCorpus:
    """Text files (one document each) or jsonl files (one document a line)."""

    def __init__(self, kind: Literal["text", "jsonl"], path: str):
        """Finds the files.

        Args:
          kind: "text" or "jsonl".
          path: a file, a directory (all *.txt or *.jsonl below it) or a glob.

        Raises:
          ConfigError: nothing there, or nothing but empty files.
        """
        self.kind: CorpusKind = kind
        self.name = path
        self._files = [(file, file.stat()) for file in _find_files(path, _SUFFIXES[kind])]
        empty = [str(file) for file, stat in self._files if stat.length == 0]
        if len(empty) == len(self._files):
            raise ConfigError(f"data file {empty[0]} is empty")
        if empty:
            _log.warning("%s: %d empty files are left out, as %s", path, len(empty), empty[0])
        self._files = [(file, stat) for file, stat in self._files if stat.length]

    def fingerprint(self) -> str:
        """Hash of the contents of all files in their order; names don't matter."""
        digest = hashlib.sha256()
        for file, stat in self._files:
            digest.update(f"{stat.length}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(_HASH_BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def listing(self) -> list[list]:
        """Cheap identity: name, size and time of each file."""
        return [[str(file), stat.length, stat.mtime] for file, stat in self._files]

    def parts(self, tokenizer: Tokenizer) -> list[Part]:
        """The pieces that are tokenized one by one, in their order."""
        parts, group = [], []
        for r in self._ranges(tokenizer):
            if group and sum(g.end - g.begin for g in group) + r.end - r.begin > _PART_BYTES:
                parts.append(Part(self.kind, tuple(group)))
                group = []
            group.append(r)
        return [*parts, Part(self.kind, tuple(group))]

    def _ranges(self, tokenizer: Tokenizer) -> Iterable[Range]:
        cut = _after_line if self.kind == "jsonl" else tokenizer.safe_cut
        for file, stat in self._files:
            begin = 0
            with file.open("rb") as stream:
                while stat.length - begin > _PART_BYTES:
                    end = _find_cut(stream, begin + _PART_BYTES, stat.length, cut)
                    yield Range(str(file), begin, end, end == stat.length or self.kind == "jsonl")
                    begin = end
            if begin < stat.length:
                yield Range(str(file), begin, stat.length, True)


def open_corpus(kind: Literal["text", "jsonl"], path: str) -> EmbeddedCorpus | FileCorpus:
    """The corpus at a path; an empty path is the embedded one.

    Raises:
      ConfigError: a path that leads to no usable file, or to one of another kind.
    """
    if not path:
        if kind != "text":
            raise ConfigError(f'a data source of kind "{kind}" needs a path')
        return EmbeddedCorpus()
    for other, suffix in (("jsonl", ".jsonl"), ("binidx", ".bin"), ("binidx", ".idx")):
        if path.endswith(suffix) and kind != other:
            raise ConfigError(f'data source {path} looks like {other}: set kind="{other}"')
    return FileCorpus(kind, path)


def encode_part(part: Part, tokenizer: Tokenizer) -> Encoded:
    """Tokenizes a part.

    Raises:
      ConfigError: invalid UTF-8 (file and byte), or a bad jsonl line (file and line).
    """
    tokens, masks = [], []
    if part.kind == "jsonl":
        for r in part.ranges:
            for text, mask in _jsonl_documents(r, tokenizer):
                tokens.append(text)
                masks.append(mask)
    else:
        for text, closes in _texts(part):
            tokens.append(_close(tokenizer.encode(text)) if closes else tokenizer.encode(text))
    masked = any(mask is not None for mask in masks)
    pairs = zip(tokens, masks, strict=True) if masked else ()
    filled = [np.ones(len(t), np.uint8) if m is None else m for t, m in pairs]
    return Encoded(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        sizes=np.asarray([len(t) for t in tokens], np.int64),
        closed=not part.ranges or part.ranges[-1].closes,
        mask=np.concatenate(filled) if masked else None,
    )


def _texts(part: Part) -> Iterable[tuple[str, bool]]:
    """Texts of a part, each with whether its document ends there."""
    if part.kind == "embedded":
        yield from ((text, True) for text in _embedded_documents())
    for r in part.ranges:
        try:
            yield _read(r).decode(), r.closes
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{r.path} is not valid UTF-8: {error.reason} at byte {r.begin + error.start}"
            ) from error


def _jsonl_documents(
    r: Range, tokenizer: Tokenizer
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    """Tokens and mask of each line; blank lines and empty texts are no documents."""
    for number, line in enumerate(_read(r).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"text", "messages"} & set(record):
                raise ValueError('neither "text" nor "messages"')
            if "messages" in record:
                yield render_chat(record["messages"], tokenizer)
            elif not isinstance(record["text"], str):
                raise ValueError('"text" is not a string')
            elif record["text"]:
                yield _close(tokenizer.encode(record["text"])), None
        except ValueError as error:
            raise ConfigError(f"{r.path}, line {_lines_before(r) + number}: {error}") from error


def _close(tokens: np.ndarray) -> np.ndarray:
    return np.append(tokens, np.int32(Tokenizer.end_of_document))


def _lines_before(r: Range) -> int:
    return _read(Range(r.path, 0, r.begin, True)).count(b"\n")


def _read(r: Range) -> bytes:
    with epath.Path(r.path).open("rb") as stream:
        stream.seek(r.begin)
        return stream.read(r.end - r.begin)


def _after_line(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _find_cut(stream, begin: int, length: int, cut) -> int:
    """First place from `begin` on, in steps of a window, where the file may be cut."""
    while begin < length:
        stream.seek(begin)
        if place := cut(stream.read(_CUT_WINDOW)):
            return begin + place
        begin += _CUT_WINDOW - 1  # windows overlap by a byte: a cut lies between two bytes
    return length


def _find_files(path: str, suffix: str) -> list[epath.Path]:
    """Files of a path in their order: the file itself, those of a glob, or all below a directory
    with that suffix."""
    root = epath.Path(path)
    if _is_glob(path):
        found, wanted = (file for file in _glob(path) if not file.is_dir()), path
    elif root.is_dir():
        found, wanted = _below(root, suffix), f"*{suffix} below {path}"
    elif root.exists():
        return [root]
    else:
        raise ConfigError(f"data file {path} does not exist")
    files = sorted(found)
    if not files:
        raise ConfigError(f"no file matches {wanted}")
    return files


def _below(folder: epath.Path, suffix: str) -> Iterable[epath.Path]:
    for entry in folder.iterdir():
        if entry.suffix == suffix:
            yield entry
        elif entry.is_dir():
            yield from _below(entry, suffix)


def _glob(path: str) -> Iterable[epath.Path]:
    base = epath.Path(path)
    pattern = str(base)
    while _is_glob(str(base)):
        base = base.parent
    if str(base) != ".":
        pattern = pattern.removeprefix(str(base)).lstrip("/")
    if "**" not in pattern:
        return base.glob(pattern)
    if "://" in path:
        raise ConfigError(f'"**" does not work in {path}: name its directory instead')
    return (epath.Path(file) for file in Path(base).glob(pattern))


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


@functools.cache
def _embedded_documents() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))

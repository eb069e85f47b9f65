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
from typing import Literal

import numpy as np
from etils import epath

from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.chat import render_chat
from rwkvx_jax.textfiles import BYTE_ORDER_MARK, decode, find_files
from rwkvx_jax.tokenizer import Tokenizer

CorpusKind = Literal["text", "jsonl", "embedded"]

_log = logging.getLogger(__name__)
_SUFFIXES = {"text": ".txt", "jsonl": ".jsonl"}
_PART_BYTES = 8 << 20
_CUT_WINDOW = 1 << 16  # bytes searched at a time for a place to cut
_BLOCK = 1 << 24  # bytes read at a time


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
          path: a file, a directory (all *.txt or *.jsonl below it) or a glob; see textfiles.py.

        Raises:
          ConfigError: nothing there, or nothing but empty files.
        """
        self.kind: CorpusKind = kind
        self.name = path
        self._files = [(file, file.stat()) for file in find_files(path, _SUFFIXES[kind])]
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
                while block := stream.read(_BLOCK):
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
        if path.lower().endswith(suffix) and kind != other:
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
        with epath.Path(r.path).open("rb") as stream:
            stream.seek(r.begin)
            text = decode(stream.read(r.end - r.begin), r.path, r.begin)
        if text or r.begin:
            yield text, r.closes


def _jsonl_documents(
    r: Range, tokenizer: Tokenizer
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    """Tokens and mask of each line; blank lines and empty texts are no documents."""
    with epath.Path(r.path).open("rb") as stream:
        stream.seek(r.begin)
        number, place = 0, r.begin
        while place < r.end:
            line = stream.readline()
            number, place = number + 1, place + len(line)
            try:
                document = _jsonl_document(line.decode(), tokenizer)
            except (ValueError, RecursionError) as error:
                number += _lines_before(r)
                raise ConfigError(f"{r.path}, line {number}: {error}") from error
            if document is not None:
                yield document


def _jsonl_document(line: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Tokens and mask of a line, or None; a field that is null counts as absent."""
    line = line.removeprefix(BYTE_ORDER_MARK).strip()
    if not line:
        return None
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    text, messages = record.get("text"), record.get("messages")
    if messages is not None:
        return render_chat(messages, tokenizer)
    if text is None:
        raise ValueError('neither "text" nor "messages"')
    if not isinstance(text, str):
        raise ValueError('"text" is not a string')
    return (_close(tokenizer.encode(text)), None) if text else None


def _close(tokens: np.ndarray) -> np.ndarray:
    return np.append(tokens, np.int32(Tokenizer.end_of_document))


def _lines_before(r: Range) -> int:
    lines, left = 0, r.begin
    with epath.Path(r.path).open("rb") as stream:
        while left and (block := stream.read(min(left, _BLOCK))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines


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


@functools.cache
def _embedded_documents() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))

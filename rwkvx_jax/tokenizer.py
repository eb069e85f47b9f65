"""Tokenizers: bytes, and the RWKV World vocabulary.

Both map every byte string to ids and back without loss; id 0 is the end of a document and stands
for no text. The World vocabulary is split greedily, longest match first. Its file comes from the
optional `pyrwkv-tokenizer` package, whose compiled encoder is used where it is installed, or from
the user; the encoder below gives the same ids, only slower. A tokenizer also knows where a text
may be cut without changing its ids, so that large files are tokenized in pieces.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rwkvx_jax.config import ConfigError

TokenizerName = Literal["byte", "world"]

_log = logging.getLogger(__name__)
_WORLD_FILE = "rwkv_vocab_v20230424.txt"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()
_MOST_IDS = 1 << 20  # of a vocabulary file: a table is as long as its last id, filled or not
_LONGEST_LINE = 1 << 13  # characters of such a file; World's longest has about 400
_LITERAL = re.compile(r"""b?(['"]).*\1""")
_VOCABULARIES = {257: "byte", 65530: "world", 65536: "world"}  # rows of a model: its tokenizer

TOKENIZER_IDS = {"byte": 257, "world": 65530}
"""Ids of each tokenizer (of "world": with its standard vocabulary): the least number of rows of a
model that can use it."""

STANDARD_FINGERPRINTS = {
    "byte": "1f385d3182db8f0447a54ccb94f8a154c6b62e4d0d6bda7aa3bf0601a7c65228",
    "world": "89bac7c1a37bc6075cdedb7d9b039d9ac35af2587f8a4c8f5bafd28ffd2a5658",
}
"""`fingerprint_of` the tables of the two tokenizers (of "world": with its standard vocabulary)."""


def fingerprint_of(table: Sequence[bytes]) -> str:
    """A hash of a vocabulary; `table[id]` holds the bytes of each id, b"" where an id has none."""
    return hashlib.sha256(repr(list(table)).encode()).hexdigest()


def standard_table(name: TokenizerName) -> list[bytes] | None:
    """The bytes of each id of a tokenizer with its standard vocabulary; None where that is not
    installed (it comes with pyrwkv-tokenizer)."""
    if name == "byte":
        return [b"", *(bytes([value]) for value in range(256))]
    path = _packaged_vocabulary()
    return None if path is None else read_vocabulary(path)


class Tokenizer:
    """Maps text to ids and back by a table of byte strings.

    Attributes:
      name: "byte" or "world".
      vocab_size: largest id + 1; a model needs at least as many rows.
      end_of_document: id 0.
      fingerprint: hash of the table; equal for tokenizers that give equal ids.
    """

    end_of_document = 0

    def __init__(self, name: TokenizerName, table: Sequence[bytes]):
        """`table[id]` holds the bytes of each id, b"" where an id has none."""
        self.name = name
        self.vocab_size = len(table)
        self.fingerprint = fingerprint_of(table)
        self._table = list(table)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [N]."""
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Ids of any byte string, valid UTF-8 or not, int32 [N]."""
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Exact inverse of `encode_bytes`; ends of documents vanish.

        Raises:
          ValueError: an id that the vocabulary doesn't have.
        """
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if not self._known(i)]
        if unknown:
            raise ValueError(f"token {unknown[0]} is not in the {self.name} vocabulary")
        return b"".join(self._table[i] for i in ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; what is not valid UTF-8 and unknown ids become U+FFFD."""
        pieces = (self._table[i] if self._known(i) else _UNKNOWN for i in map(int, ids))
        return b"".join(pieces).decode(errors="replace")

    def safe_cut(self, data: bytes) -> int:
        """Largest p < len(data) at which `data` may be cut: the ids of both parts, one after the
        other, are those of the whole, and no character of valid UTF-8 is torn. 0 where there is
        no such place."""
        values = np.frombuffer(data, np.uint8)
        starts_character = (values[1:] & 0xC0) != 0x80
        places = np.flatnonzero(starts_character & self._separable(values[:-1], values[1:]))
        return int(places[-1]) + 1 if places.size else 0

    def _separable(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Whether no token holds byte `before` directly followed by `after`."""
        raise NotImplementedError

    def _known(self, token: int) -> bool:
        return token == 0 or 0 < token < self.vocab_size and bool(self._table[token])


class ByteTokenizer(Tokenizer):
    """One id per byte: its value + 1."""

    def __init__(self):
        super().__init__("byte", standard_table("byte"))

    def encode_bytes(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).astype(np.int32) + 1

    def _separable(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.ones(before.shape, bool)

    def __reduce__(self):
        return _unpickle, ("byte",)


class WorldTokenizer(Tokenizer):
    """The RWKV World vocabulary, or another one in the format of its file."""

    def __init__(self, vocab_file: str = ""):
        path = Path(vocab_file) if vocab_file else _packaged_vocabulary()
        if path is None:
            raise ConfigError(
                "the World tokenizer needs a vocabulary: install pyrwkv-tokenizer, or set "
                f"data.vocab_file to a copy of {_WORLD_FILE}"
            )
        table = read_vocabulary(path)
        super().__init__("world", table)
        self._vocab_file = vocab_file
        self._ids = {token: i for i, token in enumerate(table) if token}
        self._fast = _packaged_encoder(path)

    def encode(self, text: str) -> np.ndarray:
        if self._fast is None:
            return self._greedy(text.encode())
        return np.asarray(self._fast(text), np.int32)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:
            return self._greedy(data)

    def _separable(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return ~self._adjacent[before, after]

    def __reduce__(self):
        return _unpickle, ("world", self._vocab_file)

    def _greedy(self, data: bytes) -> np.ndarray:
        """The longest token that fits, again and again."""
        ids, sizes, found, start = self._ids, self._sizes, [], 0
        while start < len(data):
            for size in sizes.get(data[start : start + 2], (1,)):
                token = data[start : start + size]
                if token in ids:
                    break
            found.append(ids[token])
            start += len(token)
        return np.asarray(found, np.int32)

    @functools.cached_property
    def _sizes(self) -> dict[bytes, tuple[int, ...]]:
        """Lengths of the tokens that start with two given bytes, longest first."""
        sizes: dict[bytes, set[int]] = {}
        for token in self._ids:
            sizes.setdefault(token[:2], {1}).add(len(token))
        return {start: tuple(sorted(found, reverse=True)) for start, found in sizes.items()}

    @functools.cached_property
    def _adjacent(self) -> np.ndarray:
        """Whether some token holds byte a directly before byte b: bool [256, 256]."""
        adjacent = np.zeros((256, 256), bool)
        for token in self._ids:
            values = np.frombuffer(token, np.uint8)
            adjacent[values[:-1], values[1:]] = True
        return adjacent


def load_tokenizer(name: str, vocab_file: str = "") -> Tokenizer:
    """The tokenizer of that name.

    Args:
      name: "byte" (257 ids) or "world".
      vocab_file: vocabulary of "world"; empty: the one inside the pyrwkv-tokenizer package.

    Raises:
      ConfigError: unknown name, no vocabulary, or a vocabulary file that can't be used.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "world":
        return WorldTokenizer(vocab_file)
    raise ConfigError(f'tokenizer is {name!r}: choose "byte" or "world"')


def tokenizer_of(vocab_size: int) -> str:
    """The tokenizer that a model with so many rows was made for, or "" if it can't be told.

    World's ids go up to 65,529, so that it takes 65,530 rows; the official models have 65,536.
    """
    return _VOCABULARIES.get(vocab_size, "")


@functools.cache
def _unpickle(name: TokenizerName, vocab_file: str = "") -> Tokenizer:
    """A worker process that gets a tokenizer with every task reads its vocabulary once."""
    return load_tokenizer(name, vocab_file)


def read_vocabulary(path: Path) -> list[bytes]:
    """Reads a vocabulary file: lines `id literal length`, the literal being a Python string or
    bytes literal and the length counted in bytes.

    Returns:
      The bytes of each id from 0 to the largest, b"" where the file has none.

    Raises:
      ConfigError: no such file; a malformed line or a repeated id (with the line number); a byte
        that no token covers.
    """
    if not path.is_file():
        raise ConfigError(f"vocabulary file {path} does not exist")
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(_vocabulary_lines(path), 1):
        token_id, token = _vocabulary_line(line, f"{path}, line {number}")
        if token_id in tokens:
            raise ConfigError(f"{path}, line {number}: id {token_id} occurs twice")
        tokens[token_id] = token
    missing = {bytes([value]) for value in range(256)} - set(tokens.values())
    if missing:
        raise ConfigError(f"{path}: no token for the single byte {min(missing)!r}")
    return [tokens.get(i, b"") for i in range(max(tokens) + 1)]


def _vocabulary_lines(path: Path) -> Iterator[str]:
    """Lines of a file that may be anything."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while line := file.readline(_LONGEST_LINE):
                yield line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no vocabulary: it is not valid UTF-8") from error


def _vocabulary_line(line: str, where: str) -> tuple[int, bytes]:
    try:
        first, last = line.index(" "), line.rindex(" ")
        token_id, length = int(line[:first]), int(line[last:])
        literal = line[first:last].strip()
        if not _LITERAL.fullmatch(literal):
            raise ValueError
        token = ast.literal_eval(literal)
        token = token.encode() if isinstance(token, str) else token
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        message = f"{where}: expected `id literal length`, found {line[:80]!r}"
        raise ConfigError(message) from error
    if not isinstance(token, bytes):
        raise ConfigError(f"{where}: {token!r} is neither a string nor bytes")
    if token_id < 1 or len(token) != length or not token:
        raise ConfigError(f"{where}: id {token_id} or length {length} is wrong for {token!r}")
    if token_id >= _MOST_IDS:
        raise ConfigError(f"{where}: id {token_id} is too large: ids end at {_MOST_IDS - 1:,}")
    return token_id, token


def _packaged_vocabulary() -> Path | None:
    """The vocabulary file inside pyrwkv-tokenizer, or None where that isn't installed."""
    spec = importlib.util.find_spec("pyrwkv_tokenizer")
    return Path(spec.submodule_search_locations[0]) / _WORLD_FILE if spec else None


def _packaged_encoder(vocabulary: Path):
    """The compiled encoder if it is installed and made for this vocabulary, else None.

    It takes no other vocabulary: its table has a fixed size, and a smaller file crashes it.
    """
    packaged = _packaged_vocabulary()
    if packaged is not None and packaged.read_bytes() == vocabulary.read_bytes():
        from pyrwkv_tokenizer import RWKVTokenizer

        return RWKVTokenizer().encode
    _log_slow_once()
    return None


@functools.cache
def _log_slow_once() -> None:
    _log.warning(
        "World tokenizer: no compiled encoder for this vocabulary (pyrwkv-tokenizer has one for "
        "the standard vocabulary); encoding in Python, about ten times slower"
    )

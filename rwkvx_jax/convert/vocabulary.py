"""Holds the tokenizer files of a Hugging Face directory against our tokenizers.

A model that was trained with other ids than ours computes nonsense without any error, so that a
directory whose tokenizer differs from the one that its model's size suggests is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkvx_jax.convert.tensors import ConversionError, read_json
from rwkvx_jax.tokenizer import (
    STANDARD_FINGERPRINTS,
    fingerprint_of,
    read_vocabulary,
    standard_table,
)

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILES = "rwkv_vocab*.txt"
"""Pattern of the names of vocabulary files in the format of RWKV's own."""

_LARGEST = 4 << 20  # bytes; World's tokenizer.json has 2.0 MB
_MOST_IDS = 1 << 20
_SHOWN = 3


def check_vocabulary(directory: Path, name: str) -> None:
    """Compares the tokenizer files of a directory, if it has any, with a tokenizer of ours.

    Args:
      directory: that may hold a tokenizer.json or a vocabulary file.
      name: "world", "byte", or "" for a model of no tokenizer of ours, which is not checked.

    Raises:
      ConversionError: the file is no tokenizer that can be read, or differs from ours; says where.
      ConfigError: a vocabulary file with a malformed line.
    """
    if not name:
        return
    tables = {file: read_vocabulary(file) for file in sorted(directory.glob(VOCABULARY_FILES))}
    tokenizer = directory / TOKENIZER_FILE
    problems = []
    if tokenizer.is_file():
        tables[tokenizer], problems = _read_tokenizer(tokenizer)
    for file, table in tables.items():
        found = [*(problems if file == tokenizer else []), *_differences(table, name)]
        if found:
            raise ConversionError(
                f"{file} is another tokenizer than our {name!r}: {'; '.join(found)}. To read the "
                "model without it, name the model's file instead of the directory, or move "
                f"{file.name} away"
            )


def _differences(theirs: list[bytes], name: str) -> list[str]:
    """The first ids whose bytes differ from those of a tokenizer of ours, as one text."""
    theirs = theirs[: max((i + 1 for i, token in enumerate(theirs) if token), default=0)]
    if fingerprint_of(theirs) == STANDARD_FINGERPRINTS[name]:
        return []
    ours = standard_table(name)
    if ours is None:
        return ["its vocabulary is another one (pyrwkv-tokenizer, which tells where, is missing)"]
    size = max(len(theirs), len(ours))
    there, here = _padded(theirs, size), _padded(ours, size)
    wrong = [i for i in range(size) if there[i] != here[i]]
    shown = ", ".join(f"{i} is {there[i]!r:.60} there, {here[i]!r} here" for i in wrong[:_SHOWN])
    return [f"{len(wrong)} ids differ: {shown}{', ...' if len(wrong) > _SHOWN else ''}"]


def _padded(table: list[bytes], size: int) -> list[bytes]:
    return table + [b""] * (size - len(table))


def _read_tokenizer(path: Path) -> tuple[list[bytes], list[str]]:
    """The bytes of each id of a tokenizer.json, and in what else it differs from longest match.

    A token with a character that stands for no byte can't be met in a text, and counts as none;
    ids without a token have such ones.

    Raises:
      ConversionError: it has another form.
    """
    content = read_json(path, _LARGEST)
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or [] if isinstance(content, dict) else None
    if not (isinstance(vocabulary, dict) and _are_added_tokens(added)):
        raise ConversionError(f"{path}: no tokenizer with a vocabulary of tokens and ids")
    tokens: dict[int, bytes] = {}
    for token, token_id in vocabulary.items():
        if type(token_id) is not int or not 0 <= token_id < _MOST_IDS:
            raise ConversionError(f"{path}: token {token!r:.60} has the id {token_id!r:.60}")
        if token_id and all(character in _BYTE_OF for character in token):
            tokens[token_id] = bytes(_BYTE_OF[character] for character in token)
    tokens |= {token["id"]: token["content"].encode() for token in added if token["id"]}
    table = [tokens.get(i, b"") for i in range(max(tokens, default=-1) + 1)]
    return table, _not_longest_match(content, model)


def _are_added_tokens(added: Any) -> bool:
    return isinstance(added, list) and all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
        and 0 <= token["id"] < _MOST_IDS
        for token in added
    )


def _not_longest_match(content: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What makes a tokenizer split a text otherwise than into the longest tokens over its bytes."""
    split = content.get("pre_tokenizer")
    split = split if isinstance(split, dict) else {}
    wanted = {
        "model.type": (model.get("type"), "WordPiece"),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), ""),
        "normalizer": (content.get("normalizer"), None),
        "pre_tokenizer.type": (split.get("type"), "ByteLevel"),
        "pre_tokenizer.add_prefix_space": (split.get("add_prefix_space"), False),
        "pre_tokenizer.use_regex": (split.get("use_regex"), False),
    }
    return [
        f"{name} is {there!r:.60} there, {here!r} means the longest match"
        for name, (there, here) in wanted.items()
        if there != here
    ]


def _byte_characters() -> Sequence[str]:
    """The character that stands for each byte in the files of byte-level tokenizers: itself where
    it can be seen, else one after the other from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(_byte_characters())}

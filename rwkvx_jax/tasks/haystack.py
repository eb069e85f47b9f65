"""Text to hide things in: the books of a folder.

The text is read once, its white space made single blanks (as RULER does with its essays), and
served from the beginning, by words or by tokens; past its end it starts anew.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import re
from pathlib import Path

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.tokenizer import Tokenizer

_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]’”])) (?=[\"'(\[‘“]?[A-Z])")


class TextFolder:
    """The text of one file, of all *.txt files below a folder, or of the files that match a pattern
    such as books/[!A-Z]*.txt, in the order of their paths.

    words: its words. fingerprint: hash of the words.
    """

    def __init__(self, path: str | Path):
        """Reads it all.

        Raises:
          ConfigError: nothing there, no *.txt file, invalid UTF-8, or no words.
        """
        files = _files(Path(path))
        self.words = [word for file in files for word in _read(file).split()]
        if not self.words:
            raise ConfigError(f"haystack {path} holds no text")
        self.fingerprint = hashlib.sha256(" ".join(self.words).encode()).hexdigest()[:16]
        self._tokens: dict[str, np.ndarray] = {}

    def text(self, count: int) -> str:
        """The first `count` words."""
        rounds, rest = divmod(count, len(self.words))
        return " ".join(self.words * rounds + self.words[:rest])

    def window(self, tokenizer: Tokenizer, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count of the text repeated for ever, int32 [count]."""
        tokens = self.tokens(tokenizer)
        return tokens[np.arange(start, start + count) % len(tokens)]

    def tokens(self, tokenizer: Tokenizer) -> np.ndarray:
        """All tokens of the text, int32 [N]; encoded once."""
        if tokenizer.fingerprint not in self._tokens:
            self._tokens[tokenizer.fingerprint] = tokenizer.encode(" ".join(self.words))
        return self._tokens[tokenizer.fingerprint]


@functools.lru_cache(maxsize=4)
def open_folder(path: str) -> TextFolder:
    """The text at a path, read once a process."""
    return TextFolder(path)


def sentences(text: str) -> list[str]:
    """Cuts text at blanks between the end of a sentence and a capital letter."""
    return [part for part in _SENTENCE_END.split(text) if part]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        files = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not (files := [file for file in files if file.is_file()]):
            raise ConfigError(
                f"no haystack at {path}: name a .txt file, a folder of them, or a pattern"
            )
        return files
    if not (files := sorted(path.rglob("*.txt"))):
        raise ConfigError(f"haystack {path} holds no *.txt file")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not valid UTF-8: {error.reason} at byte {error.start}"
        ) from error

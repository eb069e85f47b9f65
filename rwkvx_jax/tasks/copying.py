"""Running text in which passages come again: to learn to look up what was said, in no wording."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rwkvx_jax.tasks.documents import Document, document_of

_SHORTEST, _LONGEST = 24, 384  # tokens of a passage
_LEAD = 8  # tokens of a passage until it can be known that it comes again
_AGAIN = 0.4  # share of the passages that come again


def copy_sample(
    seq_len: int,
    rng: np.random.Generator,
    *,
    text: Callable[[int, np.random.Generator], np.ndarray],
) -> Document:
    """A window of passages of text, some of which have been there before; those, but for their
    beginnings, count as answers.

    Args:
      seq_len: tokens of a window, the last target not counted.
      rng: source of the passages.
      text: (count, rng) -> so many tokens of running text.

    Raises:
      ConfigError: less text than that.
    """
    source, read = text(seq_len + 1, rng), 0
    parts: list[tuple[np.ndarray, bool]] = []
    written = np.zeros(0, np.int32)
    while len(written) < seq_len + 1:
        size = int(_SHORTEST * (_LONGEST / _SHORTEST) ** rng.random())
        again = len(written) >= 2 * size and rng.random() < _AGAIN
        if again:
            start = int(rng.integers(len(written) - size + 1))
            passage = written[start : start + size]
            parts += [(passage[:_LEAD], False), (passage[_LEAD:], True)]
        else:
            passage = source[read : read + size]
            read += size
            parts.append((passage, False))
        written = np.concatenate([written, passage])
    return document_of(parts, seq_len + 1)

"""The loop over a prompt: texts of any length are read through the decode cache in prefill chunks.

All chunks have one shape, so that reading is compiled once, and a long text never becomes one huge
forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def prefill_chunks(
    texts: Sequence[np.ndarray], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts texts into chunks, from the first tokens to the last of the longest text.

    Args:
      texts: tokens of each row; rows may differ in length, and be empty.
      size: tokens of a chunk.

    Yields:
      int32 tokens [B, size], 0 behind the end of a text, and int32 [B], how many of them count:
      what `model.prefill` and `model.read` take.
    """
    lengths = np.asarray([len(text) for text in texts], np.int32)
    for start in range(0, int(lengths.max()), size):
        chunk = np.zeros((len(texts), size), np.int32)
        for row, text in zip(chunk, texts, strict=True):
            part = text[start : start + size]
            row[: len(part)] = part
        yield chunk, np.clip(lengths - start, 0, size)

"""The loop over a prompt: texts of any length are read through the decode cache in prefill chunks.

Chunks have few lengths, each of which is compiled once, and a long text never becomes one huge
forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

_SMALLEST = 16  # tokens of a chunk


def chunk_sizes(size: int) -> list[int]:
    """Lengths of the chunks in which an engine reads, the largest first: each a quarter of the one
    before."""
    sizes = [size]
    while sizes[-1] % 4 == 0 and sizes[-1] // 4 >= _SMALLEST:
        sizes.append(sizes[-1] // 4)
    return sizes


def next_size(left: int, sizes: Sequence[int]) -> int:
    """Of these lengths, that of the next chunk of a text: the largest that would be filled by at
    least three quarters, so that little is computed in vain."""
    return next((size for size in sizes if 4 * left >= 3 * size), sizes[-1])


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
    for start in range(0, max(map(len, texts)), size):
        yield cut_chunk([text[start : start + size] for text in texts], size)


def cut_chunk(parts: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts of texts, none longer than `size`, as `prefill_chunks` yields them."""
    chunk = np.zeros((len(parts), size), np.int32)
    for row, part in zip(chunk, parts, strict=True):
        row[: len(part)] = part
    return chunk, np.asarray([len(part) for part in parts], np.int32)

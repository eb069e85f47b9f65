"""Which documents lie side by side in a window: best-fit decreasing, computed once and stored.

A document longer than a window is cut into pieces as long as a window; its last piece, and every
shorter document, is a piece too. The longest piece comes first, and each goes into the window with
the least room that still holds it, or into a new one. Pieces of equal length come in random order,
and so do the pieces of a window.

A packing is stored as binidx: its "documents" are windows, their tokens (int64) the places at which
their pieces start in the stream of tokens. Where a piece ends is said by the stream's own index.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkvx_jax.config import ConfigError
from rwkvx_jax.data.binidx import Binidx, binidx_file
from rwkvx_jax.data.stored import finish, is_complete, open_stored, remove_old
from rwkvx_jax.storage import exclusive, new_file

PACKING = 1
"""Number of the algorithm; raised when the same documents would be packed in another way."""

_log = logging.getLogger(__name__)
_PLACES = np.dtype(np.int64)


@dataclass(frozen=True)
class Cache:
    """Where packings are kept, and who writes them.

    Attributes:
      folder: on a local disk; created if needed.
      writer: whether this process does; the others wait for it.
      full_check: whether every byte is compared with what was stored.
    """

    folder: Path
    writer: bool
    full_check: bool = False


@functools.lru_cache(maxsize=64)  # held-out losses open theirs again and again
def open_packing(
    stream: Binidx, begin: int, end: int, seq_len: int, align: int, seed: int, cache: Cache
) -> Binidx:
    """The packing of begin..end of a stream, from the cache or put into it now.

    Args:
      stream: documents; those that begin or end outside are cut there, empty ones left out.
      begin: first token.
      end: behind the last token, above `begin`.
      seq_len: positions of a window.
      align: pieces start at multiples of it; divides seq_len.
      seed: of the order of pieces of equal length, and of those of a window.
      cache: where it is kept.

    Returns:
      Windows as "documents"; the tokens of one are the starts of its pieces in the stream.

    Raises:
      ConfigError: a cache that can't be written, or does not hold what was stored.
    """
    documents = hashlib.sha256(np.ascontiguousarray(stream.sizes)).hexdigest()
    key = f"{PACKING} {documents} {begin} {end} {seq_len} {align} {seed}"
    name = f"packing-{seq_len}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    prefix = cache.folder / name

    def make() -> None:
        index = binidx_file(prefix, "idx")
        if is_complete(index):
            return
        try:
            cache.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(index.with_suffix(".lock")):
                if not is_complete(index):  # no other process was first
                    _write(
                        prefix, *packed(*pieces(stream, begin, end, seq_len), seq_len, align, seed)
                    )
        except OSError as error:
            raise ConfigError(f"the packing of {stream.prefix} can't be stored: {error}") from error

    return open_stored(
        prefix,
        make,
        writer=cache.writer,
        full_check=cache.full_check,
        remedy=f"remove {prefix}.* and the documents are packed again",
    )


def _write(prefix: Path, starts: np.ndarray, counts: np.ndarray) -> None:
    remove_old(prefix)
    with new_file(binidx_file(prefix, "bin")) as file:
        file.write(starts.astype(_PLACES).tobytes())
    finish(prefix, counts, _PLACES)


def pieces(stream: Binidx, begin: int, end: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length, int64 [N] each, of the pieces of all documents, in their order."""
    low = np.maximum(stream.starts, begin)
    high = np.minimum(stream.starts + stream.sizes, end)
    low, high = low[high > low], high[high > low]
    count = -(-(high - low) // seq_len)  # of each document
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    starts = np.repeat(low, count) + number * seq_len
    return starts, np.minimum(np.repeat(high, count) - starts, seq_len)


def packed(
    starts: np.ndarray, sizes: np.ndarray, seq_len: int, align: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Packs pieces into windows.

    Args:
      starts: int64 [N], place of each piece in the stream.
      sizes: int64 [N], 1 to seq_len tokens.
      seq_len: positions of a window.
      align: pieces start at multiples of it.
      seed: of all that is random.

    Returns:
      The starts again, window after window, int64 [N]; and the pieces of each window, int64 [W].
    """
    order = np.random.default_rng(seed).permutation(len(sizes))
    window, count = best_fit(-(-sizes[order] // align), seq_len // align)
    by_window = order[np.argsort(window, kind="stable")]
    return starts[by_window], np.bincount(window, minlength=count)


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the longest item first, each into the fullest bin that holds it.

    Bins with equal room are kept together, and all items of a size are placed at once: a bin of
    room r takes r // size of them before one with more room takes any. So there is a step for each
    size and each amount of room that it meets, and not one for each item.

    Args:
      sizes: int64 [N], 1 to capacity.
      capacity: of every bin.

    Returns:
      The bin of each item, int64 [N], and the number of bins.
    """
    order = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    bins = np.empty(len(sizes), np.int64)
    groups: list[list[np.ndarray]] = [[] for _ in range(capacity)]  # of open bins, by their room
    with_room = bytearray(capacity)  # 1 where there is a group
    opened = placed = 0

    def put(room: int, group: np.ndarray) -> None:
        if room and len(group):
            groups[room].append(group)
            with_room[room] = 1

    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        items, placed = order[placed : placed + count], placed + count
        while len(items):
            room = with_room.find(1, size)
            if room < 0:
                room = capacity
                group = np.arange(opened, opened - (-len(items) // (capacity // size)))
                opened += len(group)
            else:
                group = groups[room].pop()
                with_room[room] = bool(groups[room])
            each = room // size
            group, rest = np.split(group, [-(-len(items) // each)])
            taken = np.repeat(group, each)[: len(items)]
            bins[items[: len(taken)]] = taken
            last = len(taken) - each * (len(group) - 1)  # items of the last bin
            put(room, rest)
            put(room - each * size, group[:-1])
            put(room - last * size, group[-1:])
            items = items[len(taken) :]
    return bins, opened

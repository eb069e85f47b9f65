"""Training samples by number: the leaves of the input pipeline.

Every class here is a random-access source in the sense of grain: a length, and item i as a pure
function of i. They pickle small, since worker processes get copies of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rwkvx_jax.config import ConfigError, Targets
from rwkvx_jax.data.binidx import Binidx
from rwkvx_jax.tasks.documents import Document
from rwkvx_jax.tokenizer import Tokenizer

# {"tokens": int32 [S + 1], "mask": float32 [S]}, and "segment_ids": int32 [S] where several
# documents of a sample do not see each other
Sample = dict[str, np.ndarray]


@dataclass(frozen=True)
class Windows:
    """Fixed windows of a token stream, across document boundaries.

    Window w starts at token begin + w * seq_len and shares its last target with the first input
    of the next one. With `reset`, samples have segment ids, 1, 2, ... for the documents of a
    window, and no document's last token has a target.
    """

    stream: Binidx
    begin: int
    end: int
    seq_len: int
    reset: bool = False

    def __len__(self) -> int:
        return max(0, self.end - self.begin - 1) // self.seq_len

    def __getitem__(self, index: int) -> Sample:
        start = self.first_token(index)
        sample = {
            "tokens": self.stream.read(start, self.seq_len + 1),
            "mask": self.stream.read_mask(start + 1, self.seq_len),
        }
        if not self.reset:
            return sample
        # Documents of no tokens begin where the next one does, and count once.
        begins = self.stream.starts
        found = np.searchsorted(begins, (start, start + self.seq_len), side="right")
        borders = np.unique(begins[slice(*found)]) - start  # from 1 to seq_len
        places = np.arange(self.seq_len)
        ids = 1 + np.searchsorted(borders, places, side="right")
        sample["mask"] = np.where(np.isin(places + 1, borders), 0, sample["mask"]).astype(
            np.float32
        )
        return {**sample, "segment_ids": ids.astype(np.int32)}

    def has_targets(self) -> np.ndarray:
        """Whether any token of each sample counts in the loss, bool [N]."""
        begins = self.begin + 1 + self.seq_len * np.arange(len(self), dtype=np.int64)
        return self.stream.has_targets(begins, begins + self.seq_len)

    def first_token(self, index: int) -> int:
        """Place of a sample's first token in the stream."""
        return self.begin + index * self.seq_len

    def filled(self, index: int) -> int:
        """Positions of a sample before its padding begins."""
        return self.seq_len


@dataclass(frozen=True)
class Documents:
    """Documents that lie wholly in begin..end of the stream, each a sample of its own.

    A longer one is cut; a shorter one is filled up with token 0, which does not count in the loss.
    """

    stream: Binidx
    begin: int
    end: int
    seq_len: int

    def __post_init__(self):
        starts, sizes = self.stream.starts, self.stream.sizes
        first = int(np.searchsorted(starts, self.begin))
        last = int(np.searchsorted(starts + sizes, self.end, side="right"))
        object.__setattr__(self, "_first", first)
        object.__setattr__(self, "_count", max(0, last - first))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        document = self._first + index
        start = int(self.stream.starts[document])
        size = min(int(self.stream.sizes[document]), self.seq_len + 1)
        tokens = np.full(self.seq_len + 1, Tokenizer.end_of_document, np.int32)
        mask = np.zeros(self.seq_len, np.float32)
        tokens[:size] = self.stream.read(start, size)
        if size > 1:
            mask[: size - 1] = self.stream.read_mask(start + 1, size - 1)
        return {"tokens": tokens, "mask": mask}

    def has_targets(self) -> np.ndarray:
        """Whether any token of each sample counts in the loss, bool [N]."""
        which = slice(self._first, self._first + self._count)
        starts, sizes = self.stream.starts[which], self.stream.sizes[which]
        return self.stream.has_targets(starts + 1, starts + np.clip(sizes, 1, self.seq_len + 1))

    def first_token(self, index: int) -> int:
        """Place of a sample's first token in the stream."""
        return int(self.stream.starts[self._first + index])

    def filled(self, index: int) -> int:
        """Positions of a sample before its padding begins."""
        return min(int(self.stream.sizes[self._first + index]), self.seq_len)


@dataclass(frozen=True)
class Packed:
    """Windows of whole documents side by side, as a packing says; no token is left out.

    The inputs of a window are its documents, which start at multiples of `align` and have the
    segment ids 1, 2, ...; the rest is token 0, of segment 0. A position counts in the loss if the
    next token is one of the same document. Behind a piece of a longer document comes that
    document's next token, which is only a target here, and the first input of the next piece. So in
    an epoch each token is an input once, and each but the first of a document a target once.
    """

    stream: Binidx
    windows: Binidx  # see packing.py
    begin: int
    end: int  # documents that go on behind it are cut there
    seq_len: int
    align: int

    def __len__(self) -> int:
        return len(self.windows.sizes)

    def __str__(self) -> str:
        return (
            f"{len(self.windows):,} documents, or pieces of longer ones, packed into {len(self):,} "
            f"windows of {self.seq_len:,} tokens, {100 * self.padding:.2f} % padding"
        )

    @property
    def padding(self) -> float:
        """Share of the positions of all windows that hold no document."""
        return 1 - (self.end - self.begin) / (len(self) * self.seq_len)

    def __getitem__(self, index: int) -> Sample:
        tokens = np.full(self.seq_len + 1, Tokenizer.end_of_document, np.int32)
        mask = np.zeros(self.seq_len, np.float32)
        segment_ids = np.zeros(self.seq_len, np.int32)
        starts = self._starts(int(self.windows.starts[index]), int(self.windows.sizes[index]))
        place = 0
        for number, (start, left) in enumerate(zip(starts, self._left(starts), strict=True), 1):
            size, count = min(left, self.seq_len), min(left, self.seq_len + 1)
            tokens[place : place + count] = self.stream.read(start, count)
            if count > 1:
                mask[place : place + count - 1] = self.stream.read_mask(start + 1, count - 1)
            segment_ids[place : place + size] = number
            place += -(-size // self.align) * self.align
        return {"tokens": tokens, "mask": mask, "segment_ids": segment_ids}

    def _starts(self, first: int, count: int) -> np.ndarray:
        """Places of some pieces in the stream, in the order of the packing."""
        return self.windows.read(first, count, np.int64)

    def _left(self, starts: np.ndarray) -> np.ndarray:
        """Tokens from each place to the end of its document."""
        document = np.searchsorted(self.stream.starts, starts, side="right") - 1
        ends = self.stream.starts[document] + self.stream.sizes[document]
        return np.minimum(ends, self.end) - starts

    def has_targets(self) -> np.ndarray:
        """Whether any token of each sample counts in the loss, bool [N]."""
        starts = self._starts(0, len(self.windows))
        order = np.argsort(starts)
        starts, window = starts[order], np.repeat(np.arange(len(self)), self.windows.sizes)[order]
        ends = starts + np.minimum(self._left(starts), self.seq_len + 1)
        found = np.zeros(len(self), bool)
        found[window[self.stream.has_targets(starts + 1, ends)]] = True
        return found

    def first_token(self, index: int) -> int:
        """Place of a sample's first token in the stream."""
        return int(self._starts(int(self.windows.starts[index]), 1)[0])


@dataclass(frozen=True)
class OneSegment:
    """Other samples among packed ones: all of a text is segment 1, its padding segment 0."""

    samples: Windows | Documents | Synthetic

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        places = np.arange(len(sample["mask"]))
        return {**sample, "segment_ids": (places < self.samples.filled(index)).astype(np.int32)}


@dataclass(frozen=True)
class Synthetic:
    """Documents made on the fly, one a window.

    make: generator -> document of seq_len + 1 tokens; picklable.
    targets: what counts in the loss: "all" tokens alike, the "answers" alone, or "balanced": the
      answers together as much as all other tokens together.
    """

    make: Callable[[np.random.Generator], Document]
    seq_len: int
    seed: int
    targets: Targets = "all"

    def __post_init__(self):
        self[0]  # a window that is too short fails here

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, index: int) -> Sample:
        tokens, answers = self.make(np.random.default_rng([self.seed, index]))
        return {"tokens": tokens, "mask": _weights(answers[1:], self.targets)}

    def filled(self, index: int) -> int:
        """Positions of a sample before its padding begins."""
        return self.seq_len


def _weights(answers: np.ndarray, targets: Targets) -> np.ndarray:
    """Weights of the targets in the loss, float32 [S]; "balanced" ones sum to S as "all" do, and
    are those of "all" in a window without any answer."""
    if targets == "answers":
        return answers.astype(np.float32)
    count, size = int(answers.sum()), len(answers)
    if targets == "all" or count in (0, size):
        return np.ones(size, np.float32)
    return np.where(answers, size / 2 / count, size / 2 / (size - count)).astype(np.float32)


@dataclass(frozen=True)
class Pieces:
    """Pieces of begin..end of a token stream, starting anywhere; ends of documents stay in."""

    stream: Binidx
    begin: int
    end: int

    def __call__(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """A random piece of `count` tokens, int32 [count].

        Raises:
          ConfigError: fewer tokens than that.
        """
        if (room := self.end - self.begin - count) < 0:
            raise ConfigError(
                f"a document made in books needs {count} tokens of text in one piece, and there "
                f"are {self.end - self.begin}: give it more text, raise data.held_out if the "
                "held-out part is meant, or shorten the stage"
            )
        return self.stream.read(self.begin + int(rng.integers(room + 1)), count)


class MagicOrder:
    """Windows in the order of the original trainers: cubes modulo a prime.

    "rwkvx": window i^3 mod p; "rwkv_lm": window floor(p (sqrt 5 - 1) / 2) (i + 1)^3 mod p. p is
    the largest prime below the number of windows with p mod 3 = 2, for which cubing is a
    permutation; the few windows from p on are never read.
    """

    def __init__(self, windows: Windows, rule: Literal["rwkvx", "rwkv_lm"]):
        self._windows = windows
        self._prime = magic_prime(windows.end - windows.begin, windows.seq_len)
        golden = int(self._prime * (math.sqrt(5) - 1) / 2)
        self._factor, self._shift = (1, 0) if rule == "rwkvx" else (golden, 1)

    def __len__(self) -> int:
        return self._prime

    def __getitem__(self, index: int) -> Sample:
        return self._windows[self.window(index)]

    def window(self, index: int) -> int:
        """Number of the window that is read at an index."""
        return self._factor * (index + self._shift) ** 3 % self._prime


def magic_prime(tokens: int, seq_len: int) -> int:
    """The largest prime p below tokens / seq_len - 1 with p mod 3 = 2.

    Raises:
      ConfigError: fewer than four windows: there is none.
    """
    candidate = math.ceil(tokens / seq_len - 1) - 1
    while candidate >= 2:
        if candidate % 3 == 2 and _is_prime(candidate):
            return candidate
        candidate -= 1
    raise ConfigError(f"{tokens} tokens are too few windows of {seq_len} for the magic-prime order")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))

"""Requests of many lengths in one compiled shape, with what several of them begin with read once.

The answers to one question share its text, the questions behind one set of examples share those. A
`Group` is such a prefix with everything that continues it. A call of the device reads `lanes` texts
side by side, step by step, so many tokens of each a step; a lane that has finished a continuation
goes back to the end of its prefix for the next one, or begins another group. So nothing is padded
but the last step of each text.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ALTERNATIVES = 4
"""Different tokens whose probabilities are asked for at one place."""
_MOST_ROWS = 32  # continuations of one prefix: one lane reads them all
# Sharing must save more tokens than this: each continuation ends in a partly filled step.
_ROW_COST = 8
_STEPS = 32  # of a call, about: its answers are written before the next one's

Request = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Row:
    """Tokens to read, and the requests that are answered by it.

    inputs: context and continuation, without the last token. requests: (number, where its
    continuation begins in inputs + last token, the continuation).
    """

    inputs: tuple[int, ...]
    requests: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)


class Group(NamedTuple):
    """Rows that begin alike."""

    shared: int  # tokens that are read once
    rows: list[Row]

    def texts(self) -> list[tuple[int, ...]]:
        """What is read one after the other: the shared tokens, and all that goes on behind them."""
        rests = [row.inputs[self.shared :] for row in self.rows]
        return [self.rows[0].inputs[: self.shared], *filter(None, rests)]

    def steps(self, width: int) -> int:
        """How often a lane reads `width` tokens for it."""
        return sum(-(-len(text) // width) for text in self.texts())


def group_rows(requests: Sequence[Request]) -> list[Group]:
    """Groups for (context tokens, continuation tokens), neither empty, such that the fewest tokens
    are read."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        targets = tuple(map(int, continuation))
        inputs = (*map(int, context), *targets[:-1])
        row = rows.setdefault(inputs, Row(inputs))
        row.requests.append((number, len(context), targets))
    # In this order those that share most are neighbours, so groups are intervals.
    ordered = [rows[inputs] for inputs in sorted(rows)]
    common = [0] + [_common(a.inputs, b.inputs) for a, b in zip(ordered, ordered[1:], strict=False)]
    cost, first, shared = [0.0], [0], [0]  # of the best grouping of the first i rows
    for end in range(1, len(ordered) + 1):
        length = len(ordered[end - 1].inputs)
        best, least, total = (cost[end - 1] + length, end - 1, length), length, length
        for begin in range(end - 2, max(-1, end - 1 - _MOST_ROWS), -1):
            least = min(least, common[begin + 1])
            if least <= _ROW_COST:
                break
            length = len(ordered[begin].inputs)
            total += length
            count = end - begin
            whole = cost[begin] + total - least * (count - 1) + _ROW_COST * count
            if whole < best[0]:
                best = whole, begin, least
        cost.append(best[0])
        first.append(best[1])
        shared.append(best[2])
    groups, end = [], len(ordered)
    while end:
        groups.append(Group(shared[end], ordered[first[end] : end]))
        end = first[end]
    return groups[::-1]


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that both begin with."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return int(np.argmax(np.asarray(a[:size]) != np.asarray(b[:size])))


Call = list[list[Group]]
"""The groups of each lane."""


def plan_calls(groups: Sequence[Group], lanes: int, width: int) -> list[Call]:
    """Groups spread over calls of so many lanes, all lanes of a call nearly equally long; those
    with the most steps first."""
    sizes = [group.steps(width) for group in groups]
    count = max(1, round(sum(sizes) / (lanes * _STEPS)))
    filled = [(0, i, []) for i in range(lanes * count)]
    for i in sorted(range(len(groups)), key=lambda i: -sizes[i]):  # the longest first
        load, number, own = heapq.heappop(filled)
        own.append(groups[i])
        heapq.heappush(filled, (load + sizes[i], number, own))
    filled.sort(key=lambda lane: (-lane[0], lane[1]))
    ordered = [own for _, _, own in filled if own]
    return [ordered[i : i + lanes] for i in range(0, len(ordered), lanes)]


class Sizes(NamedTuple):
    """Of the arrays of every call: tokens a step, lanes, steps, and places (see `Packed`)."""

    width: int
    lanes: int
    steps: int
    places: int


def common_sizes(calls: Sequence[Call], lanes: int, width: int) -> Sizes:
    """Sizes that hold each of the calls."""
    steps = max(sum(group.steps(width) for group in lane) for call in calls for lane in call)
    asked = lambda group: sum(len(t) for row in group.rows for _, _, t in row.requests)
    places = max(sum(asked(group) for lane in call for group in lane) for call in calls)
    return Sizes(width, lanes, steps, places)


class Packed(NamedTuple):
    """A call as arrays, int32.

    Step i reads lengths[i] of tokens[i] in each lane, from where the last step ended, or from the
    kept state where `back`, or from nothing where `fresh`; the state after it is kept where `keep`.
    Probabilities are asked for of targets [places, ALTERNATIVES], each after reading up to one of
    `places`: indices into tokens, flattened. The first `step_count` and `place_count` matter.
    """

    tokens: np.ndarray  # [steps, lanes, width]
    lengths: np.ndarray  # [steps, lanes]
    back: np.ndarray  # [steps, lanes] bool
    fresh: np.ndarray  # [steps, lanes] bool
    keep: np.ndarray  # [steps, lanes] bool
    places: np.ndarray
    targets: np.ndarray
    step_count: np.ndarray
    place_count: np.ndarray


class Asked(NamedTuple):
    """Where the tokens of each request's continuation are in `Packed.targets`: indices into the
    flattened array, one request's behind the other's."""

    requests: list[int]
    begins: list[int]
    indices: np.ndarray


def pack(call: Call, sizes: Sizes) -> tuple[Packed, Asked]:
    """Arrays of a call, and how its requests are answered by them."""
    width, lanes, steps, _ = sizes
    tokens = np.zeros((steps, lanes, width), np.int32)
    lengths = np.zeros((steps, lanes), np.int32)
    back, fresh, keep = np.zeros((3, steps, lanes), bool)
    at, targets, requests, begins, asked, longest = [], [], [], [], 0, 0

    def read(text: Sequence[int], lane: int, step: int) -> tuple[np.ndarray, int]:
        """Places of a text's tokens, and the step behind it."""
        for start in range(0, len(text), width):
            cut = text[start : start + width]
            tokens[step, lane, : len(cut)], lengths[step, lane] = cut, len(cut)
            step += 1
        index = np.arange(len(text)) + (step - -(-len(text) // width)) * width
        return (index // width * lanes + lane) * width + index % width, step

    for lane, groups in enumerate(call):
        step = 0
        for shared, rows in groups:
            fresh[step, lane] = True
            head, step = read(rows[0].inputs[:shared], lane, step)
            keep[step - 1, lane] = True
            for row in rows:
                own = head
                if rest := row.inputs[shared:]:
                    back[step, lane] = True
                    behind, step = read(rest, lane, step)
                    own = np.concatenate([head, behind])
                for number, begin, continuation in row.requests:
                    requests.append(number)
                    begins.append(asked)
                    at.append(own[begin - 1 :])
                    targets += continuation
                    asked += len(continuation)
        longest = max(longest, step)
    places, wanted, count, indices = _distinct(np.concatenate(at), targets, sizes.places)
    counts = np.asarray(longest, np.int32), np.asarray(count, np.int32)
    packed = Packed(tokens, lengths, back, fresh, keep, places, wanted, *counts)
    return packed, Asked(requests, begins, indices)


def _distinct(
    at: np.ndarray, targets: Sequence[int], most: int
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Each place and token once: places [most], targets [most, ALTERNATIVES], how many of these
    lines are used, and where each of the given pairs is among the targets."""
    pairs, inverse = np.unique(np.stack([at, targets]), axis=1, return_inverse=True)
    starts = np.flatnonzero(np.diff(pairs[0], prepend=-1))
    rank = np.arange(pairs.shape[1]) - np.repeat(starts, np.diff([*starts, pairs.shape[1]]))
    line, column = np.cumsum(rank % ALTERNATIVES == 0) - 1, rank % ALTERNATIVES
    places, wanted = np.zeros(most, np.int32), np.zeros((most, ALTERNATIVES), np.int32)
    places[line], wanted[line, column] = pairs
    return places, wanted, line[-1] + 1, (line * ALTERNATIVES + column)[inverse.reshape(-1)]

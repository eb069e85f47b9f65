"""Requests of many lengths in few compiled shapes: shared rows, and classes of size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

MAX_SIZES = 8
"""Compiled shapes of one evaluation, at most."""
ALTERNATIVES = 8
"""Last tokens that one row answers at once."""
_STEP = 16  # sizes are multiples of it


@dataclass
class Row:
    """An input, and the requests that are answered by reading it once.

    They differ in their last token only: several one-letter answers to one question are one row.

    Attributes:
      inputs: tokens to read, the last token of the continuation left out.
      context: how many of them are the context.
      lasts: last tokens of the continuations.
      owners: numbers of the requests, one for each of `lasts`.
    """

    inputs: tuple[int, ...]
    context: int
    lasts: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    @property
    def fixed(self) -> tuple[int, ...]:
        """The continuation without its last token."""
        return self.inputs[self.context :]


def group_rows(requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
    """Rows for (context tokens, continuation tokens), neither empty."""
    open_rows: dict[tuple, Row] = {}
    rows = []
    for number, (context, continuation) in enumerate(requests):
        inputs = (*map(int, context), *map(int, continuation[:-1]))
        row = open_rows.get(key := (len(context), inputs))
        if row is None or len(row.lasts) == ALTERNATIVES:
            row = open_rows[key] = Row(inputs, len(context))
            rows.append(row)
        row.lasts.append(int(continuation[-1]))
        row.owners.append(number)
    return rows


def size_classes(lengths: Sequence[int], most: int) -> list[int]:
    """At most `most` sizes, ascending, such that padding every length to the next one costs the
    fewest tokens (up to rounding to multiples of 16)."""
    sizes, counts = np.unique(-(-np.asarray(lengths) // _STEP) * _STEP, return_counts=True)
    n = len(sizes)
    below = np.concatenate([[0], np.cumsum(counts)])  # rows of size class < i
    cost = np.full(n + 1, np.inf)
    cost[0] = 0
    choices = []
    for _ in range(min(most, n)):
        # The class that ends with sizes[j] begins with sizes[i]: its rows cost sizes[j] each.
        total = cost[:n, None] + (below[None, 1:] - below[:n, None]) * sizes[None]
        total = np.where(np.arange(n)[:, None] <= np.arange(n)[None], total, np.inf)
        choices.append(total.argmin(0))
        cost = np.concatenate([[np.inf], total.min(0)])
    end, chosen = n, []
    for choice in reversed(choices):
        chosen.append(int(sizes[end - 1]))
        end = int(choice[end - 1])
    return sorted(chosen)


class Batch(NamedTuple):
    """Rows of one shape: `size` tokens each, `height` of them when padded."""

    size: int
    height: int
    fixed: int  # most fixed targets of a row of this size
    rows: list[Row]


def plan_batches(rows: Sequence[Row], tokens: int, height: int | None = None) -> list[Batch]:
    """Batches in ascending size, all of one size with one shape.

    Args:
      rows: in any order.
      tokens: a batch reads at most so many, padding included (a single row may read more).
      height: rows of a batch instead.
    """
    classes = size_classes([len(row.inputs) for row in rows], MAX_SIZES)
    batches = []
    for below, size in zip([0, *classes], classes, strict=False):
        own = [row for row in rows if below < len(row.inputs) <= size]
        tall = min(len(own), height or max(1, tokens // size))
        fixed = max(len(row.fixed) for row in own)
        batches += [Batch(size, tall, fixed, own[i : i + tall]) for i in range(0, len(own), tall)]
    return batches

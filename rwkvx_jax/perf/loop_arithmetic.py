"""The integer operations of HLO, and how often a loop with a counter and a bound runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "LT": lambda x, y: x < y,
    "LE": lambda x, y: x <= y,
    "GT": lambda x, y: x > y,
    "GE": lambda x, y: x >= y,
    "EQ": lambda x, y: x == y,
    "NE": lambda x, y: x != y,
}
MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}
INTEGER: Mapping[str, Callable[..., int]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: int(x / y) if y else 0,
    "remainder": lambda x, y: int(math.fmod(x, y)) if y else 0,
    "minimum": min,
    "maximum": max,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "not": lambda x: int(not x),
    "negate": lambda x: -x,
    "abs": abs,
    "sign": lambda x: (x > 0) - (x < 0),
    "clamp": lambda low, x, high: max(low, min(x, high)),
    "select": lambda condition, x, y: x if condition else y,
    "shift-left": lambda x, y: x << y,
    "shift-right-logical": lambda x, y: (x & 0xFFFFFFFF) >> y,
    "shift-right-arithmetic": lambda x, y: x >> y,
}


class Unknown(Exception):
    """A value that depends on data, or on an operation that is not followed."""


@dataclasses.dataclass(frozen=True)
class Counter:
    """The counter of a loop: element of the carried tuple, start, step, and the test to go on."""

    index: int
    start: int
    step: int
    direction: str
    bound: int

    @property
    def count(self) -> int:
        if self.step == 0:
            raise Unknown
        if self.direction == "NE":
            steps, rest = divmod(self.bound - self.start, self.step)
            if rest or steps < 0:
                raise Unknown
            return steps
        if self.direction == "EQ" or (self.step > 0) != (self.direction in ("LT", "LE")):
            raise Unknown
        inclusive = self.direction in ("LE", "GE")
        distance = (self.bound - self.start) * (1 if self.step > 0 else -1) + inclusive
        return max(0, math.ceil(distance / abs(self.step)))


def literal(text: str, at: int | None) -> int:
    """An entry of a constant as the text gives it: "5", "true", "{0, 1, 2}"."""
    words = {"true": 1, "false": 0}
    entries = [part.strip() for part in text.strip("{}").split(",")]
    try:
        entry = entries[0 if at is None else min(at, len(entries) - 1)]
        return words[entry] if entry in words else int(entry)
    except ValueError as error:
        raise Unknown from error

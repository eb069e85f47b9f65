"""Wall-clock figures of a run: of the steps since the last line, and over all its starts.

Goodput is the share of the time since the run began, stops and restarts included, that went into
steps whose results it still has: not into compiling, saving, evaluating, waiting to be started
again, steps that were skipped, and steps that had to be made again.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np


class RunClock:
    """What `timing.jsonl` says; see docs/training.md for its fields."""

    def __init__(self, before: Mapping[str, Any] | None, peak: float | None):
        """Starts, or goes on.

        Args:
          before: the line of the step that the run goes on from; None: there is none.
          peak: of all devices together, flop/s; None: not known, which leaves `mfu` out.
        """
        before = before or {"time": time.time(), "wall_seconds": 0.0, "productive_seconds": 0.0}
        self._began = before["time"] - before["wall_seconds"]
        self._productive = before["productive_seconds"]
        self._peak = peak
        self._start_window()

    def _start_window(self) -> None:
        self._steps: list[float] = []  # seconds of each
        self._first_steps: list[float] = []  # of those that compiled
        self._other: dict[str, float] = {}  # seconds by what they were spent on

    def start_stage(self, tokens: int, flops: float) -> None:
        """From here on a step takes in so many tokens and needs so many products."""
        self._tokens, self._flops = tokens, flops

    def step(self, seconds: float, compiling: float, kept: bool) -> None:
        """A step took `seconds`, `compiling` of them before it ran; `kept`: it was not skipped."""
        (self._first_steps if compiling else self._steps).append(seconds)
        if kept:
            self._productive += seconds - compiling
        self._spend("compile", compiling)

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Counts what is done inside as `<what>_seconds`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spend(what, time.perf_counter() - begin)

    def _spend(self, what: str, seconds: float) -> None:
        if seconds:
            name = f"{what}_seconds"
            self._other[name] = self._other.get(name, 0.0) + seconds

    def line(self) -> dict[str, float]:
        """What happened since the last line, and the totals."""
        values = {}
        # Steps that compiled say little about the others: only where there are no others.
        if steps := self._steps or self._first_steps:
            values["step_seconds"] = steps[-1]
            for percent in (50, 90, 99):
                values[f"step_seconds_p{percent}"] = float(np.percentile(steps, percent))
            values["tokens_per_second"] = self._tokens * len(steps) / sum(steps)
            if self._peak is not None:
                values["mfu"] = self._flops * len(steps) / sum(steps) / self._peak
        values |= self._other
        self._start_window()
        return {**values, **self.totals()}

    def totals(self) -> dict[str, float]:
        """Over the whole run; `time` is in seconds since 1970."""
        now = time.time()
        wall = max(now - self._began, self._productive)  # a clock that was put back
        goodput = self._productive / wall if wall else 0.0
        return {
            "time": now,
            "wall_seconds": wall,
            "productive_seconds": self._productive,
            "goodput": goodput,
        }

    def summary(self) -> str:
        """The totals for people."""
        totals = self.totals()
        wall = datetime.timedelta(seconds=round(totals["wall_seconds"]))
        return f"{wall} h since the run began, {totals['goodput']:.0%} of it in steps (goodput)"

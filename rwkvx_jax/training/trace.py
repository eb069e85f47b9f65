"""Traces of a few training steps for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import jax

from rwkvx_jax.config import RunConfig
from rwkvx_jax.training.step import TrainState


class Trace:
    """Writes the trace of `run.profile_steps`; it may begin late, after a resume, and end early."""

    def __init__(self, config: RunConfig, workdir: Path):
        self._first, self._end = config.profile_range() or (0, 0)
        self._directory = str(workdir / "tensorboard")
        self._open = False

    def before(self, step: int) -> None:
        """To be called before step `step`, counted from 0."""
        if self._first <= step < self._end and not self._open:
            jax.profiler.start_trace(self._directory)
            self._open = True

    def after(self, step: int, state: TrainState) -> None:
        """To be called after step `step` with what it made."""
        if step + 1 == self._end and self._open:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False

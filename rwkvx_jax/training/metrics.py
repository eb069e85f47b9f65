"""What a run reports: metrics.jsonl, timing.jsonl, and TensorBoard.

`metrics.jsonl` holds only what the computation determines, so that an interrupted run leaves the
same bytes as an undisturbed one; wall-clock figures go to `timing.jsonl`. On resume both are cut
back to the restored step. Their lock is that of the work directory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvx_jax.records import RecordFile, cut_back, last_with
from rwkvx_jax.storage import in_bucket
from rwkvx_jax.training.board import Board
from rwkvx_jax.training.uploads import BucketLines

TASKS = "eval_tasks"
"""Field of a record: how many tasks have given its values."""


def _timing_tag(name: str) -> str:
    """What TensorBoard calls a field of timing.jsonl."""
    if "_seconds" in name:
        return "time/" + name.replace("_seconds", "")
    return f"perf/{name}"


class MetricsWriter:
    """Writes records of process 0; other processes get an inert one (`active=False`).

    Files for TensorBoard are written on disks only, not into buckets.
    """

    def __init__(self, workdir: Path, *, active: bool):
        self._workdir, self._active = workdir, active
        self._board: Board | None = None
        self.before: dict[str, Any] | None = None  # last record of timing.jsonl with totals
        self.tasks_step: int | None = None  # of the last record with values of tasks

    def open(self, resume_step: int, config: str = "") -> None:
        """To be called first; drops what was said of steps beyond `resume_step`.

        Args:
          resume_step: that the run goes on from; 0 at its beginning.
          config: a text for TensorBoard.

        Raises:
          OSError: the files can't be written.
        """
        if not self._active:
            return
        workdir = self._workdir
        paths = [workdir / "metrics.jsonl", workdir / "timing.jsonl"]
        for path in paths:
            cut_back(path, resume_step)
        self.before = last_with(paths[1], "wall_seconds")
        self.tasks_step = (last_with(paths[0], TASKS) or {}).get("step")
        if not in_bucket(workdir):
            for path in paths:
                path.open("a").close()  # an error now, not after the first step
        kind = BucketLines if in_bucket(workdir) else RecordFile
        self._metrics, self._timing = map(kind, paths)
        if not in_bucket(workdir):
            self._board = Board(workdir / "tensorboard", purge_step=resume_step + 1)
            self._board.add_text(resume_step + 1, "config", f"```\n{config}```")

    def write(self, step: int, stage: str, values: dict[str, float], *, group: str) -> None:
        """One record of metrics.jsonl; its scalars for TensorBoard are called `group/NAME`."""
        self._write("_metrics", {"step": step, "stage": stage, **values}, lambda x: f"{group}/{x}")

    def write_timing(self, step: int, values: dict[str, float]) -> None:
        """One record of timing.jsonl; for TensorBoard seconds are `time/...`, others `perf/...`."""
        self._write("_timing", {"step": step, **values}, _timing_tag)

    def _write(self, name: str, record: dict[str, Any], tag: Callable[[str], str]) -> None:
        if not self._active:
            return
        # JSON knows no NaN and no infinity.
        known = lambda value: not isinstance(value, float) or math.isfinite(value)
        record = {key: value if known(value) else None for key, value in record.items()}
        getattr(self, name).append([record])
        if self._board is not None:
            scalars = {
                tag(key): value
                for key, value in record.items()
                if isinstance(value, int | float) and key not in ("step", "time", TASKS)
            }
            self._board.add(record["step"], scalars)

    def upload(self) -> None:
        """To be called with each checkpoint: what it continues from has to be there as well."""
        if self._active:
            self._metrics.upload()
            self._timing.upload()

    def close(self) -> None:
        if self._active:
            self._metrics.upload(last=True)
            self._timing.upload(last=True)
        if self._board is not None:
            self._board.close()

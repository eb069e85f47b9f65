"""What a run reports: metrics.jsonl, timing.jsonl, and TensorBoard.

`metrics.jsonl` holds only what the computation determines, so that an interrupted run leaves the
same bytes as an undisturbed one; wall-clock figures go to `timing.jsonl`. On resume both are cut
back to the restored step.
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvx_jax.storage import in_bucket, write_whole
from rwkvx_jax.training.board import Board
from rwkvx_jax.training.uploads import BucketLines

_log = logging.getLogger(__name__)


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of a jsonl file whose "step" is beyond `step`.

    A line that can't be read (of a full disk, or a machine that lost its power) is left out too,
    with a warning that says what is lost; the file as it was stays beside it.

    Raises:
      OSError: it can't be read or written.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    kept, lost, last = [], [], 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        found = _step_of(line)
        if found is not None and found > step:  # whole, or cut off by a kill
            continue
        if found is not None and line.endswith(b"\n") and _is_json(line):
            kept.append(line)
            last = found
        else:
            lost.append((number, last))
    if lost:
        _warn_of_lost_lines(path, data, lost, kept, step)
    if (new := b"".join(kept)) != data:
        write_whole(path, new)


def _step_of(line: bytes) -> int | None:
    """The step at the beginning of a record, whatever follows; None for anything else."""
    match = re.match(rb'\{"step": (\d+)[,}]', line)
    return None if match is None else int(match[1])


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _warn_of_lost_lines(
    path: Path, data: bytes, lost: list[tuple[int, int]], kept: list[bytes], step: int
) -> None:
    copies = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
    copy = next(name for name in copies if not name.exists())
    write_whole(copy, data)
    steps = sorted({_step_of(line) for line in kept} | {step + 1})
    for number, before in lost:
        after = steps[bisect.bisect_right(steps, before)]
        _log.warning(
            "%s, line %d can't be read: it is left out, and with it what it said of steps between "
            "%d and %d; the file as it was is kept as %s",
            path,
            number,
            before,
            after,
            copy.name,
        )


def _last_record(path: Path, field: str) -> dict[str, Any] | None:
    """The last record of a jsonl file that has a field; None if there is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = (json.loads(line) for line in reversed(lines))
    return next((record for record in records if field in record), None)


def _timing_tag(name: str) -> str:
    """What TensorBoard calls a field of timing.jsonl."""
    if "_seconds" in name:
        return "time/" + name.replace("_seconds", "")
    return f"perf/{name}"


class _Lines:
    """A jsonl file on a disk, to append to."""

    def __init__(self, path: Path):
        self._file = path.open("a")

    def add(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def upload(self) -> None:
        """Nothing: it is there."""

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Writes records of process 0; other processes get an inert one (`active=False`).

    Files for TensorBoard are written on disks only, not into buckets.
    """

    def __init__(self, workdir: Path, *, active: bool):
        self._workdir, self._active, self._board = workdir, active, None
        self.before: dict[str, Any] | None = None  # last record of timing.jsonl with totals

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
        self.before = _last_record(paths[1], "wall_seconds")
        kind = BucketLines if in_bucket(workdir) else _Lines
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
        getattr(self, name).add(json.dumps(record, allow_nan=False) + "\n")
        if self._board is not None:
            scalars = {
                tag(key): value
                for key, value in record.items()
                if isinstance(value, int | float) and key not in ("step", "time")
            }
            self._board.add(record["step"], scalars)

    def upload(self) -> None:
        """To be called with each checkpoint: what it continues from has to be there as well."""
        if self._active:
            self._metrics.upload()
            self._timing.upload()

    def close(self) -> None:
        if self._active:
            self._metrics.close()
            self._timing.close()
        if self._board is not None:
            self._board.close()

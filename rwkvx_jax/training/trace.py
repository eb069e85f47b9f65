"""Traces of a few training steps for TensorBoard."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import jax

from rwkvx_jax.config import RunConfig
from rwkvx_jax.storage import bucket_errors, in_bucket
from rwkvx_jax.training.step import TrainState

_log = logging.getLogger(__name__)


class Trace:
    """Writes the trace of `run.profile_steps`; it may begin late, after a resume, and end early.

    For a work directory in a bucket every host writes its trace to a temporary folder, and copies
    it there at the end.
    """

    def __init__(self, config: RunConfig, workdir: Path):
        self._first, self._end = config.profile_range() or (0, 0)
        self._target = workdir / "tensorboard"
        self._folder: Path | None = None  # where the open trace goes

    def before(self, step: int) -> None:
        """To be called before step `step`, counted from 0."""
        if self._first <= step < self._end and self._folder is None:
            local = not in_bucket(self._target)
            self._folder = self._target if local else Path(tempfile.mkdtemp(prefix="rwkvx-trace-"))
            jax.profiler.start_trace(str(self._folder))

    def after(self, step: int, state: TrainState) -> None:
        """To be called after step `step` with what it made."""
        if step + 1 == self._end and self._folder is not None:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        if in_bucket(self._target):
            _move(self._folder, self._target)
        self._folder = None


def _move(folder: Path, target: Path) -> None:
    """Files of a local folder to a bucket; where that fails they stay, and training goes on."""
    try:
        with bucket_errors(target):
            for file in folder.rglob("*"):
                if file.is_file():
                    (target / file.relative_to(folder)).write_bytes(file.read_bytes())
    except OSError as error:
        _log.warning("the trace stays in %s of this host: %s", folder, error)
    else:
        shutil.rmtree(folder)

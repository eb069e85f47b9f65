"""Checkpoints of a run whose storage may fail for a while: training goes on, and they are tried
again."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from rwkvx_jax.checkpoint_store import CheckpointFailed, Checkpoints, NotWritten
from rwkvx_jax.hosts import any_process
from rwkvx_jax.storage import make_folder

_log = logging.getLogger(__name__)

_FIRST_DELAY, _LONGEST_DELAY = 2.0, 60.0  # seconds between two attempts
_STALL = 10.0  # seconds that training waits for the checkpoint before the one that is due


class Saver:
    """Writes checkpoints, and decides when one that failed is tried again.

    A process alone tries again after 2 seconds, then 4, 8 and so on up to 60, as soon as the
    storage answers; meanwhile it does without those that are due. Several processes try again with
    the next one that is due, as all of them have to begin at the same step.
    """

    def __init__(self, checkpoints: Checkpoints, workdir: Path, patience: float):
        """For `patience` seconds after the first failure new ones are borne."""
        self._checkpoints, self._workdir, self._patience = checkpoints, workdir, patience
        self._alone = jax.process_count() == 1
        self._open = False  # a write whose end has not been seen
        self._behind = False  # one was left out, as the write before it had not ended
        self._since: float | None = None  # when writing began to fail
        self._delay, self._next = _FIRST_DELAY, 0.0
        self._probe: Future | None = None  # whether the storage answers
        self._answers = False

    def retry_due(self) -> bool:
        """Whether a checkpoint is to be saved now because an earlier one was not.

        To be asked after every step; looks at what the write in the background has come to.

        Raises:
          CheckpointFailed: for too long none could be written.
        """
        if not self._alone or (self._open and self._checkpoints.writing()):
            return False
        if self._open:
            self._settle()
        if self._since is None:
            return self._behind
        if time.monotonic() >= self._next:
            self._ask_storage()
        return self._answers

    def save(
        self, step: int, params: Any, optimizer: Any, progress: dict[str, Any], *, wait: bool
    ) -> None:
        """Begins to write a checkpoint, or leaves it out for now; see `Checkpoints.save`.

        Args:
          step: over all stages.
          params: of the model.
          optimizer: everything else of the train state.
          progress: see `checkpoint.progress_record`.
          wait: return when it is there, trying again meanwhile (the last one of a run).

        Raises:
          CheckpointFailed: a value that is not finite, or for too long none could be written.
        """
        while True:
            if self._alone and not wait and not self._can_begin(step):
                return
            if self._open:
                self._settle()
            self._answers, problem = False, None
            try:
                self._checkpoints.save(step, params, optimizer, progress)
            except NotWritten as error:
                problem = error
            self._open = not self._note(problem)
            if wait and self._open:
                self._settle()
            if not wait or self._since is None:
                return
            time.sleep(max(0.0, self._next - time.monotonic()))

    def _can_begin(self, step: int) -> bool:
        """Whether a new write would not keep training waiting."""
        end = time.monotonic() + _STALL
        while self._open and self._checkpoints.writing():
            if time.monotonic() > end:
                if not self._behind:
                    _log.warning(
                        "the checkpoint before step %d is still being written: training goes on, "
                        "and saves the next one after it",
                        step,
                    )
                self._behind = True
                return False
            time.sleep(0.02)
        if self._open:
            self._settle()
        self._behind = False
        return self._since is None or self._answers

    def _settle(self) -> None:
        """Waits for the write in the background, and notes what has become of it."""
        problem = None
        try:
            self._checkpoints.wait()
        except NotWritten as error:
            problem = error
        self._open = False
        if not self._note(problem) and self._since is not None:
            _log.warning("checkpoints can be written again")
            self._since = None

    def _note(self, problem: NotWritten | None) -> bool:
        """Whether any process has a problem; raises if there have been some for too long."""
        if not any_process(problem is not None):
            return False
        now = time.monotonic()
        if self._since is None:
            self._since, self._delay = now, _FIRST_DELAY
        problem = problem or NotWritten("another process could write no checkpoint")
        passed = now - self._since
        if any_process(passed >= self._patience):
            raise CheckpointFailed(
                f"{problem}\nThat has failed for {passed:.0f} s (run.storage_patience is "
                f"{self._patience:g})"
            ) from problem
        self._checkpoints.begin_anew()  # all processes do, or none
        again = f"in {self._delay:.0f} s" if self._alone else "with the next one that is due"
        _log.warning("%s; training goes on, trying again %s", problem, again)
        self._next, self._delay = now + self._delay, min(2 * self._delay, _LONGEST_DELAY)
        return True

    def _ask_storage(self) -> None:
        """Finds out in the background whether anything can be written, as clients of buckets keep
        whoever asks waiting for half a minute."""
        if self._probe is None:
            self._probe = _in_background(make_folder, self._workdir)
        elif self._probe.done():
            error, self._probe = self._probe.exception(), None
            self._answers = error is None
            if error is not None:
                self._note(NotWritten(str(error)))


def _in_background(act, *arguments) -> Future:
    """What a call on a thread that ends with the process comes to."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(act(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

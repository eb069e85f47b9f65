"""Ends a process that hangs, so that a supervisor can start it again.

One host of a pod whose network, storage or chip hangs makes all of them wait for ever: no error, no
progress, every chip paid for.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from rwkvx_jax.config import RunConfig

STATUS = 75  # of the process that was ended; sysexits.h: "temporary failure, try again"
_SEVERAL_HOSTS = 1800.0
_FLUSH_SECONDS = 5.0


def step_timeout(run: RunConfig) -> float:
    """Seconds after which `run` takes a step for hung; 0: never."""
    if run.step_timeout is not None:
        return run.step_timeout
    return _SEVERAL_HOSTS if jax.process_count() > 1 else 0.0


class Watchdog:
    """Looks from a thread of its own whether something was finished lately.

    It sees waiting in Python, in collectives and for data or disks; not C code that keeps the
    interpreter's lock for ever.
    """

    def __init__(self, seconds: float, stage: str, waiting_for: str):
        """Starts to watch.

        Args:
          seconds: without `finished` after which the process ends; 0: never.
          stage: for the message.
          waiting_for: what is to be finished first, for the message.
        """
        self._seconds, self._stage, self.waiting_for = seconds, stage, waiting_for
        self._last: float | None = time.monotonic()  # None: nothing is expected now
        self._stop = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def finished(self, waiting_for: str) -> None:
        """Something was finished; now something else is waited for."""
        self.waiting_for, self._last = waiting_for, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what takes as long as it takes, as compiling does."""
        self._last = None
        try:
            yield
        finally:
            self._last = time.monotonic()

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(self._seconds / 4, 10.0)):
            last = self._last
            if last is not None and time.monotonic() - last > self._seconds:
                self._end()

    def _end(self) -> None:
        text = (
            f"watchdog: host {jax.process_index()} of {jax.process_count()} "
            f"({socket.gethostname()}), stage {self._stage}: nothing was finished for "
            f"{self._seconds:g} s (run.step_timeout) while waiting for {self.waiting_for}. The "
            f"stacks of all threads follow; this process ends with status {STATUS}, and the same "
            "command continues from the newest checkpoint\n"
        )
        # Not through sys.stderr: what hangs may hold its lock.
        os.write(2, text.encode())
        faulthandler.dump_traceback(2)
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(_FLUSH_SECONDS)
        os._exit(STATUS)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()

"""Keeps a run going: `python -m tools.supervise --workdir DIR -- python train.py ...`

Starts the command again whenever it ends with an error, after a preemption of another host as
after a crash; it continues from its newest checkpoint. Ends when the command succeeds, when it
failed several times in a row without a new checkpoint, or when this process gets SIGTERM or
Ctrl-C, which the command gets too. On a pod every host runs one; each restarts its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath

_GRACE = 600.0  # seconds in which a command that was told to stop may save


@dataclass(frozen=True)
class Patience:
    """How failures are answered.

    Attributes:
      failures: runs in a row without a new checkpoint after which the supervisor gives up.
      delay: seconds before the second run; each further failure without progress doubles it.
      longest: most seconds between two runs.
    """

    failures: int = 5
    delay: float = 10.0
    longest: float = 300.0

    def pause(self, failed: int) -> float:
        """Seconds to wait after `failed` runs in a row without progress (0: there was some)."""
        return min(self.delay * 2 ** max(failed - 1, 0), self.longest)


def newest_step(workdir: str) -> int:
    """Step of the newest whole checkpoint of a work directory, local or in a bucket; -1: none."""
    folder = epath.Path(workdir) / "checkpoints"
    entries = list(folder.iterdir()) if folder.exists() else []
    steps = [entry for entry in entries if entry.name.isdecimal()]
    if "://" in workdir:  # nothing is renamed there: Orbax puts this file in at the end
        steps = [entry for entry in steps if (entry / "commit_success.txt").exists()]
    return max((int(entry.name) for entry in steps), default=-1)


class Supervisor:
    """Runs one command again and again; `stop` ends it from a signal handler."""

    def __init__(self, command: Sequence[str], workdir: str, patience: Patience):
        self._command, self._workdir, self._patience = list(command), workdir, patience
        self._child: subprocess.Popen | None = None
        self._told = False  # to stop

    def run(self) -> int:
        """Returns 0 when the command succeeded, else the status of its last run."""
        failed, best = 0, self._newest(-1)
        while True:
            status = self._once()
            if status == 0 or self._told:
                return status
            step = self._newest(best)
            failed, best = (0, step) if step > best else (failed + 1, best)
            _say(f"the command ended with status {status}; newest checkpoint: step {step}")
            if failed >= self._patience.failures:
                _say(f"{failed} runs in a row made no checkpoint: giving up; see its messages")
                return status
            pause = self._patience.pause(failed)
            _say(f"starting it again in {pause:.0f} s")
            self._wait(pause)
            if self._told:
                return status

    def _newest(self, otherwise: int) -> int:
        try:
            return newest_step(self._workdir)
        except Exception as error:  # a storage that does not answer, of whatever library
            _say(f"{self._workdir} can't be read ({error})")
            return otherwise

    def stop(self, *_) -> None:
        """Passes the wish to stop on; the command saves and ends, and is not started again."""
        self._told = True
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM)

    def _once(self) -> int:
        # A session of its own: whatever the command leaves running can be ended with it, so that
        # the next run finds the accelerator free.
        self._child = subprocess.Popen(self._command, start_new_session=True)
        if self._told:  # the signal came between two runs
            self.stop()
        deadline = None
        try:
            while True:
                try:
                    return self._child.wait(1.0)
                except subprocess.TimeoutExpired:
                    pass
                if self._told and deadline is None:
                    deadline = time.monotonic() + _GRACE
                if deadline is not None and time.monotonic() > deadline:
                    _say(f"it did not stop within {_GRACE:.0f} s and is killed")
                    return 1
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._told and time.monotonic() < end:
            time.sleep(min(0.2, seconds))


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Entry point of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.supervise", description=__doc__)
    parser.add_argument(
        "--workdir", required=True, help="work directory of the run, local or gs://"
    )
    parser.add_argument(
        "--failures", type=int, default=5, help="runs without a new checkpoint before giving up"
    )
    parser.add_argument("--delay", type=float, default=10.0, help="seconds before another run")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command to run")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command: write it behind --, as in -- python train.py --workdir DIR")
    if options.failures < 1 or not 0 <= options.delay < float("inf"):
        parser.error("--failures must be at least 1, --delay a number of seconds")
    supervisor = Supervisor(command, options.workdir, Patience(options.failures, options.delay))
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(kind, supervisor.stop)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

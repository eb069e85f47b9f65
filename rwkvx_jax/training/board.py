"""Scalars for TensorBoard, written where an error can be seen.

tensorboardX's own `SummaryWriter` writes in a thread: where that dies of a full disk, the program
waits for ever for room in its queue. Its writer of single events does not.
"""

from __future__ import annotations

import time
from pathlib import Path


class Board:
    """An event file for TensorBoard."""

    def __init__(self, directory: Path, *, purge_step: int):
        """Opens a new file; what older ones say of steps from `purge_step` on is hidden.

        Raises:
          OSError: it can't be written.
        """
        # Imported here: it takes a second, and only one process of a job writes.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar, text

        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar, self._text = Event, scalar, text
        # TensorBoard reads files in the order of their names, in which tensorboardX tells the time
        # by whole seconds only.
        self._file = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        self._file.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(step=purge_step, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars of a step.

        Raises:
          OSError: they can't be written.
        """
        for name, value in values.items():
            self._write(step, self._scalar(name, value))
        self._file.flush()

    def add_text(self, step: int, name: str, text: str) -> None:
        """Writes a text in Markdown; errors as `add`."""
        self._write(step, self._text(name, text))
        self._file.flush()

    def _write(self, step: int, summary) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

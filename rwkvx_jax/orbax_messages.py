"""What Orbax leaves behind when a read or write fails: messages and unfinished tasks."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any


def forget_frames(error: BaseException) -> None:
    """Lets go of the unfinished tasks that the frames of an error hold."""
    error.__traceback__ = error.__cause__ = error.__context__ = None


@contextlib.contextmanager
def only_our_messages() -> Iterator[None]:
    """Keeps what Orbax says of failures to itself, since all of them are raised as errors of ours.

    Where one array can't be read or written, it leaves the work on others behind, each of which
    prints a traceback of its own when it ends, from other threads.
    """

    def ours(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        orbax = record.levelno >= logging.WARNING and "orbax" in record.pathname
        expected = ("Given directory is read only", "Metadata file does not exist")
        told = record.levelno >= logging.ERROR or text.startswith(expected)
        return not (orbax and told) and "exception was never retrieved" not in text

    def unraisable(event: Any) -> None:
        left_behind = inspect.iscoroutine(event.object)
        if not left_behind and str(event.exc_value) != "Event loop is closed":
            before(event)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = sys.unraisablehook
    for logger in loggers:
        logger.addFilter(ours)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before
        for logger in loggers:
            logger.removeFilter(ours)

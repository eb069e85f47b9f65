"""A progress bar over bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

_SHOW_AFTER = 2.0  # seconds of work before a bar appears


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on the standard error, shown once the work turns out to take long.

    Args:
      label: what is done; printed as it is.
      total: bytes of the whole work.
      done: bytes that are done already.

    Yields:
      The function to call with the size of each piece that is done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    # Without markup: a path may hold square brackets.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total, completed=done)
    begin, shown = time.monotonic(), False

    def advance(size: int) -> None:
        nonlocal shown
        bar.advance(task, size)
        if not shown and time.monotonic() - begin > _SHOW_AFTER:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()

"""How far a long piece of work is: one bar for everything that takes time.

On a terminal a bar; elsewhere, as in a log file, a plain line every 10 seconds. Names are shown as
they are: square brackets in a path are no markup.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

PLAIN_LINE_SECONDS = 10.0
SHORT_SECONDS = 2.0  # of reading files: what ends sooner needs no bar


class Progress:
    """The progress of one piece of work, as a context manager.

    Attributes:
      done: how much of it is done.

    Args:
      console: where it is shown.
      total: size of the work.
      unit: what `total` counts, such as "tokens"; "bytes" are shown in MB.
      name: what is being done; `describe` changes it.
      done: how much of it is done already.
      delay: seconds of work before anything is shown.
      ends: whether the first and the last advance also make a plain line.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        unit: str,
        name: str = "",
        *,
        done: int = 0,
        delay: float = 0.0,
        ends: bool = False,
    ):
        self._console, self._total, self._unit, self._name = console, total, unit, name
        self.done, self._delay, self._text = done, delay, ""
        self._bar: Bar | None = None
        self._task: Any = None  # of rich, once there is a bar
        self._begin = self._last_line = time.monotonic()
        self._lines_at_ends = ends
        self._first = True
        self._start: tuple[float, int] | None = None  # time and amount when the clock started

    def __enter__(self) -> Progress:
        if self._delay == 0:
            self._show()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def describe(self, name: str) -> None:
        """Names what is being done now."""
        self._name = name
        if self._bar is not None:
            self._bar.update(self._task, description=name)

    def advance(self, amount: int, text: str = "") -> None:
        """Counts work that is done.

        Args:
          amount: in units.
          text: shown beside it until the next call, such as a loss.
        """
        self.done, self._text = self.done + amount, text
        now = time.monotonic()
        if self._start is None:  # what was done first was mostly compilation
            self._start = now, self.done
        if self._bar is None and now - self._begin > self._delay:
            self._show()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, amount=self._amount(), text=text)
            return
        at_end = self._lines_at_ends and (self._first or self.done == self._total)
        self._first = False
        if at_end or now - self._last_line > max(PLAIN_LINE_SECONDS, self._delay):
            self._last_line = now
            line = f"{self._name}: {self._amount()}{text and ', ' + text}{self._left(now)}"
            self._console.print(line, soft_wrap=True, markup=False)

    def restart(self, name: str, total: int) -> None:
        """Begins with another piece of work, of which nothing is done."""
        self._name, self._total, self.done, self._text, self._start = name, total, 0, "", None
        if self._bar is not None:
            self._bar.reset(
                self._task, total=total, description=name, amount=self._amount(), text=""
            )

    def start_clock(self) -> None:
        """Estimates from what comes now on: what was done before was mostly compilation."""
        self._start = time.monotonic(), self.done

    def _show(self) -> None:
        """Begins the bar, on a terminal."""
        if not self._console.is_terminal or self._console.quiet:
            return
        from rich import progress

        column = lambda field: progress.TextColumn(field, markup=False)
        self._bar = bar = progress.Progress(
            column("{task.description}"),
            progress.BarColumn(),
            column("{task.fields[amount]}"),
            column("{task.fields[text]}"),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        fields: dict[str, Any] = {"amount": self._amount(), "text": self._text}
        self._task = bar.add_task(self._name, total=self._total, completed=self.done, **fields)
        bar.start()

    def _amount(self) -> str:
        if self._unit == "bytes":
            return f"{self.done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB"
        return f"{self.done:,} of {self._total:,} {self._unit}"

    def _left(self, now: float) -> str:
        """The estimate, or "" before there is anything to go by."""
        since, before = self._start or (now, self.done)
        if self.done in (before, self._total):
            return ""
        seconds = (now - since) / (self.done - before) * (self._total - self.done)
        return f", about {_duration(seconds)} left"


def of_bytes(name: str, total: int, done: int = 0) -> Progress:
    """Progress over the bytes of files, on the standard error, once it turns out to take long."""
    from rich.console import Console

    return Progress(Console(stderr=True), total, "bytes", name, done=done, delay=SHORT_SECONDS)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

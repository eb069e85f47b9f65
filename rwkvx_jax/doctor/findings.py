"""What the doctor found: checks one after the other, for people and as JSON."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

Values = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
      name: what was checked.
      problem: why it failed; "" if it passed.
      text: one line for people.
      values: what was measured, JSON-able.
    """

    name: str
    problem: str
    text: str
    values: Values = field(default_factory=dict)


class Failed(Exception):
    """A check found something wrong; the message says what."""


class Findings:
    """Runs checks, prints each result as it comes, and keeps all."""

    def __init__(self, console: Console):
        self._console = console
        self.all: list[Finding] = []

    def check(self, name: str, run: Callable[[], tuple[str, Values]]) -> None:
        """Runs one check: it returns (a line, values), or raises whatever is wrong.

        Nothing that a check raises ends the others: a kernel that does not compile is a finding.
        """
        with self._console.status(name):
            try:
                text, values = run()
                finding = Finding(name, "", text, values)
            except Failed as error:
                finding = Finding(name, str(error), str(error))
            except Exception as error:  # whatever a compiler or a driver raises
                first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                finding = Finding(name, first, first, {"traceback": traceback.format_exc()})
        self.all.append(finding)
        mark = "FAIL" if finding.problem else "ok"
        self._console.print(f"{mark:5}{name}: {finding.text}", markup=False, soft_wrap=True)

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.all if finding.problem]

    def report(self) -> Values:
        """JSON-able; numbers that are not finite become their names."""
        checks = [asdict(finding) for finding in self.all]
        return {"passed": not self.failed, "checks": _plain(checks)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

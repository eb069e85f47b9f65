"""Answers to the requests of lm_eval: kept, found again, and those that can't be given."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkvx_jax.config import ConfigError
from rwkvx_jax.hosts import record_file
from rwkvx_jax.records import NOT_FINITE_REMEDY, as_text, not_finite


class Answers:
    """Answers by request, kept in memory."""

    def __init__(self):
        self._answers: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: dict[str, Any]) -> list[str]:
        """Keeps answers but for those that are not finite: their keys."""
        good = {key: a for key, a in answers.items() if not not_finite(a)}
        self._answers |= good
        self._written(good)
        return [key for key in answers if key not in good]

    def _written(self, answers: dict[str, Any]) -> None:
        """Called with what is new."""


class AnswerFile(Answers):
    """Answers on disk too, one json line each, appended as they come."""

    def __init__(self, path: Path):
        """Reads what is there; a last line cut off by a kill is dropped, with a warning.

        Raises:
          ConfigError: a malformed line elsewhere (with its number), such as one with NaN.
        """
        super().__init__()
        self._file = record_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, value in enumerate(self._file.new(), 1):
            match value:
                case [str(key), int() | float() | str() | [float(), bool()] as answer]:
                    self._answers[key] = answer
                case _:
                    raise ConfigError(f"{path}, line {number}: no answer; remove the file")

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[AnswerFile]:
        """The file, which no other process can open so meanwhile.

        Raises:
          ConfigError: another process has it open, or as the constructor does.
        """
        busy = f"another evaluation writes {path}: wait for it, or use another --output"
        with record_file(path).locked(busy=busy):
            yield cls(path)

    def _written(self, answers: dict[str, Any]) -> None:
        if answers:
            self._file.append(list(answers.items()))


def request_key(kind: str, *parts: Any) -> str:
    """Name of a request: a hash of all that it says."""
    return hashlib.blake2b(as_text([kind, *parts]).encode(), digest_size=12).hexdigest()


class Refused:
    """Requests of one kind that can't be answered, told when all others have been."""

    def __init__(self, label: str):
        self._label, self._problems = label, []

    def add(self, request: Any, problem: str) -> None:
        """Notes what is wrong with a request (its arguments)."""
        text = repr(request)
        self._problems.append((text if len(text) <= 240 else f"...{text[-240:]}", problem))

    def add_not_finite(self, request: Any) -> None:
        self.add(
            request,
            f"its logits are not finite (NaN or infinity): {NOT_FINITE_REMEDY}",
        )

    def tell(self) -> None:
        """Raises ConfigError for the first of them, if there is one."""
        for request, problem in self._problems:
            more = len(self._problems) - 1
            others = f" (and {more} more like it; all others are kept)" if more else ""
            raise ConfigError(f"{self._label}, request {request}: {problem}{others}")

"""The results file of a measurement of time: rows that are measured once, and never lost.

As with results.py a file only grows: it takes rows of more lengths and kinds, of the same model on
the same machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import jsonfiles
from rwkvx_jax.storage import exclusive

Record = dict[str, Any]


class Timings:
    """A document with "rows", on disk.

    document: what the file holds.
    """

    def __init__(self, path: Path, document: Record, *, same: tuple[str, ...], size: str):
        """Takes over what an earlier run left in the file.

        Args:
          path: of the JSON file.
          document: what this run knows; its rows are those to be measured.
          same: its fields that must be those of the file.
          size: the field of a row that tells it apart from others of its "kind".

        Raises:
          ConfigError: the file holds another measurement; says which fields differ.
        """
        self._path, self._same, self._size = path, same, size
        self.document = document
        self._take_over()

    def has(self, kind: str, size: int) -> bool:
        """Whether this row has been measured."""
        return (kind, size) in map(self._key, self.document["rows"])

    def add(self, rows: list[Record]) -> None:
        """Adds rows, and writes the file."""
        self.document["rows"] += rows
        self.save()

    def save(self) -> None:
        """Replaces the file in one step; rows that another process wrote meanwhile are kept."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self._path.with_name(f"{self._path.name}.lock")):
            self._take_over()
            jsonfiles.write(self._path, self.document)

    def _key(self, row: Record) -> tuple[str, int]:
        return row["kind"], row[self._size]

    def _take_over(self) -> None:
        if not self._path.exists():
            return
        old, new = jsonfiles.read(self._path), json.loads(jsonfiles.as_text(self.document))
        try:
            different = [name for name in self._same if old.get(name) != new.get(name)]
            rows = [row for row in old["rows"] if not self.has(*self._key(row))]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self._path} exists but is no results file of this task ({error!r}): use another "
                "--output"
            ) from error
        if different:
            raise ConfigError(
                f"{self._path} holds another measurement ({', '.join(different)} differ): use "
                "another --output, or remove the file"
            )
        self.document["rows"][:0] = rows

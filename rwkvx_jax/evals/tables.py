"""Tables of results: text, from which the terminal and the report make their own."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable


class Table(NamedTuple):
    """Text in rows and columns; the first column is left-aligned, the others are numbers."""

    columns: list[str]
    rows: list[list[str]]

    def print(self, console: Console, title: str | None = None) -> None:
        """Shows it on the terminal."""
        shown = RichTable(title=title)
        for i, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)

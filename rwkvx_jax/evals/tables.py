"""Tables of results: text, from which the terminal and the report make their own."""

from __future__ import annotations

from typing import NamedTuple


class Table(NamedTuple):
    """Text in rows and columns; the first column is left-aligned, the others are numbers."""

    columns: list[str]
    rows: list[list[str]]

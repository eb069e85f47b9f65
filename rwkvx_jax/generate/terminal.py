"""What goes to a terminal: no text may steer it.

Text of a model, a file or a name can hold escape sequences, which a terminal obeys. They are shown
as `\\x1b` there. Files and pipes get the text as it is, but for what can't be encoded.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# C0 but for tab and line feed, DEL, C1, and halves of surrogate pairs (bytes of a name that are not
# UTF-8 come as such).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters, other than tab and line feed, spelled out."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """`printable`, with tabs and line feeds spelled out too: for names in tables and figures."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def show(text: str, stream: TextIO | None = None) -> None:
    """Writes text to a stream (None: the standard output) at once; `printable` on a terminal."""
    stream = sys.stdout if stream is None else stream
    stream.write(printable(text) if stream.isatty() else text)
    stream.flush()


def accept_any_text(stream: TextIO) -> None:
    """Makes a stream spell out what its encoding lacks, instead of failing."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")

"""What a user sees of a conversion: progress, messages, and values that are not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from rwkvx_jax.convert.finite import describe, nonfinite_values
from rwkvx_jax.convert.own import OwnCheckpoint
from rwkvx_jax.convert.tensors import ConversionError, tracked
from rwkvx_jax.progress import Progress


def say(console: Console, line: str) -> None:
    """Prints a line as it is: paths and names are no markup, and may not be UTF-8."""
    console.print(Text(line.encode(errors="backslashreplace").decode()), soft_wrap=True)


@contextlib.contextmanager
def watched(
    source: OwnCheckpoint,
    src: Path,
    dst: Path,
    console: Console,
    *,
    allow_nonfinite: bool = False,
    remedy: str,
) -> Iterator[tuple[OwnCheckpoint, Callable[[], None]]]:
    """Shows how a checkpoint is read, parameter by parameter, while the block writes it.

    Args:
      source: the checkpoint.
      src: its name, for messages.
      dst: where it goes, for messages.
      console: for progress and messages.
      allow_nonfinite: warn of values that are NaN or infinite; they are an error otherwise.
      remedy: what that error advises.

    Yields:
      The checkpoint to be read by the block, and a function to be called when all is written and
      before it appears: it raises ConversionError for values that are not finite.
    """
    bad: dict[str, int] = {}
    total = sum(param.nbytes for param in source.params.values())
    with Progress(console, total, "bytes", str(dst)) as bar:

        def seen(name: str, array: np.ndarray) -> None:
            bad[name] = bad.get(name, 0) + nonfinite_values(array)
            bar.describe(name)
            bar.advance(array.nbytes)

        def accept() -> None:
            if (problem := describe(bad)) and not allow_nonfinite:
                raise ConversionError(f"{src} holds {problem}. Nothing was written; {remedy}")

        yield source._replace(params=tracked(source.params, seen)), accept
    if problem := describe(bad):
        say(console, f"warning: {dst} holds {problem}")

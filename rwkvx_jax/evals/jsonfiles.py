"""JSON of the evaluations: read and written in one place, and never a number that is not finite.

Python's own writer puts NaN and Infinity into files, which are then no JSON, and its reader takes
them back without a word. Here the one refuses them, and the other says where they stand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rwkvx_jax.config import ConfigError
from rwkvx_jax.storage import new_file

NOT_FINITE_REMEDY = (
    "nothing of it is stored; the parameters are damaged, or numbers overflow in this compute dtype"
)


def not_finite(value: Any, name: str = "") -> str:
    """Name of the first number of a JSON value that is NaN or infinite, "" where there is none.

    Args:
      value: dicts, lists, tuples, strings and numbers.
      name: of the value itself; parts are named as in panels[0].trials[3].correct.
    """
    if isinstance(value, float):
        return "" if math.isfinite(value) else name or "the number"
    if isinstance(value, dict):
        parts = ((part, f"{name}.{key}".lstrip(".")) for key, part in value.items())
    elif isinstance(value, list | tuple):
        parts = ((part, f"{name}[{i}]") for i, part in enumerate(value))
    else:
        return ""
    return next(filter(None, (not_finite(*part) for part in parts)), "")


def as_text(value: Any, indent: int | None = None) -> str:
    """JSON of a value.

    Raises:
      ValueError: a number that is not finite; what stores values checks them before.
    """
    return json.dumps(value, allow_nan=False, indent=indent)


def parse(data: bytes | str, where: str) -> Any:
    """The value that JSON stands for.

    Raises:
      ConfigError: `where` is not JSON, or holds a number that is not finite.
    """
    try:
        value = json.loads(data)
        name = not_finite(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error})") from error
    if name:
        raise ConfigError(
            f"{where}: {name} is not finite (NaN or infinity), which is neither JSON nor a result: "
            "remove the file and evaluate again"
        )
    return value


def read(path: Path) -> Any:
    """`parse` of a file."""
    return parse(path.read_bytes(), str(path))


def write(path: Path, value: Any) -> None:
    """Replaces a file in one step.

    Raises:
      OSError: it can't be written; nothing of it stays.
    """
    text = as_text(value, indent=1) + "\n"
    with new_file(path) as file:
        file.write(text.encode())

"""What commands say of their flags: the fields of a config, a line each; the nearest name."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec

from rwkvx_jax.config import Config

_MOST_COLUMNS = 120
_MOST_VALUE = 20  # characters of a value; a longer one is cut


class _Row(NamedTuple):
    flag: str
    value: str
    about: str


def fields_help(config: Config, experiment: str) -> str:
    """All fields of a config with their values: each group under its name, what is listed (stages,
    sources) once with the values of all its items.

    Args:
      config: the experiment as its file gives it.
      experiment: what the user calls it, for the title.
    """
    groups = {
        "model": _rows("model", [config.model]),
        "stages": _rows("stages.N", config.stages),
        "data": _rows("data", [config.data]),
        "data.sources": _rows("data.sources.N", config.data.sources),
        "optimizer": _rows("optimizer", [config.optimizer]),
        "run": _rows("run", [config.run]),
        "mesh": _rows("mesh", [config.mesh]),
    }
    rows = [row for group in groups.values() for row in group]
    flags = max(len(row.flag) for row in rows)
    values = max(len(row.value) for row in rows)
    columns = min(_MOST_COLUMNS, shutil.get_terminal_size((_MOST_COLUMNS, 50)).columns) - 1
    lines = [f"Fields, with the values of {experiment}; --help-all says more about each."]
    for row in rows:
        line = f"  {row.flag:{flags}}  {row.value:{values}}  {row.about}"
        lines.append(_cut(line, columns).rstrip())
    stages = ", ".join(f"{i} {stage.name}" for i, stage in enumerate(config.stages))
    sources = ", ".join(f"{i} {source.kind}" for i, source in enumerate(config.data.sources))
    lines.append(f"N of stages: {stages}. N of data.sources: {sources}.")
    return "\n".join(lines)


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that does not exist: the one probably meant, or all."""
    near = difflib.get_close_matches(name, names := list(names), n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"


def listed(parse: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec:
    """A flag that takes a list, written `a,b` or `a b`; "auto" is the empty tuple.

    Args:
      parse: makes an item of a word; a ValueError's text reaches the user.
      metavar: how the help shows the list.
    """

    def items(words: list[str]) -> tuple[Any, ...]:
        split = [word for argument in words for word in argument.split(",")]
        return () if split == ["auto"] else tuple(map(parse, split))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=items,
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [",".join(map(str, x)) or "auto"],
    )


def _rows(prefix: str, items: Sequence[Any]) -> Iterator[_Row]:
    """The fields of items of one kind, except those that have fields of a group of their own."""
    about = _descriptions(type(items[0]))
    for field in dataclasses.fields(items[0]):
        values = [getattr(item, field.name) for item in items]
        name = f"{prefix}.{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(values[0]):
            yield from _rows(name, values)
        elif not (
            isinstance(values[0], tuple) and dataclasses.is_dataclass(next(iter(values[0]), 0))
        ):
            texts = list(dict.fromkeys(map(_shown, values)))
            texts = texts if len(texts) == 1 else list(map(_shown, values))
            yield _Row(f"--{name}", _cut(", ".join(texts), _MOST_VALUE), about.get(field.name, ""))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return {"": "-", None: "auto"}.get(value, str(value))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _descriptions(kind: type) -> dict[str, str]:
    """The first sentence of the docstring behind every field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    assert isinstance(tree, ast.ClassDef)
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if isinstance(after, ast.Expr):
            text = " ".join(ast.literal_eval(after.value).split())
            found[node.target.id] = re.split(r"(?<=[^.])\. |; ", text)[0].rstrip(".")
    return found

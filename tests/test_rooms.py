"""The order of the rooms: a file imports only rooms below its own."""

import ast
from pathlib import Path

import pytest

import rwkvx_jax

ROOT = Path(__file__).resolve().parents[1]
# Lowest first; entry points (train.py, eval.py, `__main__.py`) stand above all rooms.
ROOMS = [
    "pallas_kernels",
    "rwkvx_jax.config",
    "rwkvx_jax.storage",
    "rwkvx_jax.textfiles",
    "rwkvx_jax.xla_flags",
    "rwkvx_jax.sharding",
    "rwkvx_jax.hosts",
    "rwkvx_jax.digest",
    "rwkvx_jax.orbax_messages",
    "rwkvx_jax.checkpoint_store",
    "rwkvx_jax.ops",
    "rwkvx_jax.cache",
    "rwkvx_jax.modules",
    "rwkvx_jax.model",
    "rwkvx_jax.tokenizer",
    "rwkvx_jax.tasks",
    "rwkvx_jax.data",
    "rwkvx_jax.convert",
    "rwkvx_jax.checkpoint",
    "rwkvx_jax.training",
    "rwkvx_jax.generate",
    "rwkvx_jax.plan",
    "rwkvx_jax.evals",
    "rwkvx_jax.cli",
    "rwkvx_jax.doctor",
]
FILES = sorted(
    path
    for package in ("rwkvx_jax", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__main__.py" and path.parent.name + path.name != "rwkvx_jax__init__.py"
)


def room(module: str) -> int | None:
    """Index of the room that a dotted module belongs to; None for other packages."""
    for index, name in enumerate(ROOMS):
        if module == name or module.startswith(name + "."):
            return index
    return None


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_rooms_below_its_own(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own is not None, f"{path.name} belongs to no room: add it to the list, in its place"
    for module in imported(ast.parse(path.read_text())):
        other = room(module)
        assert other is None or other <= own, f"{path.name} imports {module}, a room above its own"


def test_kernels_import_jax_only():
    allowed = {"jax", "numpy", "functools", "dataclasses", "typing", "math", "collections"}
    for path in (ROOT / "pallas_kernels").glob("*.py"):
        names = {module.split(".")[0] for module in imported(ast.parse(path.read_text()))}
        assert names <= allowed | {"pallas_kernels", "__future__"}, (path.name, names)


def test_the_public_names_are_typed_and_loaded_from_the_same_places():
    tree = ast.parse((ROOT / "rwkvx_jax/__init__.py").read_text())
    typed = {
        alias.name: node.module.removeprefix("rwkvx_jax.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("rwkvx_jax.")
        for alias in node.names
    }
    assert typed == rwkvx_jax._HOMES and set(typed) == set(rwkvx_jax.__all__)
    assert all(getattr(rwkvx_jax, name) is not None for name in typed)

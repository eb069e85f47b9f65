"""The order of the rooms: a file imports only rooms below its own."""

import ast

import pytest

import rwkvx_jax
from tests.helpers import ROOT

# Lowest first; entry points (train.py and eval.py at the root, `__main__.py`) stand above all.
ROOMS = [
    "pallas_kernels",
    "rwkvx_jax.config",
    "rwkvx_jax.experiment_files",
    "rwkvx_jax.cli_help",
    "rwkvx_jax.progress",
    "rwkvx_jax.storage",
    "rwkvx_jax.records",
    "rwkvx_jax.textfiles",
    "rwkvx_jax.xla_flags",
    "rwkvx_jax.sharding",
    "rwkvx_jax.hosts",
    "rwkvx_jax.digest",
    "rwkvx_jax.orbax_messages",
    "rwkvx_jax.checkpoint_store",
    "rwkvx_jax.ops",
    "rwkvx_jax.cache",
    "rwkvx_jax.snapshots",
    "rwkvx_jax.modules",
    "rwkvx_jax.model",
    "rwkvx_jax.lora",
    "rwkvx_jax.tokenizer",
    "rwkvx_jax.tasks",
    "rwkvx_jax.data",
    "rwkvx_jax.convert",
    "rwkvx_jax.checkpoint",
    "rwkvx_jax.adapter",
    "rwkvx_jax.training",
    "rwkvx_jax.generate",
    "rwkvx_jax.evals",
    "rwkvx_jax.evals.intervals",
    "rwkvx_jax.evals.tables",
    "rwkvx_jax.evals.models",
    "rwkvx_jax.evals.results",
    "rwkvx_jax.evals.plots",
    "rwkvx_jax.evals.curves",
    "rwkvx_jax.evals.pages",
    "rwkvx_jax.evals.runner",
    "rwkvx_jax.evals.documents",
    "rwkvx_jax.evals.readers",
    "rwkvx_jax.evals.texts",
    "rwkvx_jax.evals.grid",
    "rwkvx_jax.evals.chunk_mass",
    "rwkvx_jax.evals.short",
    "rwkvx_jax.evals.tasks",
    "rwkvx_jax.cli",
    "rwkvx_jax.perf",
    "rwkvx_jax.evals.report",
    "rwkvx_jax.evals.lm_eval",
    "rwkvx_jax.plan",
    "rwkvx_jax.doctor",
    "rwkvx_jax.eval",
    "rwkvx_jax.eval_tasks",
    "rwkvx_jax.train",
    "rwkvx_jax.expand_checkpoint",
    "rwkvx_jax.completion",
]
DOORS = "perf", "evals.report", "plan", "doctor", "eval"
DOORS = tuple(f"rwkvx_jax.{name}" for name in DOORS)
FILES = sorted(
    path
    for package in ("rwkvx_jax", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__main__.py" and path.parent.name + path.name != "rwkvx_jax__init__.py"
)


def room(module: str) -> int | None:
    """Index of the room that a dotted module belongs to, the innermost; None for other packages."""
    own = [name for name in ROOMS if module == name or module.startswith(name + ".")]
    return ROOMS.index(max(own, key=len)) if own else None


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


def test_nothing_imports_perf_but_the_doors():
    """What it predicts and measures must not change by being predicted or measured."""
    for path in FILES:
        if room(".".join(path.relative_to(ROOT).with_suffix("").parts)) in map(room, DOORS):
            continue
        found = [m for m in imported(ast.parse(path.read_text())) if m.startswith("rwkvx_jax.perf")]
        assert not found, f"{path.name} imports {found}: only doors may"


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

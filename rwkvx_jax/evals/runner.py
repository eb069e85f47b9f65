"""Runs any task: asks its models what an earlier run has not, keeps the answers, shows the results.

A task (`results.Task`) says which trials there are, how a model answers some of them, and how
trials are summed up. Loading models, taking over finished trials, progress, interruptions and the
results file are the same for all, and here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
from rich.console import Console

from rwkvx_jax.evals.models import EvalModel, EvalOptions, open_models
from rwkvx_jax.evals.results import Results, Task
from rwkvx_jax.hosts import first_does
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record
from rwkvx_jax.sharding import in_mesh, mesh_of

Options = TypeVar("Options", bound=EvalOptions)
Found = TypeVar("Found")


class Described(Protocol):
    """What is evaluated: an `EvalModel`, or another thing with a name and a JSON description."""

    @property
    def label(self) -> str: ...
    @property
    def description(self) -> Record: ...


def evaluate(task: Task, output: Path, models: Sequence[Described], console: Console) -> Results:
    """Runs what an earlier run has not finished, and keeps it in `output`.

    Raises:
      ConfigError: a results file of another evaluation, or answers that are not finite.
    """
    path = output / f"{task.name.replace('-', '_')}.jsonl"
    results = Results(path, task, [model.description for model in models])
    finished = {model.label: results.finished(model.label) for model in models}
    if skipped := sum(map(len, finished.values())):
        console.print(f"{skipped} finished trials found in {results.path}", soft_wrap=True)
    pending = [[t for t in task.chosen if t not in finished[model.label]] for model in models]
    total = sum(task.size(trial) for todo in pending for trial in todo)
    with Progress(console, total, task.unit) as progress:
        for model, todo in zip(models, pending, strict=True):
            for i, records in enumerate(task.answer(model, todo, progress) if todo else ()):
                results.add(model.label, records)
                if i == 0:
                    progress.start_clock()
                if isinstance(model, EvalModel):
                    model.check()
    return results


def run(
    options: Options,
    evaluate: Callable[[Options, Sequence[EvalModel], Console], Found],
    show: Callable[[Found, Sequence[EvalModel], Console], None],
    models: Sequence[EvalModel] | None = None,
) -> None:
    """A task's command: loads the models, evaluates them, and shows what was found.

    Args:
      options: the flags.
      evaluate: answers what is not finished yet.
      show: draws and prints it.
      models: what is evaluated instead of the checkpoints that the flags name, quietly and on the
        mesh in force.
    """
    if models is not None:
        console = Console(quiet=True)
        found = evaluate(options, models, console)
    else:
        console = open_console()
        mesh = mesh_of(options.mesh)
        models = open_models(options)  # onto the host of each process: no mesh is in force yet
        with in_mesh(mesh):
            with until_interrupted(console):
                found = evaluate(options, models, console)
    first_does(lambda: show(found, models, console), f"{options.output}: no figure can be written")


def show(
    results: Results,
    console: Console,
    draw: Callable[[Path], None],
    print_tables: Callable[[], None],
) -> None:
    """Draws the figure beside the results file, prints the tables, and says where both are."""
    path = results.path.with_suffix(".png")
    draw(path)
    print_tables()
    console.print(f"wrote {results.path} and {path}", soft_wrap=True)


def shows(
    draw: Callable[[Results, Path], None], print_tables: Callable[[Results, Console], None]
) -> Callable[[Results, Sequence[EvalModel], Console], None]:
    """How `run` shows results from which figure and tables are made alone."""

    def shown(results: Results, models: Sequence[EvalModel], console: Console) -> None:
        show(results, console, partial(draw, results), partial(print_tables, results, console))

    return shown


def open_console() -> Console:
    """The standard output of the first process; wide where it is a file, so that tables are never
    squeezed.

    Names are shown as they are (`[b]` is no markup), but for control characters.
    """
    quiet = jax.process_index() != 0
    console = Console(quiet=quiet, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 240
    return console


@contextlib.contextmanager
def until_interrupted(console: Console) -> Iterator[None]:
    """On Ctrl-C says how to go on, and exits with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted: finished trials are saved, the same command continues")
        raise SystemExit(130) from None


def even_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Cuts items into the fewest batches of at most `size`, as equal as they can be."""
    count = -(-len(items) // size)
    for i in range(count):
        yield items[i * len(items) // count : (i + 1) * len(items) // count]

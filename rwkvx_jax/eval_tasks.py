"""Evaluations during training: tasks of `eval.py` asked of the parameters as they are at a step.

They run on the training mesh. Results are those of `eval.py`, in a folder for each step; what sums
up each goes to metrics.jsonl and TensorBoard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rwkvx_jax.cli import UsageError
from rwkvx_jax.config import ConfigError, MeshConfig
from rwkvx_jax.eval import TASKS, parse
from rwkvx_jax.evals.models import ATTENTION_OFF, EvalModel, EvalOptions
from rwkvx_jax.evals.report import find_runs, measure_of
from rwkvx_jax.storage import remove_folder
from rwkvx_jax.training.evaluate import Trained

FOLDER = "evals"
"""In a work directory: results of each step."""
_CHECKPOINT = Path("the-training-run")
_GIVEN = ("chunk_size", "top_k", "selector", "vocab_file")


class _Asked(NamedTuple):
    """A task and its flags."""

    task: str
    suffix: str  # where the same task is asked twice
    options: EvalOptions
    run: Callable[..., None]


class EvalTasks:
    """What `fit` calls with the parameters of a step."""

    def __init__(self, lines: Sequence[str], workdir: Path):
        """
        Args:
          lines: `run.eval_tasks`.
          workdir: of the run; results go to `evals/step-N/TASK` there.

        Raises:
          ConfigError: a line that is no command of eval.py for the model under training.
        """
        self._folder = workdir / FOLDER
        self._tasks: list[_Asked] = []
        for line in lines:
            options, run = _parse(line, self._folder)
            task = shlex.split(line)[0]
            count = sum(asked.task == task for asked in self._tasks)
            self._tasks.append(_Asked(task, f"_{count + 1}" if count else "", options, run))

    def go_back(self, step: int) -> None:
        """Removes results of later steps, which the run will reach anew."""
        if not self._folder.is_dir():
            return
        for folder in self._folder.iterdir():
            before, begins, number = folder.name.partition("step-")
            ours = begins and not before and folder.is_dir()
            if ours and number.isdecimal() and int(number) > step:
                remove_folder(folder)

    def __call__(self, trained: Trained) -> dict[str, float]:
        """Evaluates the model; in the first process, what sums up each result, by name of task.

        Trials that are finished in the folder of this step are not asked again.

        Raises:
          ConfigError: a task that the model can't be asked, such as prompts that do not fit into
            the memory; or results of other flags in that folder.
        """
        model = EvalModel(
            label=f"step {trained.step}",
            config=trained.model.config,
            run=trained.model.run,
            params=trained.params,
            tokenizer=trained.tokenizer,
            checkpoint=str(self._folder.parent),
            step=trained.step,
            trained_length=trained.length,
            check=trained.check,
        )
        values: dict[str, float] = {}
        for asked in self._tasks:
            trained.check()
            output = self._folder / f"step-{trained.step}" / (asked.task + asked.suffix)
            asked.run(dataclasses.replace(asked.options, output=output), [model])
            if jax.process_index() == 0:
                values |= _scores(output, asked.suffix)
        return values


def _parse(line: str, folder: Path) -> tuple[Any, Callable[..., None]]:
    """The options of a line, and what runs the task.

    Raises:
      ConfigError: see `EvalTasks`.
    """
    told = io.StringIO()
    given = ["--checkpoint", str(_CHECKPOINT), "--output", str(folder)]
    try:
        words = shlex.split(line)
        if not words:
            raise UsageError("no task is named")
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            options = parse([words[0], *given, *words[1:]], "eval.py")
    except SystemExit as error:
        raise ConfigError(f"run.eval_tasks {line!r}:\n{told.getvalue().strip()}") from error
    except (ConfigError, UsageError, ValueError) as error:
        raise ConfigError(f"run.eval_tasks {line!r}: {error}") from error
    kind, run = TASKS[words[0]]
    if not issubclass(kind, EvalOptions):
        raise ConfigError(
            f"run.eval_tasks {line!r}: {words[0]} asks nothing of the parameters under training; "
            "run it by itself with eval.py"
        )
    known = (options.checkpoint, options.output, options.mesh)
    if known != ((_CHECKPOINT,), folder, MeshConfig(data=1)) or any(
        getattr(options, name) for name in _GIVEN
    ):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in _GIVEN)
        raise ConfigError(
            f"run.eval_tasks {line!r}: the run gives its own model, mesh and output; leave out "
            f"--checkpoint, --output, --mesh, {flags}"
        )
    return options, run


def _scores(output: Path, suffix: str) -> dict[str, float]:
    """What sums up the results in a folder; a task of several (niah) has a score for each."""
    values = {}
    for found in find_runs([output]):
        task, measure = found.document["task"], measure_of(found.document["task"])
        if measure is None:
            continue
        for model in found.document["models"]:
            off = "_attention_off" if model["label"].endswith(ATTENTION_OFF) else ""
            if (score := measure.score(model["summary"])) is not None:
                values[task.replace("-", "_") + off + suffix] = score.value
    return values

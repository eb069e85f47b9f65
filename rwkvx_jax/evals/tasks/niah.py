"""Retrieval beyond the passkey: RULER's needles and variable tracking, and key-value recall.

Every task is a grid of lengths and depths (see `grid`), with files of its own. Answers are decoded
greedily, end at a line break, and are scored by RULER's rule: the share of the expected strings
that they contain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from rich.console import Console

from rwkvx_jax.cli_help import listed, nearest
from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import grid, runner
from rwkvx_jax.evals.grid import Grid, GridOptions, Lengths, Trial
from rwkvx_jax.evals.models import EvalModel, require_at_least_1
from rwkvx_jax.evals.readers import GreedyReader
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.records import Record
from rwkvx_jax.storage import WorkPath
from rwkvx_jax.tasks.haystack import TextFolder, open_folder
from rwkvx_jax.tasks.niah import (
    NEEDLE_TASKS,
    Question,
    needle_question,
    score,
    tracking_question,
)
from rwkvx_jax.tasks.recall import recall_prompt
from rwkvx_jax.tokenizer import Tokenizer

TaskName = Literal[
    "single_1",
    "single_2",
    "single_3",
    "multikey_1",
    "multikey_2",
    "multikey_3",
    "tracking",
    "recall_16",
    "recall_64",
    "recall_256",
]

TITLES = {
    "single_1": "S-NIAH-1: a number in repeated filler",
    "single_2": "S-NIAH-2: a number in running text",
    "single_3": "S-NIAH-3: a uuid in running text",
    "multikey_1": "MK-NIAH-1: one of four numbers in running text",
    "multikey_2": "MK-NIAH-2: one of nothing but numbers",
    "multikey_3": "MK-NIAH-3: one of nothing but uuids",
    "tracking": "Variable tracking: one chain of five",
    "recall_16": "Key-value recall: 16 pairs, one asked",
    "recall_64": "Key-value recall: 64 pairs, one asked",
    "recall_256": "Key-value recall: 256 pairs, one asked",
}


@dataclass(frozen=True, kw_only=True)
class NiahOptions(GridOptions):
    """RULER's needles and variable tracking, and key-value recall, by length and depth."""

    tasks: Annotated[tuple[TaskName, ...], listed(str, "TASK,TASK,...")] = (
        "single_1",
        "single_2",
        "single_3",
    )
    """What to run; each writes niah_<task>.jsonl and .png."""
    lengths: Lengths = (1000, 2000, 4000, 8000)
    """Lengths in tokens. RULER's tasks count 128 (tracking: 30) of them for the answer, recall is
    exact."""
    depths: int = 10
    """Depths of what is asked for, evenly spaced from 0 to 100 %. Tracking has its lines anywhere
    and takes as many more trials instead."""
    trials: int = 5
    """Questions at every length and depth. The paper's tables have 500 a length: 40 depths with 13
    trials come near."""
    haystack: WorkPath | None = None
    """A .txt file, a folder of them or a quoted pattern: the running text of single_2, single_3 and
    multikey_1."""
    answer_tokens: int = 64
    """Most tokens of an answer; it also ends at a line break."""

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks:
            raise ConfigError(f"--tasks is empty: name some of {', '.join(get_args(TaskName))}")
        for name in self.tasks:
            if name not in get_args(TaskName):
                raise ConfigError(f"--tasks: no task {name!r}: {nearest(name, get_args(TaskName))}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"--tasks {' '.join(self.tasks)} names a task twice")
        require_at_least_1(self, "answer_tokens")
        needing = [name for name in self.tasks if _needs_text(name)]
        if needing and self.haystack is None:
            raise ConfigError(
                f"{', '.join(needing)} hide needles in running text: name a .txt file or a folder "
                "of them with --haystack PATH, or leave these tasks out of --tasks"
            )


def _needs_text(name: TaskName) -> bool:
    return name in NEEDLE_TASKS and NEEDLE_TASKS[name].haystack == "text"


def question_of(
    options: NiahOptions,
    name: TaskName,
    text: TextFolder | None,
    tokenizer: Tokenizer,
    trial: Trial,
) -> Question:
    """The question of a trial: a function of task, seed and trial alone.

    Raises:
      ConfigError: a length that can't hold it.
    """
    number = list(get_args(TaskName)).index(name)
    depth = round(trial.depth * 1e6)
    rng = np.random.default_rng([options.seed, number, trial.length, depth, trial.trial])
    if name in NEEDLE_TASKS:
        task = NEEDLE_TASKS[name]
        return needle_question(task, tokenizer, trial.length, trial.depth, rng, text)
    if name == "tracking":
        return tracking_question(tokenizer, trial.length, rng)
    pairs = int(name.removeprefix("recall_"))
    prompt, value = recall_prompt(tokenizer, trial.length, pairs, trial.depth, rng)
    return Question(prompt, (str(value),))


def niah_grid(options: NiahOptions, name: TaskName, text: TextFolder | None) -> Grid:
    """A task as a grid of questions."""
    expected: dict[Trial, tuple[str, ...]] = {}  # kept: to make a question again takes long

    def prompt(tokenizer: Tokenizer, trial: Trial) -> np.ndarray:
        question = question_of(options, name, text, tokenizer, trial)
        expected[trial] = question.answers
        return question.prompt

    settings = {"seed": options.seed, "answer_tokens": options.answer_tokens}
    if _needs_text(name):
        settings["haystack"] = text.fingerprint
    placed = name != "tracking"
    return Grid(
        task=f"niah_{name}",
        settings=settings,
        lengths=options.lengths,
        depths=options.depth_shares if placed else (0.0,),
        trials=options.trials if placed else options.trials * options.depths,
        prompt=prompt,
        answer_length=lambda tokenizer: options.answer_tokens,
        judge=lambda tokenizer, trial, answer: judge(tokenizer, expected[trial], answer),
        ended=lambda tokenizer, answer: "\n" in tokenizer.decode(answer).lstrip(),
    )


def judge(tokenizer: Tokenizer, expected: tuple[str, ...], answer: np.ndarray) -> Record:
    """What was expected and answered; "correct" is the share of the expected strings found."""
    text = tokenizer.decode(answer).lstrip().split("\n")[0]
    return {
        "expected": list(expected),
        "answer": text,
        "correct": score(text, expected),
    }


def evaluate(
    options: NiahOptions,
    models: Sequence[EvalModel],
    console: Console,
    make_reader: Callable[..., Any] = GreedyReader,
) -> dict[TaskName, Results]:
    """Runs what is not finished yet of every task; see `grid.evaluate`.

    Raises:
      ConfigError: lengths too short for a prompt (before anything is run), or a results file of
        another evaluation.
    """
    text = open_folder(str(options.haystack)) if options.haystack else None
    grids = {name: niah_grid(options, name, text) for name in options.tasks}
    for questions in grids.values():
        first = Trial(questions.lengths[0], questions.depths[0], 0)
        grid.check_sizes(questions, options, models)
        questions.prompt(models[0].tokenizer, first)
    make_reader = _Kept(make_reader)
    return {
        name: grid.evaluate(questions, options, models, console, make_reader)
        for name, questions in grids.items()
    }


class _Kept:
    """Makes readers, but gives the last one again where nothing differs: it is compiled already."""

    def __init__(self, make: Callable[..., Any]):
        self._make, self._key, self._reader = make, None, None

    def __call__(self, model: EvalModel, **sizes: Any):
        if self._key != (key := (model.label, sizes)):
            self._reader = None  # frees its parameters first
            self._key, self._reader = key, self._make(model, **sizes)
        return self._reader


def print_overview(console: Console, results: dict[TaskName, Results]) -> None:
    """The paper's table: a row a model, for each task the score at every length."""
    lengths = {name: r.document["plan"]["lengths"] for name, r in results.items()}
    short = lambda n: f"{n // 1000}K" if n % 1000 == 0 else f"{n:,}"
    columns = [f"{name}\n{'/'.join(map(short, lengths[name]))}" for name in results]
    rows = []
    for model in next(iter(results.values())).document["models"]:
        cells = []
        for name, result in results.items():
            summary = result.summary(model["label"])["by_length"]
            shares = {cell["length"]: cell["accuracy"] for cell in summary}
            cells.append(
                "/".join(f"{100 * shares[n]:.1f}" if n in shares else "–" for n in lengths[name])
            )
        rows.append([model["label"], *cells])
    Table(["model", *columns], rows).print(console, "score (%) by length, all depths")


def run(options: NiahOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes the files of every task, prints tables."""

    def show(
        results: dict[TaskName, Results], models: Sequence[EvalModel], console: Console
    ) -> None:
        text = open_folder(str(options.haystack)) if options.haystack else None
        for name, result in results.items():
            questions = niah_grid(options, name, text)
            grid.show(
                questions,
                result,
                console,
                title=f"{TITLES[name]}\n{questions.trials} trials a cell, seed {options.seed}",
                unit=f"{models[0].tokenizer.name} tokens",
                depth_label="" if name == "tracking" else "depth of what is asked for (%)",
            )
        print_overview(console, results)

    runner.run(options, evaluate, show, models)

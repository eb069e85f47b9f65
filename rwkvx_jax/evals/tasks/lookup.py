"""Lookup: facts in wordings that no training document has, asked for by length and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console

from rwkvx_jax.evals import grid, runner
from rwkvx_jax.evals.grid import Grid, GridOptions, Lengths, Trial
from rwkvx_jax.evals.models import EvalModel, require_at_least_1
from rwkvx_jax.evals.readers import GreedyReader
from rwkvx_jax.evals.results import Results
from rwkvx_jax.records import Record
from rwkvx_jax.storage import WorkPath
from rwkvx_jax.tasks.haystack import open_folder
from rwkvx_jax.tasks.lookup import lookup_prompt
from rwkvx_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LookupOptions(GridOptions):
    """Facts in wordings, about things and with names that no training document has."""

    lengths: Lengths = (1024, 2048, 4096, 8192)
    """Prompt lengths in tokens, the answer not counted."""
    facts: int = 8
    """Facts in a prompt; one is asked for."""
    part: Literal["evaluation", "training"] = "evaluation"
    """Whose phrases are used: those that are kept for evaluation, or those of training documents,
    to see what the difference is."""
    haystack: WorkPath | None = None
    """A .txt file, a folder of them or a quoted pattern: running text in place of the repeated
    filler."""
    answer_tokens: int = 48
    """Most tokens of an answer; it also ends at a full stop or a line break."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "facts", "answer_tokens")


def lookup_grid(options: LookupOptions) -> Grid:
    """The task as a grid of questions."""
    text = open_folder(str(options.haystack)) if options.haystack else None
    expected: dict[Trial, str] = {}

    def prompt(tokenizer: Tokenizer, trial: Trial) -> np.ndarray:
        depth = round(trial.depth * 1e6)
        rng = np.random.default_rng([options.seed, trial.length, depth, trial.trial])

        def window(count: int, rng: np.random.Generator) -> np.ndarray:
            return text.window(tokenizer, int(rng.integers(len(text.tokens(tokenizer)))), count)

        question = lookup_prompt(
            tokenizer,
            trial.length,
            trial.depth,
            rng,
            facts=options.facts,
            part=options.part,
            text=window if text else None,
        )
        expected[trial] = question.answer
        return question.prompt

    def judge(tokenizer: Tokenizer, trial: Trial, answer: np.ndarray) -> Record:
        said = _said(tokenizer, answer)
        value = expected[trial]
        return {"expected": value, "answer": said, "correct": float(said == value)}

    settings = {"seed": options.seed, "facts": options.facts, "part": options.part}
    settings |= {"answer_tokens": options.answer_tokens}
    if text:
        settings["haystack"] = text.fingerprint
    return Grid(
        task="lookup",
        settings=settings,
        lengths=options.lengths,
        depths=options.depth_shares,
        trials=options.trials,
        prompt=prompt,
        answer_length=lambda tokenizer: options.answer_tokens,
        judge=judge,
        ended=lambda tokenizer, answer: bool(set(".\n") & set(tokenizer.decode(answer).lstrip())),
    )


def _said(tokenizer: Tokenizer, answer: np.ndarray) -> str:
    """An answer up to its end."""
    return tokenizer.decode(answer).lstrip().split("\n")[0].split(".")[0].strip()


def evaluate(
    options: LookupOptions,
    models: Sequence[EvalModel],
    console: Console,
    make_reader: Callable[..., Any] = GreedyReader,
) -> Results:
    """Asks what an earlier run has not, and keeps the answers in lookup.jsonl; see `grid.evaluate`.

    Raises:
      ConfigError: a length too short for a prompt, or a results file of another evaluation.
    """
    return grid.evaluate(lookup_grid(options), options, models, console, make_reader)


def run(options: LookupOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes lookup.jsonl and lookup.png, prints the tables."""

    def show(results: Results, models: Sequence[EvalModel], console: Console) -> None:
        title = f"One of {options.facts} facts, in wordings of the {options.part}"
        grid.show(
            lookup_grid(options),
            results,
            console,
            title=f"{title}\n{options.trials} trials a cell, seed {options.seed}",
            unit=f"{models[0].tokenizer.name} tokens",
            depth_label="depth of the fact (%)",
        )

    runner.run(options, evaluate, show, models)

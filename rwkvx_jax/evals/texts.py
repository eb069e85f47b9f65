"""Scores of texts by any model: what the tasks over running text have in common.

A trial is one or more texts that are read from an empty state; a task says which, and what it keeps
of the scores of their predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from rwkvx_jax.evals import runner
from rwkvx_jax.evals.documents import TextOptions
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.readers import TextScorer, TokenScores, affordable_batch, check_memory
from rwkvx_jax.evals.results import Results, Summarize, Task
from rwkvx_jax.evals.runner import even_batches
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record

Texts = Mapping[Any, Sequence[np.ndarray]]
"""Texts of each trial by its key, all trials with as many: int32 tokens, the first only read."""

MakeScorer = Callable[..., Callable[..., list[TokenScores]]]
"""(model, prefill_chunk=, batch=, longest=) -> a function as `TextScorer` is one."""

Judge = Callable[[EvalModel, Any, Sequence[TokenScores]], Record]
"""(model, key, scores of its texts) -> what is kept beside the key."""


def evaluate(
    options: TextOptions,
    models: Sequence[EvalModel],
    console: Console,
    *,
    name: str,
    settings: Record,
    texts: Texts,
    judge: Judge,
    summarize: Summarize,
    make_scorer: MakeScorer = TextScorer,
) -> Results:
    """Scores the texts of all trials that are not finished yet, and keeps them.

    Args:
      options: the flags.
      models: with the same tokenizer.
      console: shows the progress.
      name: of the task.
      settings: what every trial depends on beside its key and model, as JSON.
      texts: see there.
      judge: see there.
      summarize: summary of a model's trials.
      make_scorer: see there.

    Raises:
      ConfigError: no memory for one text, or a results file of another evaluation.
    """
    size = lambda key: sum(len(text) - 1 for text in texts[key])
    each = len(next(iter(texts.values())))
    longest = max(len(text) - 1 for own in texts.values() for text in own)
    chunk, free = min(options.prefill_chunk, longest), memory_left()
    batch = options.batch and min(options.batch, each * len(texts))
    for model in models:
        check_memory(model, longest, chunk, None, free, batch)

    def answer(
        model: EvalModel, chosen: Sequence[Any], progress: Progress
    ) -> Iterator[list[Record]]:
        rows = min(batch or affordable_batch(model, longest, chunk), each * len(chosen))
        scorer = make_scorer(model, prefill_chunk=chunk, batch=rows, longest=longest)
        for part in even_batches(chosen, max(1, rows // each)):
            progress.describe(f"{model.label}, {', '.join(map(str, part[0]))}")
            flat = [text for key in part for text in texts[key]]
            scores = scorer(flat, progress.advance)
            own = (scores[i : i + each] for i in range(0, len(scores), each))
            yield [key._asdict() | judge(model, key, s) for key, s in zip(part, own, strict=True)]

    task = Task(
        name=name,
        settings=settings,
        plan={"text": str(options.text), "documents": len(texts), "limit": options.limit},
        trials=list(texts),
        chosen=list(texts)[: options.limit],
        answer=answer,
        summarize=summarize,
        size=size,
    )
    return runner.evaluate(task, options.output, models, console)


def pairs(first: Record, other: Record, key: Sequence[str]) -> list[tuple[Record, Record]]:
    """Trials of the same texts by two models of a results file, whose differences tell more than
    the two means do."""
    keyed = lambda model: {tuple(trial[k] for k in key): trial for trial in model["trials"]}
    known = keyed(first)
    return [(known[k], trial) for k, trial in keyed(other).items() if k in known]


def mean_loss(scores: TokenScores, begin: int = 0, end: int | None = None) -> float:
    """Mean loss of some predictions, summed in float64."""
    return float(scores.losses[begin:end].astype(np.float64).mean())

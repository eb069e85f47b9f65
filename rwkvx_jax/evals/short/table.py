"""Scores of the short-context benchmarks: summary, the paper's table, bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rwkvx_jax.evals.intervals import Estimate, standard_error
from rwkvx_jax.evals.plots import (
    broken,
    drawn,
    legend_below,
    name_of,
    new_figure,
    part_of,
    plain,
    save,
    style,
)
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.records import Record

NAMES = {
    "lambada_openai": "LAMBADA",
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "arc_easy": "ARC easy",
    "arc_challenge": "ARC challenge",
    "winogrande": "WinoGrande",
    "sciq": "SciQ",
    "mmlu": "MMLU",
}
"""Columns of the paper's table, in its order."""
MAIN_METRICS = {"hellaswag": "acc_norm"}  # the others: acc
CHANCE = {
    "hellaswag": 25,
    "piqa": 50,
    "arc_easy": 25,
    "arc_challenge": 25,
    "winogrande": 50,
    "sciq": 25,
    "mmlu": 25,
}
"""Scores (%) of guessing; LAMBADA's is near 0."""

_LARGEST_EXPONENT = 700  # larger ones are no float64: perplexities end at 1e304


def family(task: str) -> str:
    """The column of a task: all subjects of MMLU are one."""
    return "mmlu" if task.startswith("mmlu_") else task


def summarize(trials: Sequence[Record]) -> Record:
    """Each column's metrics with standard errors over documents, in per cent where they are shares.

    LAMBADA's perplexity is computed as lm_eval does: exp of minus the mean log-likelihood.
    """
    columns: dict[str, dict[str, list]] = {}
    for trial in trials:
        metrics = columns.setdefault(family(trial["task"]), {})
        for metric, value in trial["metrics"].items():
            if isinstance(value, int | float):
                metrics.setdefault(metric, []).append(float(value))
            elif _is_weighted(value):
                metrics.setdefault(metric, []).append(value)
    summary = {}
    for column, metrics in columns.items():
        if metrics:
            summary[column] = {name: _mean(name, values) for name, values in metrics.items()}
    shown = [main_score(summary, column) for column in NAMES if column in summary]
    average = float(np.mean([score for score, _ in shown])) if shown else None
    return {"columns": summary, "average": average, "averaged": len(shown)}


def _is_weighted(value: Any) -> bool:
    """Whether a metric is a log-likelihood of a text with the words or bytes that share it."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(x, float | int) for x in value)
    )


def _mean(name: str, values: list[Any]) -> Record:
    """One number of all documents; "share": whether it is one, to be shown in per cent."""
    if _is_weighted(values[0]):
        logs, weights = np.sum(np.asarray(values, np.float64), axis=0)
        value = -float(logs / weights)
        if name == "bits_per_byte":
            value /= math.log(2)
        else:
            value = math.exp(min(value, _LARGEST_EXPONENT))
        return {"value": value, "error": None, "documents": len(values), "share": False}
    if name == "perplexity":
        value = math.exp(min(-float(np.mean(values)), _LARGEST_EXPONENT))
        return {"value": value, "error": None, "documents": len(values), "share": False}
    mean, error = float(np.mean(values)), standard_error(values)
    share = all(0 <= value <= 1 for value in values)
    return {"value": mean, "error": error, "documents": len(values), "share": share}


def _main_metric(columns: Record, column: str) -> Record:
    metrics = columns[column]
    return metrics.get(MAIN_METRICS.get(column, "acc")) or next(iter(metrics.values()))


def main_score(columns: Record, column: str) -> tuple[float, float | None]:
    """The table's figure of a column and its standard error, of a share in per cent."""
    metric = _main_metric(columns, column)
    scale, error = 100 if metric["share"] else 1, metric["error"]
    return scale * metric["value"], None if error is None else scale * error


def score(summary: Record) -> Estimate | None:
    """Average of the columns, in per cent: of the paper's, or of all shares where none of these is;
    None where there is none."""
    found = summary["columns"]
    shares = [column for column in found if _main_metric(found, column)["share"]]
    scores = [main_score(found, c) for c in ([c for c in NAMES if c in found] or shares)]
    if not scores:
        return None
    errors = [error for _, error in scores]
    known = None if None in errors else math.hypot(*errors) / len(errors)
    return Estimate.of_mean(float(np.mean([value for value, _ in scores])), known)


def table(models: list[Record], average: str = "average") -> Table:
    """The paper's table: a row a model, scores with standard errors, last the average of those that
    are the paper's."""
    columns = _columns(models)
    averaged = any(model["summary"]["averaged"] for model in models)
    rows = []
    for model in models:
        texts = []
        for column in columns:
            if column not in model["summary"]["columns"]:
                texts.append("–")
                continue
            score, error = main_score(model["summary"]["columns"], column)
            texts.append(f"{score:.1f}" + (f" ± {error:.1f}" if error is not None else ""))
        mean = model["summary"]["average"]
        texts += ["–" if mean is None else f"{mean:.1f}"] if averaged else []
        rows.append([model["label"], *texts])
    names = [NAMES.get(c, c) + (" (acc_norm)" if c in MAIN_METRICS else "") for c in columns]
    return Table(["model (%, ± standard error)", *names, *([average] if averaged else [])], rows)


def print_table(results: Results, console: Console) -> None:
    """The paper's table on the terminal."""
    models = results.document["models"]
    averaged = max(model["summary"]["averaged"] for model in models)
    found = table(models, "average" if averaged == len(NAMES) else f"average of {averaged}")
    found.print(console, "scores (%) ± standard error over documents")
    console.print("acc_norm: normalised by the length of each choice; the others: acc")


@drawn
def draw(results: Results, path: Path) -> None:
    """Bars by task, one colour a model, with 95 % intervals; dashes mark the score of guessing."""
    models = [m for m in results.document["models"] if m["trials"]]
    planned: dict[str, int] = {}
    for task, documents in results.document["plan"]["documents"].items():
        planned[family(task)] = planned.get(family(task), 0) + documents
    columns = _columns(models)
    width = 0.8 / len(models)
    inches = max(7.0, len(columns) * (0.6 + 0.35 * len(models)))
    title = "Short-context benchmarks, with 95 % intervals over documents"
    figure = new_figure(inches, 4.6, title)
    axes = figure.add_subplot()
    for i, model in enumerate(models):
        own = [(x, c) for x, c in enumerate(columns) if c in model["summary"]["columns"]]
        scores = [main_score(model["summary"]["columns"], c) for _, c in own]
        axes.bar(
            [x + (i - (len(models) - 1) / 2) * width for x, _ in own],
            [score for score, _ in scores],
            width * 0.9,
            yerr=[1.96 * (error or 0) for _, error in scores],
            capsize=3,
            color=style(i)["color"],
            label=plain(name_of(model)),
        )
    known = [(x, CHANCE[column]) for x, column in enumerate(columns) if column in CHANCE]
    for i, (x, chance) in enumerate(known):
        label = "guessing" if i == 0 else None
        axes.hlines(chance, x - 0.45, x + 0.45, "black", "dashed", label=label)
    labels = [_tick(column, models, planned, inches / len(columns) - 0.3) for column in columns]
    axes.set_xticks(range(len(columns)), labels)
    axes.set_ylabel("score (%)")
    axes.set_ylim(0, 100)
    axes.grid(axis="y")
    legend_below(figure, axes)
    save(figure, path)


def _columns(models: Sequence[Record]) -> list[str]:
    """The columns that any model has: the paper's in its order, then others."""
    found = {column for model in models for column in model["summary"]["columns"]}
    return [c for c in NAMES if c in found] + sorted(found - set(NAMES))


def _tick(column: str, models: Sequence[Record], planned: dict[str, int], inches: float) -> str:
    """Name of a column, and how many of its documents were asked where that is not all."""
    done = max(sum(family(t["task"]) == column for t in m["trials"]) for m in models)
    lines = [plain(NAMES.get(column, column)), part_of(done, planned.get(column, 0), "")]
    metric = MAIN_METRICS.get(column)
    lines.insert(1, f"({metric})" if metric else "")
    return broken("\n".join(filter(None, lines)), inches)

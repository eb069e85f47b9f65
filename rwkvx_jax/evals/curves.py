"""Curves over a logarithmic axis of tokens, one a model, with bands of their 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rwkvx_jax.evals.intervals import Estimate
from rwkvx_jax.evals.plots import (
    drawn,
    legend_below,
    log_ticks,
    mark_trained,
    name_of,
    new_figure,
    part_of,
    plain,
    save,
    style,
)
from rwkvx_jax.evals.results import Results
from rwkvx_jax.records import Record

_WIDTH = 7.2

Curve = Callable[[Record], Sequence[tuple[float, Sequence[float | None]]]]
"""A model's summary -> its points: (tokens, value with its interval as `Estimate` has them)."""


@drawn
def draw_curves(
    results: Results,
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    ticks: Sequence[int],
    curve: Curve,
    level: Callable[[Record], float | None] = lambda summary: None,
) -> None:
    """Writes the figure.

    Args:
      results: of the models, each a line; those without a trial are left out.
      path: of the PNG.
      title: of the figure.
      x_label: what is counted in tokens; the tokenizer is added.
      y_label: what the curves show.
      ticks: tokens to be written at the axis. A longest training sequence is marked up to there.
      curve: see there.
      level: a model's summary -> where its dashed line is, if it has one.
    """
    document = results.document
    figure = new_figure(_WIDTH, 4.8, f"{title}; bands: 95 % intervals over documents")
    axes = figure.add_subplot()
    models = [model for model in document["models"] if model["trials"]]
    for i, model in enumerate(models):
        part = part_of(len(model["trials"]), document["plan"]["documents"], "documents")
        label = ", ".join(filter(None, [plain(name_of(model)), part]))
        color = style(i)["color"]
        if points := curve(model["summary"]):
            x, estimates = zip(*points, strict=True)
            value, low, high = np.array([Estimate(*e) for e in estimates], np.float64).T
            axes.plot(x, value, label=label, linewidth=1.3, **style(i))
            if np.isfinite(low).any():
                axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if (height := level(model["summary"])) is not None:
            axes.axhline(height, color=color, linestyle="--", linewidth=1.0)
    log_ticks(axes, ticks, _WIDTH - 1.0)
    places = [*ticks, *(x for model in models for x, _ in curve(model["summary"]))]
    factor = (max(places) / min(places)) ** 0.03
    axes.set_xlim(min(places) / factor, max(places) * factor)
    trained = {model["trained_length"] for model in models} - {None}
    mark_trained(axes, [length for length in trained if length <= max(places)])
    unit = f"{document['models'][0]['tokenizer']} tokens"
    axes.set(xlabel=f"{x_label} ({unit})", ylabel=y_label)
    axes.grid()
    legend_below(figure, axes)
    save(figure, path)

"""The forgetting curve: a passage of real text comes again after some distance; is it known?

Each trial reads two texts that differ at their beginning alone: [passage] [text between] [passage],
and the same with another part of the file in place of the first passage. What the second passage
loses there and not here is what the model still knows of the first; with the distance it goes to
zero where a model has forgotten. Source of the idea: the forgetting curve of arXiv 2410.04727.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import runner, texts
from rwkvx_jax.evals.curves import draw_curves
from rwkvx_jax.evals.documents import TextOptions, read_documents
from rwkvx_jax.evals.grid import Lengths
from rwkvx_jax.evals.intervals import Estimate
from rwkvx_jax.evals.models import EvalModel, require_at_least_1
from rwkvx_jax.evals.readers import TextScorer, TokenScores
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.evals.texts import MakeScorer, mean_loss
from rwkvx_jax.records import Record
from rwkvx_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CopyOptions(TextOptions):
    """What is left of a passage after a distance: loss and accuracy of its second reading."""

    length: int = 256
    """Tokens of the passage."""
    distances: Lengths = (256, 1024, 4096, 16384)
    """Tokens between the end of the passage and its second beginning."""
    lead: int = 16
    """Tokens of the second passage that are not judged: nobody can know yet that it comes again."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "lead")
        if self.lead >= self.length:
            raise ConfigError(f"--lead is {self.lead}: it must be below --length {self.length}")
        if not self.distances or min(self.distances) < 0:
            raise ConfigError(f"--distances is {self.distances}: name some, none negative")


class Passage(NamedTuple):
    """A trial: how far the passages are apart, and where the first stands."""

    distance: int
    file: str
    start: int


def passages(options: CopyOptions, tokenizer: Tokenizer) -> dict[Passage, list[np.ndarray]]:
    """Both texts of each trial, with the passage before and without; short distances first.

    All distances take the same passages: of a part of a file, the passage is the beginning, what
    stands between follows it, and the end takes its place in the second text.

    Raises:
      ConfigError: no text there, or none that is long enough.
    """
    size, longest = options.length, max(options.distances)
    shorten = "--distances, --length or --skip"
    documents = read_documents(options, tokenizer, 2 * size + longest - 1, shorten)
    found = {}
    for distance in sorted(set(options.distances)):
        for document, tokens in documents.items():
            passage, other = tokens[:size], tokens[-size:]
            between = tokens[size : size + distance]
            read = [np.concatenate([first, between, passage]) for first in (passage, other)]
            found[Passage(distance, *document)] = read
    return found


def evaluate(
    options: CopyOptions,
    models: Sequence[EvalModel],
    console: Console,
    make_scorer: MakeScorer = TextScorer,
) -> Results:
    """Runs the passages that are not finished yet, and keeps them in copy.jsonl.

    Raises:
      ConfigError: no text, no memory for one, or a results file of another evaluation.
    """

    def judge(model: EvalModel, passage: Passage, scores: Sequence[TokenScores]) -> Record:
        begin = options.length + passage.distance - 1 + options.lead
        known, new = scores
        return {
            "loss": mean_loss(known, begin),
            "loss_without": mean_loss(new, begin),
            "right": float(known.hits[begin:].mean()),
            "right_without": float(new.hits[begin:].mean()),
        }

    return texts.evaluate(
        options,
        models,
        console,
        name="copy",
        settings={
            "length": options.length,
            "skip": options.skip,
            "lead": options.lead,
            "longest": max(options.distances),  # decides which parts of a file are taken
        },
        texts=passages(options, models[0].tokenizer),
        judge=judge,
        summarize=summarize,
        make_scorer=make_scorer,
    )


def summarize(trials: Sequence[Record]) -> Record:
    """Means over passages by distance: the gain (nats per token), and tokens that are right."""
    found = []
    for distance in sorted({trial["distance"] for trial in trials}):
        own = [trial for trial in trials if trial["distance"] == distance]
        mean = lambda values: Estimate.of_ratio(values, [1.0] * len(values))
        found.append(
            {
                "distance": distance,
                "passages": len(own),
                "gain": mean([trial["loss_without"] - trial["loss"] for trial in own]),
                "loss_without": mean([trial["loss_without"] for trial in own]),
                "right": mean([trial["right"] for trial in own]),
                "right_without": mean([trial["right_without"] for trial in own]),
            }
        )
    return {"by_distance": found}


def draw(results: Results, path: Path) -> None:
    """Gain by distance, a line a model."""
    document = results.document
    length = document["settings"]["length"]
    most = max(p["passages"] for m in document["models"] for p in m["summary"]["by_distance"])
    distances = {t["distance"] for model in document["models"] for t in model["trials"]}
    draw_curves(
        results,
        path,
        title=f"What is left of a passage of {length:,} tokens ({most} passages): its loss when "
        "read for the first time, less its loss when read again",
        x_label="tokens between the two",
        y_label="gain (nats per token)",
        ticks=sorted(max(1, distance) for distance in distances),
        curve=lambda summary: [
            (max(1, part["distance"]), part["gain"]) for part in summary["by_distance"]
        ],
    )


def table(models: list[Record]) -> Table:
    """A row a model: gain, and share of right tokens, by distance."""
    distances = sorted({p["distance"] for m in models for p in m["summary"]["by_distance"]})
    rows = []
    for model in models:
        own = {part["distance"]: part for part in model["summary"]["by_distance"]}
        rows.append([model["label"], *[_cell(own.get(distance)) for distance in distances]])
    columns = [f"{distance:,}" for distance in distances]
    return Table(["model (gain in nats per token, tokens right in %; by distance)", *columns], rows)


def _cell(part: Record | None) -> str:
    if part is None:
        return "–"
    return f"{Estimate(*part['gain']).text(2)}, {100 * Estimate(*part['right']).value:.0f} %"


def differences(models: list[Record]) -> Table:
    """A row for each model but the first: how much more the first gains by the same passages."""
    first, *others = models
    distances = sorted({trial["distance"] for model in models for trial in model["trials"]})
    gain = lambda trial: trial["loss_without"] - trial["loss"]
    rows = []
    for other in others:
        both = texts.pairs(first, other, Passage._fields)
        row = [other["label"]]
        for distance in distances:
            own = [gain(a) - gain(b) for a, b in both if a["distance"] == distance]
            row.append(Estimate.of_ratio(own, [1.0] * len(own)).text(2) if own else "–")
        rows.append(row)
    columns = [f"{distance:,}" for distance in distances]
    return Table([f"gain of {first['label']} less that of", *columns], rows)


def score(summary: Record) -> Estimate | None:
    """Mean gain at the longest distance, nats per token."""
    parts = summary["by_distance"]
    return Estimate(*parts[-1]["gain"]) if parts else None


def run(options: CopyOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes copy.jsonl and copy.png, prints a table."""

    def show(results: Results, console: Console) -> None:
        models = [model for model in results.document["models"] if model["trials"]]
        table(models).print(console, "what is left of a passage")
        if len(models) > 1:
            differences(models).print(console, "the same passages, one by one")

    runner.run(options, evaluate, runner.shows(draw, show), models)

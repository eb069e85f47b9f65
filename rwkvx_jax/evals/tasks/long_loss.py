"""Loss by position on long documents: does more context still help, and where does it stop?

Documents are parts of text files, all of one length, read from an empty state; each token's loss
counts at the number of tokens before it. One line a checkpoint. Source of the protocol: the RWKV-X
repository's long loss (spec section 6), which has the mean alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from rwkvx_jax.evals import runner, texts
from rwkvx_jax.evals.curves import draw_curves
from rwkvx_jax.evals.documents import Document, TextOptions, read_documents
from rwkvx_jax.evals.intervals import Estimate, standard_error
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.readers import TextScorer, TokenScores
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.evals.texts import MakeScorer, mean_loss
from rwkvx_jax.records import Record

_FIRST_BIN = 64


@dataclass(frozen=True, kw_only=True)
class LongLossOptions(TextOptions):
    """Loss by position in long documents; draws one line for each checkpoint."""


def bin_edges(length: int) -> list[int]:
    """Borders of the bins of positions: 0, 64, 96, 128, 192, ... up to `length`.

    They do not depend on the length otherwise, so that results of different lengths agree.
    """
    edges, size = [0], _FIRST_BIN
    while size < length:
        edges += [size, size + size // 2]
        size *= 2
    return [edge for edge in edges if edge < length] + [length]


def summarize(trials: Sequence[Record]) -> Record:
    """Mean losses over documents with standard errors: of whole documents, and by position."""

    def over(values: Sequence[float]) -> Record:
        mean, error = float(np.mean(values)), standard_error(values)
        return {"loss": mean, "error": error, "documents": len(values)}

    if not trials:
        return {"all": None, "by_position": []}
    edges = trials[0]["edges"]
    return {
        "all": over([trial["loss"] for trial in trials]),
        "by_position": [
            {"begin": begin, "end": end} | over([trial["losses"][i] for trial in trials])
            for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False))
        ],
    }


def evaluate(
    options: LongLossOptions,
    models: Sequence[EvalModel],
    console: Console,
    make_scorer: MakeScorer = TextScorer,
) -> Results:
    """Runs the documents that are not finished yet, and keeps them in long_loss.jsonl.

    Raises:
      ConfigError: no document, no memory for one, or a results file of another evaluation.
    """
    edges = bin_edges(options.length)

    def judge(model: EvalModel, document: Document, scores: Sequence[TokenScores]) -> Record:
        (own,) = scores
        means = [mean_loss(own, a, b) for a, b in zip(edges, edges[1:], strict=False)]
        return {"loss": mean_loss(own), "edges": edges, "losses": means}

    documents = read_documents(options, models[0].tokenizer)
    return texts.evaluate(
        options,
        models,
        console,
        name="long-loss",
        settings={"length": options.length, "skip": options.skip},
        texts={document: [tokens] for document, tokens in documents.items()},
        judge=judge,
        summarize=summarize,
        make_scorer=make_scorer,
    )


def draw(results: Results, path: Path) -> None:
    """One line a model over positions, with 95 % bands over documents."""
    document = results.document
    length, planned = document["settings"]["length"], document["plan"]["documents"]
    place = lambda b: max(1.0, (b["begin"] * b["end"]) ** 0.5) if b["begin"] else b["end"] / 2
    octaves = [edge for edge in bin_edges(length) if edge.bit_count() == 1]
    draw_curves(
        results,
        path,
        title=f"Loss by position, {planned} documents of {length:,} tokens",
        x_label="position in the document",
        y_label="loss (nats per token)",
        ticks=[*octaves, length],
        curve=lambda summary: [
            (place(b), Estimate.of_mean(b["loss"], b["error"])) for b in summary["by_position"]
        ],
    )


def print_table(results: Results, console: Console) -> None:
    """A row for each octave of positions, a column for each model."""
    models = results.document["models"]
    lines: dict[tuple[int, int], list[str]] = {}
    for column, model in enumerate(models):
        for b in model["summary"]["by_position"]:
            cells = lines.setdefault((b["begin"], b["end"]), ["–"] * len(models))
            error = f" ± {1.96 * b['error']:.3f}" if b["error"] is not None else ""
            cells[column] = f"{b['loss']:.3f}{error}"
    rows = [[f"{begin:,} to {end:,}", *cells] for (begin, end), cells in sorted(lines.items())]
    whole = [model["summary"]["all"] for model in models]
    rows.append(["all", *[f"{mean['loss']:.4f}" if mean else "–" for mean in whole]])
    columns = ["positions", *[model["label"] for model in models]]
    Table(columns, rows).print(console, "loss (nats per token)")


def score(summary: Record) -> Estimate:
    """Mean loss over whole documents, nats per token."""
    return Estimate.of_mean(summary["all"]["loss"], summary["all"]["error"])


def table(models: list[Record]) -> Table:
    """A row a model: mean loss in each octave of positions, of which results hold the halves."""
    octaves: dict[tuple[int, int], None] = {}
    means = []
    for model in models:
        own: dict[int, list[tuple[int, int, float]]] = {}
        for b in model["summary"]["by_position"]:
            own.setdefault(int(b["begin"]).bit_length(), []).append(
                (b["begin"], b["end"], b["loss"])
            )
        spans = {}
        for parts in own.values():
            tokens = sum(end - begin for begin, end, _ in parts)
            total = sum((end - begin) * loss for begin, end, loss in parts)
            spans[parts[0][0], parts[-1][1]] = total / tokens
        octaves |= dict.fromkeys(spans)
        means.append(spans)
    rows = []
    for model, own in zip(models, means, strict=True):
        whole = model["summary"]["all"]
        cells = [f"{own[o]:.3f}" if o in own else "–" for o in sorted(octaves)]
        rows.append([model["label"], *cells, f"{whole['loss']:.4f}" if whole else "–"])
    columns = [f"{begin:,}–{end:,}" for begin, end in sorted(octaves)]
    return Table(["model (nats per token at positions)", *columns, "all"], rows)


def run(options: LongLossOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes long_loss.jsonl and long_loss.png, prints a table."""
    runner.run(options, evaluate, runner.shows(draw, print_table), models)

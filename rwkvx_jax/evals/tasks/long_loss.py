"""Loss by position on long documents: does more context still help, and where does it stop?

Documents are parts of text files, all of one length, read from an empty state; each token's loss
counts at the number of tokens before it. One line a checkpoint. Source of the protocol: the RWKV-X
repository's long loss (spec section 6), which has the mean alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rwkvx_jax.evals import runner
from rwkvx_jax.evals.documents import Document, TextOptions, read_documents
from rwkvx_jax.evals.intervals import Estimate, standard_error
from rwkvx_jax.evals.models import EvalModel
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
from rwkvx_jax.evals.readers import TextScorer, affordable_batch, check_memory
from rwkvx_jax.evals.results import Results, Task
from rwkvx_jax.evals.runner import even_batches
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.progress import Progress
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
    make_scorer: Callable[..., Any] = TextScorer,
) -> Results:
    """Runs the documents that are not finished yet, and keeps them in long_loss.jsonl.

    Args:
      options: the flags.
      models: with the same tokenizer.
      console: shows the progress.
      make_scorer: (model, prefill_chunk=, batch=, longest=) -> a function as `TextScorer` is one.

    Raises:
      ConfigError: no document, no memory for one, or a results file of another evaluation.
    """
    chunk, free = min(options.prefill_chunk, options.length), memory_left()
    batch = options.batch and min(options.batch, options.documents)
    for model in models:
        check_memory(model, options.length, chunk, None, free, batch)
    documents = read_documents(options, models[0].tokenizer)
    task = Task(
        name="long-loss",
        settings={"length": options.length, "skip": options.skip},
        plan={"text": str(options.text), "documents": len(documents), "limit": options.limit},
        trials=list(documents),
        chosen=list(documents)[: options.limit],
        answer=partial(_score, options, documents, make_scorer),
        summarize=summarize,
        size=lambda document: options.length,
    )
    return runner.evaluate(task, options.output, models, console)


def _score(
    options: LongLossOptions,
    documents: dict[Document, np.ndarray],
    make_scorer: Callable[..., Any],
    model: EvalModel,
    chosen: Sequence[Document],
    progress: Progress,
) -> Iterator[list[Record]]:
    """Losses of one model, batch by batch."""
    chunk, edges = min(options.prefill_chunk, options.length), bin_edges(options.length)
    batch = options.batch or affordable_batch(model, options.length, chunk)
    batch = min(batch, len(chosen))
    scorer = make_scorer(model, prefill_chunk=chunk, batch=batch, longest=options.length)
    for part in even_batches(chosen, batch):
        progress.describe(f"{model.label}, {part[0].file} from token {part[0].start:,}")
        losses = scorer([documents[document] for document in part], progress.advance)
        yield [_record(document, own, edges) for document, own in zip(part, losses, strict=True)]


def _record(document: Document, losses: np.ndarray, edges: list[int]) -> Record:
    losses = losses.astype(np.float64)
    means = [losses[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
    return document._asdict() | {"loss": float(losses.mean()), "edges": edges, "losses": means}


@drawn
def draw(results: Results, path: Path) -> None:
    """One line a model over positions, with 95 % bands over documents."""
    document = results.document
    length, planned = document["settings"]["length"], document["plan"]["documents"]
    width = 7.2
    figure = new_figure(
        width,
        4.8,
        f"Loss by position, {planned} documents of {length:,} tokens; "
        "bands: 95 % intervals over documents",
    )
    axes = figure.add_subplot()
    models = [m for m in document["models"] if m["trials"]]
    for i, model in enumerate(models):
        bins = model["summary"]["by_position"]
        x = [max(1.0, (b["begin"] * b["end"]) ** 0.5) if b["begin"] else b["end"] / 2 for b in bins]
        loss = np.array([b["loss"] for b in bins])
        part = part_of(len(model["trials"]), planned, "documents")
        label = ", ".join(filter(None, [plain(name_of(model)), part]))
        axes.plot(x, loss, label=label, linewidth=1.3, **style(i))
        if bins[0]["error"] is not None:
            half = 1.96 * np.array([b["error"] for b in bins])
            color = style(i)["color"]
            axes.fill_between(x, loss - half, loss + half, color=color, alpha=0.15, linewidth=0)
    octaves = [edge for edge in bin_edges(length) if edge.bit_count() == 1]
    log_ticks(axes, [*octaves, length], width - 1.0)
    mark_trained(axes, [model["trained_length"] for model in models])
    unit = f"{document['models'][0]['tokenizer']} tokens"
    axes.set(xlabel=f"position in the document ({unit})", ylabel="loss (nats per token)")
    axes.grid()
    legend_below(figure, axes)
    save(figure, path)


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
        texts = [f"{own[o]:.3f}" if o in own else "–" for o in sorted(octaves)]
        rows.append([model["label"], *texts, f"{whole['loss']:.4f}" if whole else "–"])
    columns = [f"{begin:,}–{end:,}" for begin, end in sorted(octaves)]
    return Table(["model (nats per token at positions)", *columns, "all"], rows)


def run(options: LongLossOptions) -> None:
    """The command: evaluates, writes long_loss.jsonl and long_loss.png, prints a table."""
    runner.run(options, evaluate, runner.shows(draw, print_table))

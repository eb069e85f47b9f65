"""Loss by position on long documents: does more context still help, and where does it stop?

Documents are pieces of text files, all of one length, read from an empty state; each token's loss
counts at the number of tokens before it. One line a checkpoint. Source of the protocol: the RWKV-X
repository's long loss (spec section 6), which has the mean alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rwkvx_jax.evals.common import (
    IDENTITY_FIELDS,
    Subject,
    even_batches,
    open_console,
    open_subjects,
    until_interrupted,
)
from rwkvx_jax.evals.documents import Document, TextOptions, read_documents
from rwkvx_jax.evals.figures import MARK, new_figure, plain, save, style
from rwkvx_jax.evals.reader import affordable_batch, check_memory
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.scoring import TextScorer
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
        spread = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        return {"loss": float(np.mean(values)), "error": spread, "documents": len(values)}

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
    subjects: Sequence[Subject],
    console: Console,
    make_scorer: Callable[..., Any] = TextScorer,
) -> Results:
    """Runs the documents that are not finished yet, and writes long_loss.jsonl.

    Args:
      options: the flags.
      subjects: models with the same tokenizer.
      console: shows the progress.
      make_scorer: (subject, piece=, batch=, longest=) -> a function as `TextScorer` is one.

    Raises:
      ConfigError: no document, no memory for one, or a results file of another evaluation.
    """
    piece, free = min(options.piece, options.length), memory_left()
    batch = options.batch and min(options.batch, options.documents)
    for subject in subjects:
        check_memory(subject, options.length, piece, None, free, batch)
    documents = read_documents(options, subjects[0].tokenizer)
    results = Results(
        options.output / "long_loss.jsonl",
        task="long-loss",
        settings={"length": options.length, "skip": options.skip},
        plan={"text": str(options.text), "documents": len(documents), "limit": options.limit},
        key_fields=Document._fields,
        planned=documents,
        models=[subject.description for subject in subjects],
        identity_fields=IDENTITY_FIELDS,
        summarize=summarize,
    )
    pending = {}
    for subject in subjects:
        finished = results.finished(subject.label)
        pending[subject.label] = [d for d in list(documents)[: options.limit] if d not in finished]
    total = options.length * sum(map(len, pending.values()))
    with Progress(console, total, "tokens") as tracker:
        for subject in subjects:
            if todo := pending[subject.label]:
                _run(
                    options, subject, {d: documents[d] for d in todo}, results, tracker, make_scorer
                )
    return results


def _run(
    options: LongLossOptions,
    subject: Subject,
    documents: dict[Document, np.ndarray],
    results: Results,
    tracker: Progress,
    make_scorer: Callable[..., Any],
) -> None:
    piece, edges = min(options.piece, options.length), bin_edges(options.length)
    batch = options.batch or affordable_batch(subject, options.length, piece)
    batch = min(batch, len(documents))
    scorer = make_scorer(subject, piece=piece, batch=batch, longest=options.length)
    for i, chosen in enumerate(even_batches(list(documents), batch)):
        tracker.describe(f"{subject.label}, {chosen[0].file} from token {chosen[0].start:,}")
        losses = scorer([documents[d] for d in chosen], tracker.advance)
        results.add(
            subject.label, [_record(d, own, edges) for d, own in zip(chosen, losses, strict=True)]
        )
        if i == 0:
            tracker.start_clock()


def _record(document: Document, losses: np.ndarray, edges: list[int]) -> Record:
    losses = losses.astype(np.float64)
    means = [losses[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
    return document._asdict() | {"loss": float(losses.mean()), "edges": edges, "losses": means}


def draw(results: Results, path: Path, tokenizer: str) -> None:
    """One line a model over positions, with 95 % bands over documents."""
    document = results.document
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for i, panel in enumerate(document["models"]):
        bins = [b for b in panel["summary"]["by_position"]]
        if not bins:
            continue
        x = [max(1.0, (b["begin"] * b["end"]) ** 0.5) if b["begin"] else b["end"] / 2 for b in bins]
        loss = np.array([b["loss"] for b in bins])
        axes.plot(x, loss, label=plain(panel["label"]), markersize=4, linewidth=1.3, **style(i))
        if bins[0]["error"] is not None:
            half = 1.96 * np.array([b["error"] for b in bins])
            color = style(i)["color"]
            axes.fill_between(x, loss - half, loss + half, color=color, alpha=0.15, linewidth=0)
    lengths = sorted({p["trained_length"] for p in document["models"]} - {None})
    for i, length in enumerate(lengths):
        label = "longest training sequence" if i == 0 else None
        axes.axvline(length, label=label, linewidth=1.5, **MARK)
    count = document["plan"]["documents"]
    axes.set(
        xscale="log",
        xlabel=f"position in the document ({tokenizer} tokens)",
        ylabel="loss (nats per token)",
    )
    axes.set_title(
        f"Loss by position, {count} documents of {document['settings']['length']:,} tokens; "
        "bands: 95 % over documents",
        fontsize=10,
    )
    axes.grid(alpha=0.4)
    axes.legend(fontsize=8)
    save(figure, path)


def print_table(results: Results, console: Console) -> None:
    """A row for each octave of positions, a column for each model."""
    panels = results.document["models"]
    table = Table("positions", *[panel["label"] for panel in panels], title="loss (nats per token)")
    lines: dict[tuple[int, int], list[str]] = {}
    for column, panel in enumerate(panels):
        for b in panel["summary"]["by_position"]:
            cells = lines.setdefault((b["begin"], b["end"]), ["–"] * len(panels))
            error = f" ± {1.96 * b['error']:.3f}" if b["error"] is not None else ""
            cells[column] = f"{b['loss']:.3f}{error}"
    for (begin, end), cells in sorted(lines.items()):
        table.add_row(f"{begin:,} to {end:,}", *cells)
    whole = [panel["summary"]["all"] for panel in panels]
    table.add_row("all", *[f"{mean['loss']:.4f}" if mean else "–" for mean in whole])
    console.print(table)


def run(options: LongLossOptions) -> None:
    """The command: evaluates, writes long_loss.jsonl and long_loss.png, prints a table."""
    console = open_console()
    subjects = open_subjects(options)
    with until_interrupted(console):
        results = evaluate(options, subjects, console)
    path = results.path.with_suffix(".png")
    draw(results, path, subjects[0].tokenizer.name)
    print_table(results, console)
    console.print(f"wrote {results.path} and {path}", soft_wrap=True)

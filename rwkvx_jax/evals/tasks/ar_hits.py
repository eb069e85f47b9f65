"""Recall in plain text: the loss of words that the document has said before.

A prediction is a hit if its token ends an n-gram that occurred earlier in the document: to look it
up is enough. Hits are told apart by the distance to the latest occurrence and by how many there
were; all other predictions stand beside them. Two models of equal loss on the others differ in
recall alone. Source of the measure: Zoology (arXiv 2312.04927, "AR hits", with bigrams).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import runner, texts
from rwkvx_jax.evals.curves import draw_curves
from rwkvx_jax.evals.documents import Document, TextOptions, read_documents
from rwkvx_jax.evals.intervals import Estimate
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.readers import TextScorer, TokenScores
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.evals.texts import MakeScorer
from rwkvx_jax.records import Record

_MOST_BYTES_VOCABULARY = 512  # a vocabulary of single bytes, not of words
_BYTE_NGRAM, _WORD_NGRAM = 8, 2


@dataclass(frozen=True, kw_only=True)
class ArHitsOptions(TextOptions):
    """Loss of tokens that end an n-gram which the document has had before, by distance."""

    ngram: int = 0
    """Tokens of an n-gram, the predicted one included. Default: 2, as in Zoology; 8 where a token
    is a byte."""

    def __post_init__(self):
        super().__post_init__()
        if self.ngram != 0 and not 2 <= self.ngram <= self.length:
            raise ConfigError(f"--ngram is {self.ngram}: use 2 to --length, or 0 for the default")


class Repeats(NamedTuple):
    """Which predictions of a document are hits.

    Attributes:
      distance: int64 [T], tokens since the n-gram last occurred; 0: it is new.
      times: int64 [T], how often it occurred before.
    """

    distance: np.ndarray
    times: np.ndarray


def find_repeats(tokens: np.ndarray, ngram: int) -> Repeats:
    """The repeats among the predictions of tokens[1:].

    Args:
      tokens: integers [T + 1].
      ngram: tokens that have to agree, the predicted one included; at least 2.
    """
    distance, times = np.zeros((2, len(tokens) - 1), np.int64)
    if len(tokens) <= ngram:
        return Repeats(distance, times)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, ngram)
    _, kind = np.unique(windows, axis=0, return_inverse=True)
    order = np.argsort(kind.ravel(), kind="stable")  # equal ones side by side, in reading order
    same = np.diff(kind.ravel()[order]) == 0
    later = order[1:][same] + ngram - 2  # prediction that ends the n-gram
    distance[later] = np.diff(order)[same]
    place = np.arange(len(order))
    begins = np.maximum.accumulate(np.where(np.r_[True, ~same], place, 0))
    times[order + ngram - 2] = place - begins
    return Repeats(distance, times)


def evaluate(
    options: ArHitsOptions,
    models: Sequence[EvalModel],
    console: Console,
    make_scorer: MakeScorer = TextScorer,
) -> Results:
    """Runs the documents that are not finished yet, and keeps them in ar_hits.jsonl.

    Raises:
      ConfigError: no document, no memory for one, or a results file of another evaluation.
    """
    tokenizer = models[0].tokenizer
    default = _BYTE_NGRAM if tokenizer.vocab_size <= _MOST_BYTES_VOCABULARY else _WORD_NGRAM
    ngram = options.ngram or default
    documents = read_documents(options, tokenizer)

    def judge(model: EvalModel, document: Document, scores: Sequence[TokenScores]) -> Record:
        (own,) = scores
        repeats = find_repeats(documents[document], ngram)
        losses = own.losses.astype(np.float64)
        known = losses[ngram - 2 :]  # before, no n-gram has ended
        fresh = repeats.distance[ngram - 2 :] == 0
        return {
            "others": {"tokens": int(fresh.sum()), "loss": float(known[fresh].sum())},
            "distance": _by_octave(repeats.distance, losses),
            "times": _by_octave(repeats.times, losses),
        }

    return texts.evaluate(
        options,
        models,
        console,
        name="ar-hits",
        settings={"length": options.length, "skip": options.skip, "ngram": ngram},
        texts={document: [tokens] for document, tokens in documents.items()},
        judge=judge,
        summarize=summarize,
        make_scorer=make_scorer,
    )


def _by_octave(values: np.ndarray, losses: np.ndarray) -> list[Record]:
    """Hits and the sum of their losses where 2^i <= value < 2^(i + 1), for i = 0, 1, ..."""
    octave = np.frexp(values)[1] - 1  # -1 for 0
    counts = np.bincount(octave[octave >= 0])
    sums = np.bincount(octave[octave >= 0], losses[octave >= 0])
    return [{"tokens": int(n), "loss": float(s)} for n, s in zip(counts, sums, strict=True)]


def summarize(trials: Sequence[Record]) -> Record:
    """Mean loss of all hits, of the others, and of hits by octaves of distance and number."""
    return {
        "hits": _mean([_all_hits(trial) for trial in trials]),
        "others": _mean([trial["others"] for trial in trials]),
        "distance": _octaves(trials, "distance"),
        "times": _octaves(trials, "times"),
    }


def _all_hits(trial: Record) -> Record:
    """Hits of a document and the sum of their losses."""
    return {key: sum(part[key] for part in trial["distance"]) for key in ("tokens", "loss")}


def _octaves(trials: Sequence[Record], by: str) -> list[Record]:
    """Means over documents in each octave that any document has."""
    count = max((len(trial[by]) for trial in trials), default=0)
    found = []
    for i in range(count):
        parts = [trial[by][i] for trial in trials if i < len(trial[by])]
        if mean := _mean(parts):
            found.append({"begin": 2**i, "end": 2 ** (i + 1)} | mean)
    return found


def _mean(parts: Sequence[Record]) -> Record | None:
    """Loss a token over documents, with its interval; None without a token."""
    tokens = [part["tokens"] for part in parts]
    if not sum(tokens):
        return None
    estimate = Estimate.of_ratio([part["loss"] for part in parts], tokens)
    return {"tokens": sum(tokens), "loss": estimate}


def draw(results: Results, path: Path) -> None:
    """Loss of hits by distance, a line a model; dashed: of all other tokens."""
    document = results.document
    settings, planned = document["settings"], document["plan"]["documents"]
    draw_curves(
        results,
        path,
        title=f"Loss of the last token of a repeated {settings['ngram']}-gram (dashed: of all "
        f"other tokens), {planned} documents of {settings['length']:,} tokens",
        x_label="distance to its latest occurrence",
        y_label="loss (nats per token)",
        ticks=[2**i for i in range(settings["length"].bit_length())],
        curve=lambda summary: [(b["begin"] * 2**0.5, b["loss"]) for b in summary["distance"]],
        level=lambda summary: summary["others"] and summary["others"]["loss"][0],
    )


def table(models: list[Record]) -> Table:
    """A row a model: mean loss of hits by distance, of all hits, and of all others."""
    octaves = [{(b["begin"], b["end"]): b for b in m["summary"]["distance"]} for m in models]
    ends = sorted(set().union(*octaves))
    rows = []
    for model, own in zip(models, octaves, strict=True):
        summary = model["summary"]
        parts = [*[own.get(octave) for octave in ends], summary["hits"], summary["others"]]
        cells = [Estimate(*part["loss"]).text() if part else "–" for part in parts]
        rows.append([model["label"], *cells])
    return Table(["model (nats per token; hits by distance)", *_columns(ends)], rows)


def gains(models: list[Record]) -> Table:
    """A row for each model but the first: how much less loss the first has on the same tokens."""
    first, *others = models
    rows, count = [], max(len(t["distance"]) for m in models for t in m["trials"])
    for other in others:
        both = texts.pairs(first, other, ("file", "start"))
        by_octave = lambda i: (
            lambda trial: trial["distance"][i] if i < len(trial["distance"]) else None
        )
        parts = [*map(by_octave, range(count)), _all_hits, lambda trial: trial["others"]]
        rows.append([other["label"], *[_gain(both, part) for part in parts]])
    ends = [(2**i, 2 ** (i + 1)) for i in range(count)]
    return Table([f"loss less that of {first['label']}", *_columns(ends)], rows)


def _columns(octaves: Sequence[tuple[int, int]]) -> list[str]:
    names = [f"{begin:,}–{end - 1:,}" if end - begin > 1 else f"{begin}" for begin, end in octaves]
    return [*names, "all hits", "all others"]


def _gain(both: Sequence[tuple[Record, Record]], part: Callable[[Record], Record | None]) -> str:
    parts = [(part(ours), part(theirs)) for ours, theirs in both]
    found = [(ours, theirs) for ours, theirs in parts if ours and theirs]
    tokens = [ours["tokens"] for ours, _ in found]
    if not sum(tokens):
        return "–"
    return Estimate.of_ratio([b["loss"] - a["loss"] for a, b in found], tokens).text()


def score(summary: Record) -> Estimate | None:
    """Mean loss of all hits, nats per token."""
    return Estimate(*summary["hits"]["loss"]) if summary["hits"] else None


def run(options: ArHitsOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes ar_hits.jsonl and ar_hits.png, prints a table."""

    def show(results: Results, console: Console) -> None:
        models = [model for model in results.document["models"] if model["trials"]]
        table(models).print(console, "recall in plain text")
        if len(models) > 1:
            gains(models).print(console, "the same tokens, document by document")

    runner.run(options, evaluate, runner.shows(draw, show), models)

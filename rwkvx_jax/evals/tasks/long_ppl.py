"""Use of long context: the same predictions with the whole document before them, and with little.

Every document is read once as a whole, and again in windows, so that each prediction has at least
`window` and less than `window + stride` tokens before it: LongCE's windows (training/losses.py).
The difference is what the model makes of the rest. LongPPL (arXiv 2410.23771) looks at key tokens
alone: those that a judge, here the first checkpoint, predicts well, and much better from the whole
document than from a window. All models are measured on the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from rwkvx_jax.config import ConfigError
from rwkvx_jax.config.experiment import LongCEConfig
from rwkvx_jax.evals import runner, texts
from rwkvx_jax.evals.curves import draw_curves
from rwkvx_jax.evals.documents import Document, TextOptions, read_documents
from rwkvx_jax.evals.intervals import Estimate
from rwkvx_jax.evals.models import EvalModel, require_at_least_1
from rwkvx_jax.evals.readers import TextScorer, TokenScores
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.evals.texts import MakeScorer
from rwkvx_jax.records import Record
from rwkvx_jax.training.losses import longce_starts


@dataclass(frozen=True, kw_only=True)
class LongPplOptions(TextOptions):
    """Loss with the whole document as context against the last tokens alone, and LongPPL."""

    window: int = 4096
    """Fewest tokens of the short context."""
    stride: int = 1024
    """The short context has at most so many more; smaller takes longer."""
    gain: float = 2.0
    """A key token is predicted better from the whole document by more than so many nats ..."""
    most_loss: float = 2.0
    """... and has less loss than this (LongPPL's alpha and -beta), both by the first checkpoint."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "window", "stride")
        if self.length <= 2 * self.window:
            raise ConfigError(
                f"--length is {self.length:,}: it must exceed twice --window {self.window:,}, as "
                "the first prediction that is compared has so many tokens before it"
            )


class Contexts(NamedTuple):
    """Losses of the same predictions of a document, float64 [N], from the 2 * window-th on."""

    long: np.ndarray
    short: np.ndarray


class Windows:
    """How documents are cut."""

    def __init__(self, options: LongPplOptions):
        self._window, self._span = options.window, options.window + options.stride
        longce = LongCEConfig(window=options.window, stride=options.stride)
        self._starts = longce_starts(options.length, longce)

    def texts(self, tokens: np.ndarray) -> list[np.ndarray]:
        """The document, and its windows."""
        return [tokens, *[tokens[s : s + self._span + 1] for s in self._starts]]

    def contexts(self, scores: Sequence[TokenScores]) -> Contexts:
        """From the scores of these texts."""
        whole, *windows = (score.losses.astype(np.float64) for score in scores)
        short = np.concatenate([own[self._window :] for own in windows])
        return Contexts(whole[2 * self._window :], short)


class KeyTokens:
    """Which predictions count in LongPPL, by one model that stays the judge."""

    def __init__(
        self,
        options: LongPplOptions,
        judge: EvalModel,
        texts: texts.Texts,
        windows: Windows,
        make_scorer: MakeScorer,
    ):
        self._options, self._judge, self._texts, self._windows = options, judge, texts, windows
        self._make_scorer = make_scorer
        self._known: dict[Document, np.ndarray] = {}

    def learn(self, document: Document, own: Contexts) -> None:
        """Takes the judge's losses of a document."""
        gained = own.short - own.long > self._options.gain
        self._known[document] = gained & (own.long < self._options.most_loss)

    def __call__(self, document: Document) -> np.ndarray:
        """bool [N]; the judge reads the document where an earlier run has finished it."""
        if document not in self._known:
            length = self._options.length
            size = min(self._options.prefill_chunk, length)
            scorer = self._make_scorer(self._judge, prefill_chunk=size, batch=1, longest=length)
            scores = scorer(self._texts[document], lambda count: None)
            self.learn(document, self._windows.contexts(scores))
        return self._known[document]


def evaluate(
    options: LongPplOptions,
    models: Sequence[EvalModel],
    console: Console,
    make_scorer: MakeScorer = TextScorer,
) -> Results:
    """Runs the documents that are not finished yet, and keeps them in longppl.jsonl.

    Raises:
      ConfigError: no document, no memory for one, or a results file of another evaluation.
    """
    windows = Windows(options)
    documents = read_documents(options, models[0].tokenizer)
    read = {document: windows.texts(tokens) for document, tokens in documents.items()}
    keys = KeyTokens(options, models[0], read, windows, make_scorer)
    edges = bin_edges(options)

    def judge(model: EvalModel, document: Document, scores: Sequence[TokenScores]) -> Record:
        own = windows.contexts(scores)
        if model is models[0]:
            keys.learn(document, own)
        key = keys(document)
        sums = lambda losses: [
            float(losses[a - edges[0] : b - edges[0]].sum())
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        return {
            "key_tokens": int(key.sum()),
            "key_loss": float(own.long[key].sum()),
            "key_loss_short": float(own.short[key].sum()),
            "edges": edges,
            "losses": sums(own.long),
            "losses_short": sums(own.short),
        }

    return texts.evaluate(
        options,
        models,
        console,
        name="longppl",
        settings={
            "length": options.length,
            "skip": options.skip,
            "window": options.window,
            "stride": options.stride,
            "gain": options.gain,
            "most_loss": options.most_loss,
            "judge": models[0].description["parameters"],
        },
        texts=read,
        judge=judge,
        summarize=summarize,
        make_scorer=make_scorer,
    )


def bin_edges(options: LongPplOptions) -> list[int]:
    """Borders of the bins of positions: 2, 4, 8, ... windows, up to the length."""
    edges = [2 * options.window]
    while 2 * edges[-1] < options.length:
        edges.append(2 * edges[-1])
    return [*edges, options.length]


def summarize(trials: Sequence[Record]) -> Record:
    """LongPPL, and the gain by the long context: of all predictions, of key tokens, by position."""
    if not trials:
        return {"key": None, "gain": None, "by_position": []}
    edges = trials[0]["edges"]
    counts = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    gains = [[s - w for s, w in zip(t["losses_short"], t["losses"], strict=True)] for t in trials]
    mean = lambda sums, tokens: Estimate.of_ratio(sums, [tokens] * len(sums))
    key_tokens = [trial["key_tokens"] for trial in trials]
    key = None
    if sum(key_tokens):
        key = {
            "tokens": sum(key_tokens),
            "share": sum(key_tokens) / (sum(counts) * len(trials)),
            "loss": Estimate.of_ratio([trial["key_loss"] for trial in trials], key_tokens),
            "loss_short": Estimate.of_ratio([t["key_loss_short"] for t in trials], key_tokens),
        }
    return {
        "key": key,
        "loss": mean([sum(trial["losses"]) for trial in trials], sum(counts)),
        "gain": mean([sum(own) for own in gains], sum(counts)),
        "by_position": [
            {"begin": a, "end": b, "gain": mean([own[i] for own in gains], counts[i])}
            for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
        ],
    }


def draw(results: Results, path: Path) -> None:
    """Gain by the long context by position, a line a model."""
    document = results.document
    settings, planned = document["settings"], document["plan"]["documents"]
    window, stride = settings["window"], settings["stride"]
    bins = [b for model in document["models"] for b in model["summary"]["by_position"]]
    draw_curves(
        results,
        path,
        title=f"Gain by all tokens before a prediction over the last {window:,} to "
        f"{window + stride:,}, {planned} documents of {settings['length']:,} tokens",
        x_label="position in the document",
        y_label="gain (nats per token)",
        ticks=sorted({b[end] for b in bins for end in ("begin", "end")}),
        curve=lambda summary: [
            ((b["begin"] * b["end"]) ** 0.5, b["gain"]) for b in summary["by_position"]
        ],
    )


def table(models: list[Record]) -> Table:
    """A row a model: LongPPL and how much of it the short context has, loss, gains."""
    places = sorted({(b["begin"], b["end"]) for m in models for b in m["summary"]["by_position"]})
    rows = []
    for model in models:
        summary = model["summary"]
        own = {(b["begin"], b["end"]): Estimate(*b["gain"]) for b in summary["by_position"]}
        key, cells = summary["key"], [own[p].text() if p in own else "–" for p in places]
        perplexities = ["–", "–"]
        if key:
            perplexities = [f"{np.exp(key[name][0]):.3f}" for name in ("loss", "loss_short")]
        gain = Estimate(*summary["gain"]).text() if summary["gain"] else "–"
        rows.append([model["label"], *perplexities, *cells, gain])
    columns = [f"gain {begin:,}–{end:,}" for begin, end in places]
    heads = ["model", "LongPPL", "key tokens from a window", *columns, "gain (nats per token)"]
    return Table(heads, rows)


def score(summary: Record) -> Estimate | None:
    """Gain by the long context, nats per token."""
    return Estimate(*summary["gain"]) if summary["gain"] else None


def run(options: LongPplOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: evaluates, writes longppl.jsonl and longppl.png, prints a table."""

    def show(results: Results, console: Console) -> None:
        table(results.document["models"]).print(console, "use of long context")

    runner.run(options, evaluate, runner.shows(draw, show), models)

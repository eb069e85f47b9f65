"""Does the gate choose the chunks that full attention would look at?

At queries spread over long documents, the softmax of full attention over the model's own queries
and keys says how much of its mass each chunk holds. From that follow, for the model's selector and
for others on the same keys: the share of the mass that the chosen chunks and the own one hold, the
share of what lies in past chunks, and the recall against the oracle, which takes the chunks with
the most mass. The paper names the mean-key gate as its first limitation; this measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals import runner
from rwkvx_jax.evals.chunk_mass import MEASURES, measure, positions_of, selectors
from rwkvx_jax.evals.documents import Document, TextOptions, read_documents
from rwkvx_jax.evals.intervals import Estimate, standard_error
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.evals.plots import (
    broken,
    drawn,
    legend_below,
    log_ticks,
    name_of,
    new_figure,
    part_of,
    plain,
    save,
    style,
)
from rwkvx_jax.evals.results import Results, Task
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.model import with_params
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record
from rwkvx_jax.sharding import whole

_NAMES = {
    "own": "the model's own",
    "mean": "mean key",
    "max": "best block",
    "pooled": "pooled blocks",
    "bounds": "bounds",
    "index": "learned",
    "seer": "learned gate",
    "recent": "most recent chunks",
    "oracle": "oracle (most mass)",
}


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(TextOptions):
    """How much of full attention's mass the chosen chunks hold, by selector, layer and distance."""

    length: int = 16384
    """Tokens of a document."""
    documents: int = 4
    """Most documents, taken from the files in turn."""
    queries: int = 512
    """Positions of a document at which the gate is looked at, evenly spaced where there is a
    choice."""
    blocks: int = 8
    """Parts of a chunk for the selectors max and pooled."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("queries", "blocks"):
            if not 1 <= (value := getattr(self, name)) <= self.length:
                raise ConfigError(f"--{name} is {value}: it must lie in 1 to --length")


class Observer:
    """Measures documents with one model; compiled once."""

    def __init__(self, model: EvalModel, options: SelectionOptions):
        config = model.config
        self._positions = positions_of(config, options.length, options.queries)
        self._model, self._params = model.abstract, model.placed()
        self._named = selectors(config, options.blocks)
        self._run = jax.jit(self._measure_all)

    def __call__(self, tokens: np.ndarray) -> dict[str, Any]:
        """Measures of one document [T], leaves [M, ...]; see `measure`."""
        return jax.device_get(self._run(self._params, tokens))

    def _measure_all(self, params, tokens):
        model = with_params(self._model, params)

        def look(attention, h):
            q, k, _, _ = attention.project(h)
            own = attention.scored(q, k)
            return q[0], jnp.repeat(k[0], q.shape[2] // k.shape[2], axis=1), [x[0] for x in own]

        _, (*seen, own) = model.observe(tokens[None], look)
        every = model.config.share_selection_every
        choosing = jnp.arange(model.config.num_attention_blocks) // every * every
        seen = *seen, jax.tree.map(lambda x: x[choosing], own)
        one = partial(measure, config=model.config, named=self._named)
        look = lambda seen: one(*seen, jnp.asarray(self._positions))
        return whole(jax.lax.map(look, seen))


def check_model(model: EvalModel, options: SelectionOptions) -> None:
    """Raises ConfigError where there is nothing to choose."""
    config = model.config
    if not config.num_attention_blocks:
        raise ConfigError(f"{model.label} has no attention blocks: nothing is selected in it")
    if config.attention == "nsa":
        raise ConfigError(
            f'{model.label} has attention "nsa", whose compressed branch chooses: this task '
            'compares selectors of attention "sparse"'
        )
    if config.top_k < 2:
        raise ConfigError(f"{model.label} reads its own chunk only (top_k 1): nothing to choose")
    least = (config.top_k + 1) * config.chunk_size
    if options.length < least:
        raise ConfigError(
            f"--length {options.length}: {model.label} has a choice from {least} tokens on "
            f"(top_k {config.top_k} chunks of {config.chunk_size}); use longer documents"
        )
    if config.chunk_size % options.blocks:
        raise ConfigError(
            f"--blocks {options.blocks} does not divide the chunks of {model.label} "
            f"({config.chunk_size} tokens)"
        )


def summarize(trials: Sequence[Record]) -> Record:
    """Means over documents, heads and layers, with standard errors over documents."""
    if not trials:
        return {"selectors": {}}
    queries = np.array([t["queries"] for t in trials], float)  # [documents, P]
    summary: Record = {"selectors": {}, "mass": _mean([t["mass"] for t in trials]).tolist()}
    mass = _mean([t["mass"] for t in trials])[..., 1:]  # [M, H, D]
    for name in (name for name in _NAMES if name in trials[0]["selectors"]):
        own = [t["selectors"][name] for t in trials]
        record: Record = {}
        for m in MEASURES:
            sums = np.array([s[m] for s in own])  # [documents, M, H, P]
            by_head = sums.sum(-1) / queries.sum(1)[:, None, None]
            each = by_head.mean((1, 2))
            by_octave = sums.sum(0).mean((0, 1)) / np.maximum(queries.sum(0), 1)
            record[m] = {
                "mean": float(each.mean()),
                "error": standard_error(each),
                "by_layer_and_head": by_head.mean(0).tolist(),
                "by_past_chunks": [
                    float(v) if n else None for v, n in zip(by_octave, queries.sum(0), strict=True)
                ],
            }
        held = _mean([s["held"] for s in own])
        record["held_by_distance"] = (held.sum((0, 1)) / mass.sum((0, 1)).clip(1e-30)).tolist()
        summary["selectors"][name] = record
    return summary


def _mean(values: Sequence[Any]) -> np.ndarray:
    return np.mean(np.array(values, float), axis=0)


def evaluate(options: SelectionOptions, models: Sequence[EvalModel], console: Console) -> Results:
    """Measures the documents that are not finished yet, and keeps them in selection.jsonl.

    Raises:
      ConfigError: nothing to choose, no document, or a results file of another evaluation.
    """
    for model in models:
        check_model(model, options)
    documents = read_documents(options, models[0].tokenizer)
    settings = ("length", "skip", "queries", "blocks")
    task = Task(
        name="selection",
        settings={name: getattr(options, name) for name in settings},
        plan={"text": str(options.text), "documents": len(documents), "limit": options.limit},
        trials=list(documents),
        chosen=list(documents)[: options.limit],
        answer=partial(_observe, options, documents),
        summarize=summarize,
        size=lambda document: 1,
        unit="documents",
    )
    return runner.evaluate(task, options.output, models, console)


def _observe(
    options: SelectionOptions,
    documents: dict[Document, np.ndarray],
    model: EvalModel,
    chosen: Sequence[Document],
    progress: Progress,
) -> Iterator[list[Record]]:
    observer = Observer(model, options)
    for document in chosen:
        progress.describe(f"{model.label}, {document.file} from token {document.start:,}")
        found = observer(documents[document][:-1])
        progress.advance(1)
        yield [_record(document, found)]


def _record(document: Document, found: dict[str, Any]) -> Record:
    plain = jax.tree.map(lambda x: np.round(np.asarray(x, np.float64), 6).tolist(), found)
    return document._asdict() | plain | {"queries": plain["queries"][0]}


@drawn
def draw(results: Results, path: Path) -> None:
    """A row a model: share by layer and head, what is held by distance, selectors compared."""
    document = results.document
    models = [m for m in document["models"] if m["trials"]]
    figure = new_figure(
        14.0,
        4.2 * len(models) + 0.4,
        f"Selection of chunks, {models[0]['model']['top_k'] - 1} past ones a query; documents of "
        f"{document['settings']['length']:,} tokens",
    )
    axes = figure.subplots(len(models), 3, squeeze=False, width_ratios=[1, 1.4, 1.4])
    for (left, middle, right), model in zip(axes, models, strict=True):
        config, found = model["model"], model["summary"]["selectors"]
        part = part_of(len(model["trials"]), document["plan"]["documents"], "documents")
        title = "\n".join(filter(None, [plain(name_of(model)), part]))
        left.set_title(broken(f"{title}\nshare of past mass held, own selector", 3.2))
        _draw_heads(figure, left, np.array(found["own"]["past"]["by_layer_and_head"]))
        _draw_distances(middle, found, config["chunk_size"])
        _draw_bars(right, found, config)
    legend_below(figure, *axes[0, 1:])
    save(figure, path)


def _draw_heads(figure, axes, shares: np.ndarray) -> None:
    image = axes.imshow(100 * shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    if shares.size <= 60:
        for (layer, head), value in np.ndenumerate(shares):
            color = "black" if value > 0.55 else "white"
            axes.text(head, layer, f"{100 * value:.0f}", ha="center", va="center", color=color)
    axes.set(xlabel="head", ylabel="attention block")
    axes.set_xticks(range(shares.shape[1]))
    axes.set_yticks(range(shares.shape[0]))
    figure.colorbar(image, ax=axes, label="%")


def _draw_distances(axes, found: Record, chunk: int) -> None:
    x = [chunk * 2**i for i in range(len(found["mean"]["held_by_distance"]))]
    for i, name in enumerate(n for n in _NAMES if n in found and n != "own"):
        held = 100 * np.array(found[name]["held_by_distance"])
        axes.plot(x, held, label=_NAMES[name], linewidth=1.2, **style(i))
    log_ticks(axes, x, 4.4)
    axes.set(
        xlabel="distance from (tokens, to twice that)", ylabel="mass at that distance held (%)"
    )
    axes.set_ylim(-4, 104)
    axes.grid()


def _draw_bars(axes, found: Record, config: Record) -> None:
    names = [n for n in _NAMES if n in found]
    titles = {
        "share": "share of all mass held",
        "past": "share of past mass held",
        "recall": "recall of the oracle's chunks",
    }
    for i, (measure_name, title) in enumerate(titles.items()):
        cells = [found[n][measure_name] for n in names]
        axes.barh(
            np.arange(len(names)) + (i - 1) * 0.27,
            [100 * c["mean"] for c in cells],
            0.25,
            xerr=[196 * (c["error"] or 0) for c in cells],
            color=style(i)["color"],
            label=title,
            error_kw={"capsize": 2},
        )
    axes.set_yticks(range(len(names)), [_shown(n, config) for n in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 104)
    axes.set(xlabel="% (bars: 95 % intervals over documents)")
    axes.grid(axis="x")


def _shown(name: str, config: Record) -> str:
    """A selector's name; that of the model's own says which it is."""
    own = f" ({_NAMES[config['selector']]})" if name == "own" else ""
    return _NAMES[name] + own


def score(summary: Record) -> Estimate:
    """Share of the mass in past chunks that the model's own selector holds, in per cent."""
    past = summary["selectors"]["own"]["past"]
    error = None if past["error"] is None else 100 * past["error"]
    return Estimate.of_mean(100 * past["mean"], error)


def table(models: list[Record]) -> Table:
    """A row a model and selector."""
    rows = [
        [f"{model['label']}: {_NAMES[name]}", *[f"{100 * found[m]['mean']:.1f}" for m in MEASURES]]
        for model in models
        for name, found in model["summary"]["selectors"].items()
    ]
    columns = ["model: selector (%)", "all mass held", "past mass held", "recall of the oracle"]
    return Table(columns, rows)


def print_table(results: Results, console: Console) -> None:
    """The same on the terminal."""
    table(results.document["models"]).print(console)


def run(options: SelectionOptions, models: Sequence[EvalModel] | None = None) -> None:
    """The command: measures, writes selection.jsonl and selection.png, prints a table."""
    runner.run(options, evaluate, runner.shows(draw, print_table), models)

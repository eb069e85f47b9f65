"""Does the gate choose the chunks that full attention would look at?

At queries spread over long documents, the softmax of full attention over the model's own queries
and keys says how much of its mass each chunk holds. From that follow, for the model's selector and
for others on the same keys: the share of the mass that the chosen chunks and the own one hold, the
share of what lies in past chunks, and the recall against the oracle, which takes the chunks with
the most mass. The paper names the mean-key gate as its first limitation; this measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from rwkvx_jax.config import ConfigError, ModelConfig
from rwkvx_jax.evals.common import (
    IDENTITY_FIELDS,
    Subject,
    open_console,
    open_subjects,
    until_interrupted,
)
from rwkvx_jax.evals.documents import Document, TextOptions, read_documents
from rwkvx_jax.evals.figures import new_figure, plain, save, style
from rwkvx_jax.evals.results import Results
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.ops.selection import Selector, select_from_rows, selector_of
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record

_QUERIES_AT_ONCE = 64
_MEASURES = ("share", "past", "recall")
_NAMES = {
    "own": "the model's own",
    "mean": "mean key",
    "max": "best block",
    "pooled": "pooled blocks",
    "bounds": "bounds",
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


def selectors(config: ModelConfig, blocks: int) -> dict[str, Selector]:
    """The selectors that are compared, by name; the model's own is "own"."""
    others = [Selector("mean"), Selector("max", blocks), Selector("pooled", blocks)]
    named = {s.kind: s for s in (*others, Selector("bounds"))}
    return {"own": selector_of(config)} | named


def positions_of(config: ModelConfig, length: int, count: int) -> np.ndarray:
    """Positions with more past chunks than can be chosen, evenly spaced, int32 [Q]."""
    first = config.top_k * config.chunk_size
    return np.unique(np.linspace(first, length - 1, count).round().astype(np.int32))


def octaves(config: ModelConfig, length: int) -> int:
    """Number of octaves of distances in chunks: 1, 2-3, 4-7, ..."""
    return max(1, int((length - 1) // config.chunk_size).bit_length())


def measure(
    q: jax.Array,  # [T, H, K]
    k: jax.Array,  # [T, H, K]
    positions: jax.Array,  # int32 [Q]
    config: ModelConfig,
    named: dict[str, Selector],
) -> dict[str, Any]:
    """Shares of full attention's mass at some positions of one attention block.

    Returns:
      "mass": [H, D + 1] float32, mean mass in the own chunk and at distances in octaves of chunks;
      for each selector, "recent" and "oracle" a dict of "share", "past" and "recall", each [H, P]
      (sums over the queries whose number of past chunks lies in an octave), and "held" [H, D], mean
      mass held at distances; "queries": [P], how many queries there are in each octave.
    """
    bins = octaves(config, k.shape[0])
    rows = {name: selector.rows_of(k[None], config.chunk_size) for name, selector in named.items()}
    pad = -len(positions) % _QUERIES_AT_ONCE
    blocks = jnp.pad(positions, (0, pad), mode="edge").reshape(-1, _QUERIES_AT_ONCE)
    one = lambda at: _measure_queries(q[at].astype(jnp.float32), k, at, config, named, rows)
    found = jax.lax.map(one, blocks)  # leaves [blocks, H, 64, ...]
    join = lambda x: jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[3:])
    found = jax.tree.map(lambda x: join(x)[:, : len(positions)], found)
    groups = jax.nn.one_hot(_octave(positions // config.chunk_size), bins)  # [Q, P]
    grouped = lambda x: jnp.einsum("hq,qp->hp", x, groups)
    return {
        "queries": groups.sum(0),
        "mass": found["mass"].mean(1),
        "selectors": {
            name: {m: grouped(values[m]) for m in _MEASURES} | {"held": values["held"].mean(1)}
            for name, values in found["selectors"].items()
        },
    }


def _measure_queries(q, k, at, config: ModelConfig, named: dict[str, Selector], rows):
    """`measure` of a few queries [Q, H, K] at positions `at`, not summed: leaves [H, Q, ...]."""
    chunk, count = config.chunk_size, config.top_k - 1
    mass = _chunk_mass(q, k, at, chunk)  # [H, Q, N]
    chunks, own = mass.shape[-1], at // chunk
    distance = own[:, None] - jnp.arange(chunks)[None]  # [Q, N]
    past = distance > 0
    past_mass = jnp.where(past[None], mass, 0)
    own_mass = jnp.take_along_axis(mass, own[None, :, None], -1)[..., 0]
    bins = octaves(config, k.shape[0])
    at_distance = jax.nn.one_hot(_octave(distance), bins) * past[..., None]
    spread = lambda chosen: jnp.einsum("hqn,qnd->hqd", chosen, at_distance)
    picks = {
        "oracle": jax.lax.top_k(jnp.where(past[None], mass, -1.0), count)[1],
        "recent": own[None, :, None] - 1 - jnp.arange(count)[None, None],
    }
    for name, selector in named.items():
        options = {"chunk_size": chunk, "count": count, "selector": selector}
        picks[name] = select_from_rows(q[None], rows[name], at[None], **options)[0].swapaxes(0, 1)
    masks = {name: _mask(pick, mass.shape) & past[None] for name, pick in picks.items()}
    found = {}
    for name, mask in masks.items():
        held = (past_mass * mask).sum(-1)
        found[name] = {
            "share": own_mass + held,
            "past": held / jnp.maximum(past_mass.sum(-1), 1e-30),
            "recall": (mask & masks["oracle"]).sum(-1) / count,
            "held": spread(past_mass * mask),
        }
    total = jnp.concatenate([own_mass[..., None], spread(past_mass)], axis=-1)
    return {"mass": total, "selectors": found}


def _chunk_mass(q, k, at, chunk: int) -> jax.Array:
    """Mass of full attention in each chunk, [H, Q, N], for queries [Q, H, K] at positions `at`."""
    length = k.shape[0]
    scores = jnp.einsum("qhk,shk->hqs", q, k.astype(jnp.float32), precision="highest")
    visible = jnp.arange(length)[None] <= at[:, None]
    weights = jax.nn.softmax(jnp.where(visible[None], scores * q.shape[-1] ** -0.5, -jnp.inf), -1)
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, -length % chunk)))
    return weights.reshape(*weights.shape[:2], -1, chunk).sum(-1)


def _octave(count: jax.Array) -> jax.Array:
    """0 for counts up to 1, 1 for 2 and 3, 2 for 4 to 7, ..."""
    return jnp.floor(jnp.log2(jnp.maximum(count, 1) + 0.5)).astype(jnp.int32)


def _mask(chosen: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Whether a chunk is among the chosen [H or 1, Q, J]: bool [H, Q, N]."""
    numbers = jnp.arange(shape[-1])
    return jnp.broadcast_to((chosen[..., None] == numbers[None, None, None]).any(-2), shape)


class Observer:
    """Measures documents with one model; compiled once."""

    def __init__(self, subject: Subject, options: SelectionOptions):
        config = subject.config
        self._positions = positions_of(config, options.length, options.queries)
        self._model = abstract_model(config, subject.run)
        self._params = jax.device_put(subject.params)
        self._named = selectors(config, options.blocks)
        self._run = jax.jit(self._measure_all)

    def __call__(self, tokens: np.ndarray) -> dict[str, Any]:
        """Measures of one document [T], leaves [M, ...]; see `measure`."""
        return jax.device_get(self._run(self._params, tokens))

    def _measure_all(self, params, tokens):
        model = with_params(self._model, params)
        look = lambda attention, h: attention.project(h)[:2]
        _, (q, k) = model.observe(tokens[None], look)
        one = partial(measure, config=model.config, named=self._named)
        return jax.lax.map(lambda qk: one(*qk, jnp.asarray(self._positions)), (q[:, 0], k[:, 0]))


def check_subject(subject: Subject, options: SelectionOptions) -> None:
    """Raises ConfigError where there is nothing to choose."""
    config = subject.config
    if not config.num_attention_blocks:
        raise ConfigError(f"{subject.label} has no attention blocks: nothing is selected in it")
    if config.top_k < 2:
        raise ConfigError(f"{subject.label} reads its own chunk only (top_k 1): nothing to choose")
    least = (config.top_k + 1) * config.chunk_size
    if options.length < least:
        raise ConfigError(
            f"--length {options.length}: {subject.label} has a choice from {least} tokens on "
            f"(top_k {config.top_k} chunks of {config.chunk_size}); use longer documents"
        )
    if config.chunk_size % options.blocks:
        raise ConfigError(
            f"--blocks {options.blocks} does not divide the chunks of {subject.label} "
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
        for m in _MEASURES:
            sums = np.array([s[m] for s in own])  # [documents, M, H, P]
            by_head = sums.sum(-1) / queries.sum(1)[:, None, None]
            each = by_head.mean((1, 2))
            error = float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else None
            by_octave = sums.sum(0).mean((0, 1)) / np.maximum(queries.sum(0), 1)
            record[m] = {
                "mean": float(each.mean()),
                "error": error,
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


def evaluate(options: SelectionOptions, subjects: Sequence[Subject], console: Console) -> Results:
    """Measures the documents that are not finished yet, and writes selection.jsonl.

    Raises:
      ConfigError: nothing to choose, no document, or a results file of another evaluation.
    """
    for subject in subjects:
        check_subject(subject, options)
    documents = read_documents(options, subjects[0].tokenizer)
    results = Results(
        options.output / "selection.jsonl",
        task="selection",
        settings={
            "length": options.length,
            "skip": options.skip,
            "queries": options.queries,
            "blocks": options.blocks,
        },
        plan={"text": str(options.text), "documents": len(documents), "limit": options.limit},
        key_fields=Document._fields,
        planned=documents,
        models=[subject.description for subject in subjects],
        identity_fields=IDENTITY_FIELDS,
        summarize=summarize,
    )
    pending = {
        s.label: [d for d in list(documents)[: options.limit] if d not in results.finished(s.label)]
        for s in subjects
    }
    with Progress(console, sum(map(len, pending.values())), "documents") as tracker:
        for subject in subjects:
            observer = Observer(subject, options) if pending[subject.label] else None
            for i, document in enumerate(pending[subject.label]):
                tracker.describe(f"{subject.label}, {document.file} from token {document.start:,}")
                found = observer(documents[document][:-1])
                results.add(subject.label, [_record(document, found)])
                tracker.advance(1)
                if i == 0:
                    tracker.start_clock()
    return results


def _record(document: Document, found: dict[str, Any]) -> Record:
    plain = jax.tree.map(lambda x: np.round(np.asarray(x, np.float64), 6).tolist(), found)
    return document._asdict() | plain | {"queries": plain["queries"][0]}


def draw(results: Results, path: Path) -> None:
    """A row a model: share by layer and head, what is held by distance, selectors compared."""
    panels = [p for p in results.document["models"] if p["trials"]]
    figure = new_figure(13.5, 3.9 * len(panels))
    axes = figure.subplots(len(panels), 3, squeeze=False, width_ratios=[1, 1.3, 1.5])
    for (left, middle, right), panel in zip(axes, panels, strict=True):
        config, found = panel["model"], panel["summary"]["selectors"]
        _draw_heads(figure, left, np.array(found["own"]["past"]["by_layer_and_head"]))
        left.set_title(
            f"{plain(panel['label'])}\nshare of past mass held, own selector", fontsize=9
        )
        _draw_distances(middle, found, config["chunk_size"])
        _draw_bars(right, found)
    figure.suptitle(
        f"Selection of chunks, {panels[0]['model']['top_k'] - 1} past ones a query; documents of "
        f"{results.document['settings']['length']:,} tokens",
        fontsize=11,
    )
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
    for i, name in enumerate(n for n in _NAMES if n in found and n != "own"):
        held = 100 * np.array(found[name]["held_by_distance"])
        x = chunk * 2.0 ** np.arange(len(held))
        axes.plot(x, held, label=_NAMES[name], markersize=4, linewidth=1.2, **style(i))
    axes.set_xscale("log", base=2)
    ticks = chunk * 2 ** np.arange(len(found["mean"]["held_by_distance"]))
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=45, ha="right", fontsize=8)
    axes.minorticks_off()
    axes.set(
        xlabel="distance from (tokens, to twice that)", ylabel="mass at that distance held (%)"
    )
    axes.set_ylim(-4, 104)
    axes.grid(alpha=0.4)
    axes.legend(fontsize=7)


def _draw_bars(axes, found: Record) -> None:
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
    axes.set_yticks(range(len(names)), [_NAMES[n] for n in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 104)
    axes.set(xlabel="% (bars: 95 % over documents)")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)


def print_table(results: Results, console: Console) -> None:
    """A row for each model and selector."""
    table = Table("model", "selector", "all mass held (%)", "past mass held (%)", "recall (%)")
    for panel in results.document["models"]:
        for name, found in panel["summary"]["selectors"].items():
            cells = [f"{100 * found[m]['mean']:.1f}" for m in _MEASURES]
            table.add_row(panel["label"], _NAMES[name], *cells)
    console.print(table)


def run(options: SelectionOptions) -> None:
    """The command: measures, writes selection.jsonl and selection.png, prints a table."""
    console = open_console()
    subjects = open_subjects(options)
    with until_interrupted(console):
        results = evaluate(options, subjects, console)
    path = results.path.with_suffix(".png")
    draw(results, path)
    print_table(results, console)
    console.print(f"wrote {results.path} and {path}", soft_wrap=True)

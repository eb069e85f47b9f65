"""Decode time per token against context length, beside the bytes that a token makes the model read.

Three models are timed in turn, step by step, so that their ratios come from one run: the hybrid
with sparse attention, the same weights with full attention, and as many recurrent blocks alone. A
decode step costs the same whatever the weights and the cache hold, so caches are not filled by
reading text: their length is set and their pages hold random rows. The machine's read bandwidth is
measured in between, and says how close a step comes to what memory allows.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from rwkvx_jax.cache import Cache, cache_bytes
from rwkvx_jax.config import ConfigError, ModelConfig, RunConfig, to_dict
from rwkvx_jax.evals import runner
from rwkvx_jax.evals.grid import Lengths
from rwkvx_jax.evals.models import require_at_least_1
from rwkvx_jax.evals.plots import drawn, legend_below, log_ticks, new_figure, save, style
from rwkvx_jax.evals.results import Results, Task
from rwkvx_jax.evals.runner import open_console, until_interrupted
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.ops.selection import selector_of
from rwkvx_jax.perf.timed import (
    LABELS,
    TIMED,
    ModelOptions,
    Timed,
    facts_of,
    kinds_of,
    layered_model,
    load_model,
    make_configs,
    random_params,
)
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record

_IDENTITY = ("model", "compute_dtype", "weights", "device", "cores")
_READ_BYTES = 1 << 29  # of the array by which the bandwidth is measured


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(ModelOptions):
    """Times decode steps at several context lengths; draws milliseconds by context."""

    contexts: Lengths = (1024, 8192, 65536, 262144, 1048576)
    """Tokens in the cache, to which half a chunk is added."""
    steps: int = 15
    """Steps of each model and context, after two of warm-up."""
    memory_gb: float = 8.0
    """Contexts whose cache is larger than this are left out."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "steps")
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"--contexts is {self.contexts}: give positive numbers")
        if not 0 < self.memory_gb < math.inf:
            raise ConfigError(f"--memory-gb is {self.memory_gb}: give a number above 0")


class Decoding(NamedTuple):
    """What is timed: steps at one context, of one kind of model."""

    kind: str
    context: int


class Runner(NamedTuple):
    """One model, ready to step."""

    step: Callable[[Params, jax.Array, Cache], tuple[jax.Array, Cache]]
    params: Params
    config: ModelConfig


def run(options: SpeedOptions) -> None:
    """Times what an earlier run has not, prints a table, writes `speed.jsonl` and `speed.png`."""
    console = open_console()
    run_config, config, params = load_model(options)
    contexts, left_out = sorted(set(options.contexts)), []
    for context in contexts:
        size = _cache_size(config, run_config, context)
        if size > options.memory_gb * 1e9:
            left_out.append({"context": context, "cache_bytes": size})
            console.print(f"context {context:,} left out: its cache takes {size / 1e9:.1f} GB")
    contexts = [c for c in contexts if c not in [out["context"] for out in left_out]]
    description = {
        "label": TIMED,
        "model": to_dict(config),
        "compute_dtype": run_config.compute_dtype,
        "weights": str(options.checkpoint or "random"),
        "device": jax.devices()[0].device_kind,
        "cores": _cores(),
    }
    model = Timed(config, run_config, params, description)
    with until_interrupted(console):
        results = _evaluate(options, contexts, left_out, model)
    order = list(LABELS)
    rows = sorted(results.trials(TIMED), key=lambda r: (r["context"], order.index(r["kind"])))
    runner.show(results, console, partial(_draw, rows, model), lambda: _print(console, rows))


def _evaluate(
    options: SpeedOptions, contexts: Sequence[int], left_out: list[Record], model: Timed
) -> Results:
    """Measures the missing rows, one context after the other."""
    rows = [
        Decoding(kind, context)
        for context in contexts
        for kind in options.kinds
        if kind != "full" or context <= options.full_limit
    ]
    if not rows:
        raise ConfigError(
            f"none of the contexts {options.contexts} fits into --memory-gb {options.memory_gb:g} "
            f"and, with full attention, --full-limit {options.full_limit}"
        )
    task = Task(
        name="speed",
        settings={},
        plan={"contexts": options.contexts, "steps": options.steps, "left_out": left_out},
        trials=rows,
        chosen=rows,
        answer=partial(_measure, options),
        summarize=summarize,
        size=lambda row: 1,
        unit="rows",
        identity=_IDENTITY,
        alone=False,
    )
    quiet = Console(quiet=True)  # a bar's thread would disturb what is timed
    return runner.evaluate(task, options.output, [model], quiet)


def _measure(
    options: SpeedOptions, model: Timed, rows: Sequence[Decoding], progress: Progress
) -> Iterator[list[Record]]:
    runners = _runners(options, model.config, model.run, model.params)
    data = np.ones(_READ_BYTES // 8, np.int64)
    for context in dict.fromkeys(row.context for row in rows):
        missing = {row.kind: runners[row.kind] for row in rows if row.context == context}
        yield _time_context(options, missing, model.run, context, data)
        progress.advance(len(missing))


def _cache_size(config: ModelConfig, run_config: RunConfig, context: int) -> int:
    dtype = jnp.dtype(run_config.compute_dtype)
    return cache_bytes(config, dtype, 1, context + config.chunk_size)


def _runners(
    options: SpeedOptions, config: ModelConfig, run_config: RunConfig, params: Params
) -> dict[str, Runner]:
    configs, runners = make_configs(config), {}
    for kind in options.kinds:
        abstract = layered_model(configs[kind], run_config)
        weights = random_params(configs[kind], run_config) if kind == "rwkv" else params
        decode = lambda p, token, cache, m=abstract: with_params(m, p).decode(token, cache)
        runners[kind] = Runner(jax.jit(decode, donate_argnums=2), weights, configs[kind])
    return runners


def _time_context(
    options: SpeedOptions,
    runners: dict[str, Runner],
    run_config: RunConfig,
    context: int,
    data: np.ndarray,
) -> list[Record]:
    """Steps of all models in turn; the two hybrids share one cache, written in place."""
    length = context + next(iter(runners.values())).config.chunk_size // 2
    kinds, caches = list(runners), {}
    for kind in kinds:
        if (owner := _owner(kind)) not in caches:
            caches[owner] = _filled_cache(runners[kind].config, run_config, length)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    read: list[float] = []
    token = jnp.zeros(1, jnp.int32)
    for turn in range(options.steps + 2):
        for kind in kinds:
            runner, owner = runners[kind], _owner(kind)
            jax.block_until_ready(caches[owner])
            begin = time.perf_counter()
            logits, caches[owner] = runner.step(runner.params, token, caches[owner])
            logits.block_until_ready()
            if turn >= 2:
                seconds[kind].append(time.perf_counter() - begin)
            # The next model finds the same length.
            caches[owner] = replace(caches[owner], length=jnp.full(1, length, jnp.int32))
        read.append(_read_seconds(data))
    bandwidth = data.nbytes / statistics.median(read[2:])
    return [
        _row(kind, context, runners[kind], run_config, length, seconds[kind], bandwidth)
        for kind in kinds
    ]


def _owner(kind: str) -> str:
    """Models of one owner share a cache."""
    return "rwkv" if kind == "rwkv" else "hybrid"


def _row(kind, context, runner: Runner, run_config, length, seconds, bandwidth) -> Record:
    must_read = bytes_per_token(runner.config, run_config, runner.params, length)
    middle = statistics.median(seconds)
    return {
        "kind": kind,
        "context": context,
        "length": length,
        "milliseconds": middle * 1e3,
        "best_milliseconds": min(seconds) * 1e3,
        "bytes": must_read,
        "bandwidth": bandwidth,
        "share_of_bandwidth": must_read / middle / bandwidth,
        "samples": [s * 1e3 for s in seconds],
    }


def bytes_per_token(config: ModelConfig, run_config: RunConfig, params: Params, length: int) -> int:
    """Bytes that decoding one token must read, the token being number `length` (from 0).

    Every weight once (one row of the embedding), the recurrent states, what the selector keeps of
    the past chunks (such as mean keys), and the keys and values of the rows attended to.
    """
    item = jnp.dtype(run_config.compute_dtype).itemsize
    weights = sum(p.size * p.dtype.itemsize for name, p in flat_params(params) if name != "embed")
    states = config.num_blocks * config.mixer_sizes.state * 4
    chunk = config.chunk_size
    past, filled = length // chunk, length % chunk + 1
    if config.attention == "full":
        rows, kept = length + 1, 0
    else:
        rows = min(past, config.top_k - 1) * chunk + filled
        selector = selector_of(config)
        kept = past * selector.rows
        if span := selector.span:  # bounds of all spans, and the rows of the chunks in some
            kept = min(past, selector.spans * span) * selector.rows + 2 * -(-past // span)
        kept *= config.scored_heads * config.scored_size
        if config.attention == "nsa":  # values beside the keys of the means, and the window
            kept, rows = 2 * kept, rows + min(length + 1, config.window_size)
    attention = config.num_attention_blocks * config.kv_width * 2 * rows * item
    attention += 4 * config.choosing_blocks * kept
    return weights + states + attention + config.width * 4


def flat_params(params: Params) -> list[tuple[str, Any]]:
    """(path, leaf) of parameters whose layers may be numbered."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(".".join(str(key.key) for key in path), leaf) for path, leaf in leaves]


def _filled_cache(config: ModelConfig, run_config: RunConfig, length: int) -> Cache:
    """A cache of `length` rows: one random page everywhere, random chunk means."""
    cache = abstract_model(config, run_config).init_cache(1, length + 1)
    keys = jax.random.split(jax.random.key(0), 3)
    page = jax.random.normal(keys[0], cache.pages.keys.shape[-2:], cache.pages.keys.dtype)
    fill = jax.jit(lambda old, page: jnp.broadcast_to(page, old.shape) + 0 * old, donate_argnums=0)
    pages = cache.pages
    sums = jax.random.normal(keys[1], pages.key_sums.shape, jnp.float32) * config.chunk_size
    selector = selector_of(config)
    spans = selector.span_rows(sums) if selector.span else None
    pages = pages._replace(keys=fill(pages.keys, page), values=fill(pages.values, page))
    return replace(
        cache,
        length=jnp.full(1, length, jnp.int32),
        position=jnp.full(1, length, jnp.int32),
        pages=pages._replace(key_sums=sums, span_rows=spans),
    )


def _read_seconds(data: np.ndarray) -> float:
    """Seconds in which all cores together read an array once."""
    cores = _cores()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(np.max, np.array_split(data[:cores], cores)))  # starts the threads
        begin = time.perf_counter()
        list(pool.map(np.max, np.array_split(data, cores)))
        return time.perf_counter() - begin


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def summarize(rows: list[Record]) -> Record:
    """Nothing: every row is shown."""
    return {}


def table(models: list[Record]) -> Table:
    """A row a model kind: milliseconds per token at each context."""
    contexts = sorted({row["context"] for model in models for row in model["trials"]})
    rows = []
    for model in models:
        for kind in kinds_of(model):
            own = {r["context"]: r["milliseconds"] for r in model["trials"] if r["kind"] == kind}
            texts = [f"{own[c]:.2f}" if c in own else "–" for c in contexts]
            rows.append([f"{model['label']}: {kind}", *texts])
    return Table(["model (ms per token at context)", *[f"{c:,}" for c in contexts]], rows)


def _print(console: Console, rows: list[Record]) -> None:
    shown = RichTable(
        "model", "context", "ms/token", "MB read", "GB/s", "of bandwidth", "time, bytes / RWKV-7"
    )
    base = {row["context"]: row for row in rows if row["kind"] == "rwkv"}
    for row in rows:
        other = base.get(row["context"])
        quotient = ""
        if other:
            times = row["milliseconds"] / other["milliseconds"]
            quotient = f"{times:.3f} / {row['bytes'] / other['bytes']:.3f}"
        shown.add_row(
            LABELS[row["kind"]],
            f"{row['context']:,}",
            f"{row['milliseconds']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['bytes'] / row['milliseconds'] / 1e6:.1f}",
            f"{row['share_of_bandwidth']:.0%}",
            quotient,
        )
    console.print(shown)


@drawn
def _draw(measured: list[Record], model: Timed, path: Path) -> None:
    width, least = 7.2, "dotted: reading what a token needs at the measured bandwidth"
    figure = new_figure(width, 4.8, f"Time to decode a token; {least}\n{facts_of(model)}")
    axes = figure.add_subplot()
    for i, (kind, label) in enumerate(LABELS.items()):
        rows = [row for row in measured if row["kind"] == kind]
        if rows:
            x = [row["context"] for row in rows]
            axes.plot(x, [row["milliseconds"] for row in rows], label=label, **style(i))
            bounds = [row["bytes"] / row["bandwidth"] * 1e3 for row in rows]
            axes.plot(x, bounds, ":", color=style(i)["color"])
    log_ticks(axes, [row["context"] for row in measured], width - 1.0)
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds per token")
    axes.set_ylim(bottom=0)
    axes.grid()
    legend_below(figure, axes)
    save(figure, path)

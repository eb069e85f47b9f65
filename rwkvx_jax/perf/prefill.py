"""Time to read a prompt against its length: the hybrid, its full-attention twin, RWKV-7.

Prompts are read in prefill chunks through the decode cache, as generation and evaluation do; all
lengths share one cache and so one compilation a model. Full attention is faster on short prompts
and slower on long ones: where the two lines cross is what the figure is for.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table as RichTable

from rwkvx_jax.cache import cache_bytes
from rwkvx_jax.config import ConfigError, ModelConfig, RunConfig, to_dict
from rwkvx_jax.evals import runner
from rwkvx_jax.evals.grid import Lengths
from rwkvx_jax.evals.models import require_at_least_1
from rwkvx_jax.evals.plots import drawn, legend_below, log_ticks, new_figure, save, style
from rwkvx_jax.evals.results import Results, Task
from rwkvx_jax.evals.runner import open_console, until_interrupted
from rwkvx_jax.evals.tables import Table
from rwkvx_jax.generate.chunks import prefill_chunks
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.model import with_params
from rwkvx_jax.modules.trees import Params
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


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(ModelOptions):
    """Times the reading of prompts; draws milliseconds per token by length, and the crossover."""

    lengths: Lengths = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Tokens of the prompts."""
    prefill_chunk: Annotated[int, tyro.conf.arg(name="piece")] = 2048
    """Tokens of a prompt read at once."""
    repeats: int = 3
    """Readings of each model and length, of which the median counts."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "prefill_chunk", "repeats")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"--lengths is {self.lengths}: give positive numbers")

    @property
    def rows(self) -> int:
        """Rows of the cache that all lengths share."""
        return -(-max(self.lengths) // self.prefill_chunk) * self.prefill_chunk


class Reader:
    """Reads prompts with one model."""

    def __init__(self, config: ModelConfig, run: RunConfig, params: Params, chunk: int, rows: int):
        self._chunk, self._rows = chunk, rows
        self._model, self._params = layered_model(config, run), params
        step = lambda p, tokens, cache, n: with_params(self._model, p).prefill(tokens, cache, n)
        self._step = jax.jit(step, donate_argnums=2)

    def __call__(self, tokens: np.ndarray) -> float:
        """Seconds in which a prompt [T] is read, from an empty cache to its last logits."""
        cache = jax.block_until_ready(self._model.init_cache(1, self._rows))
        begin = time.perf_counter()
        for chunk, count in prefill_chunks([tokens], self._chunk):
            logits, cache = self._step(self._params, chunk, cache, count)
        logits.block_until_ready()
        return time.perf_counter() - begin


class Reading(NamedTuple):
    """What is timed: prompts of one length, read by one kind of model."""

    kind: str
    length: int


def run(options: PrefillOptions) -> None:
    """Times what an earlier run has not, prints a table, writes prefill.jsonl and prefill.png."""
    console = open_console()
    run_config, config, params = load_model(options)
    _check_memory(options, config, run_config)
    machine = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    model = Timed(config, run_config, params, {"label": TIMED} | machine)
    with until_interrupted(console):
        results = evaluate(options, model, console)
    rows = results.trials(TIMED)
    runner.show(results, console, partial(draw, rows, model), lambda: print_table(rows, console))


def evaluate(
    options: PrefillOptions,
    model: Timed,
    console: Console,
    make_reader: Callable[..., Callable[[np.ndarray], float]] = Reader,
) -> Results:
    """Measures the missing rows, and keeps each as soon as it is there.

    Raises:
      ConfigError: a results file of another measurement.
    """
    lengths = sorted(set(options.lengths))
    rows = [
        Reading(kind, length)
        for kind in options.kinds
        for length in lengths
        if kind != "full" or length <= options.full_limit
    ]
    if not rows:
        raise ConfigError(
            f"none of the lengths {options.lengths} is within --full-limit {options.full_limit}"
        )
    task = Task(
        name="prefill",
        settings={
            "model": to_dict(model.config),
            "compute_dtype": model.run.compute_dtype,
            "weights": str(options.checkpoint or "random"),
            "piece": options.prefill_chunk,
            "repeats": options.repeats,
        },
        plan={"lengths": options.lengths},
        trials=rows,
        chosen=rows,
        answer=partial(_measure, options, make_reader),
        summarize=summarize,
        size=lambda row: row.length * options.repeats,
        identity=("device", "cores"),
        alone=False,
    )
    return runner.evaluate(task, options.output, [model], console)


def _measure(
    options: PrefillOptions,
    make_reader: Callable[..., Callable[[np.ndarray], float]],
    model: Timed,
    rows: Sequence[Reading],
    progress: Progress,
) -> Iterator[list[Record]]:
    config, lengths = model.config, options.lengths
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, max(lengths)).astype(np.int32)
    reader, current = None, None
    for kind, length in rows:
        progress.describe(f"{LABELS[kind]}, length {length:,}")
        if kind != current:
            reader, current = None, kind  # frees its parameters first
            own = make_configs(config)[kind]
            weights = random_params(own, model.run) if kind == "rwkv" else model.params
            reader = make_reader(own, model.run, weights, options.prefill_chunk, options.rows)
            reader(tokens[: min(lengths)])  # compiles
            progress.start_clock()
        seconds = []
        for _ in range(options.repeats):
            seconds.append(reader(tokens[:length]))
            progress.advance(length)
        middle = statistics.median(seconds)
        yield [{"kind": kind, "length": length, "seconds": middle, "samples": seconds}]


def summarize(rows: list[Record]) -> Record:
    """Where sparse attention begins to be faster."""
    return {"crossover": crossover(rows)}


def _check_memory(options: PrefillOptions, config: ModelConfig, run_config: RunConfig) -> None:
    """Refuses a cache, or a prompt, that does not fit into the memory."""
    dtype, free = jnp.dtype(run_config.compute_dtype), memory_left()
    needed = cache_bytes(config, dtype, 1, options.rows) + 16 * options.rows
    if free is not None and needed > free:
        raise ConfigError(
            f"a prompt of {max(options.lengths):,} tokens, read {options.prefill_chunk:,} at once, "
            f"needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: lower --lengths "
            "or --piece"
        )


def crossover(rows: list[Record]) -> float | None:
    """The length from which on the sparse hybrid reads faster than the full one, on straight lines
    between logarithms; the shortest length if it is always faster, None if it never is."""
    times = {
        kind: {row["length"]: row["seconds"] for row in rows if row["kind"] == kind}
        for kind in ("sparse", "full")
    }
    lengths = sorted(times["sparse"].keys() & times["full"].keys())
    gain = [float(np.log(times["full"][n] / times["sparse"][n])) for n in lengths]
    slower = [i for i, value in enumerate(gain) if value <= 0]
    if not lengths or (slower and slower[-1] == len(lengths) - 1):
        return None
    if not slower:
        return float(lengths[0])
    i = slower[-1]
    share = -gain[i] / (gain[i + 1] - gain[i])
    return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)


def table(models: list[Record]) -> Table:
    """A row a model kind: milliseconds per prompt token at each length, and the crossover."""
    lengths = sorted({row["length"] for model in models for row in model["trials"]})
    rows = []
    for model in models:
        for kind in kinds_of(model):
            own = {r["length"]: r["seconds"] for r in model["trials"] if r["kind"] == kind}
            texts = [f"{1e3 * own[n] / n:.3f}" if n in own else "–" for n in lengths]
            crossing = model["summary"]["crossover"] if kind == "sparse" else None
            texts.append("–" if crossing is None else f"{crossing:,.0f}")
            rows.append([f"{model['label']}: {kind}", *texts])
    columns = [f"{n:,}" for n in lengths]
    return Table(["model (ms per prompt token at length)", *columns, "faster than full from"], rows)


def print_table(rows: list[Record], console: Console) -> None:
    """A row a length: seconds and tokens per second of each model, and the hybrids' ratio."""
    kinds = [k for k in LABELS if any(row["kind"] == k for row in rows)]
    shown = RichTable("length", *[f"{LABELS[k]}\ns (tokens/s)" for k in kinds], "full / sparse")
    times = {(row["kind"], row["length"]): row["seconds"] for row in rows}
    for length in sorted({length for _, length in times}):
        own = [times.get((kind, length)) for kind in kinds]
        cells = [f"{s:.2f} ({length / s:,.0f})" if s else "–" for s in own]
        pair = times.get(("full", length)), times.get(("sparse", length))
        shown.add_row(f"{length:,}", *cells, f"{pair[0] / pair[1]:.2f}" if all(pair) else "–")
    console.print(shown)
    console.print(_verdict(crossover(rows)))


def _verdict(length: float | None) -> str:
    if length is None:
        return "no crossover: sparse attention is never faster at these lengths"
    return f"sparse attention is faster from about {length:,.0f} tokens on"


@drawn
def draw(measured: list[Record], model: Timed, path: Path) -> None:
    """Milliseconds per prompt token by length, one line a model; a mark at the crossover."""
    width = 7.2
    figure = new_figure(width, 4.8, f"Time to read a prompt\n{facts_of(model)}")
    axes = figure.add_subplot()
    for i, (kind, label) in enumerate(LABELS.items()):
        rows = sorted(
            (row for row in measured if row["kind"] == kind), key=lambda row: row["length"]
        )
        if rows:
            x = [row["length"] for row in rows]
            each = [1e3 * row["seconds"] / row["length"] for row in rows]
            axes.plot(x, each, label=label, **style(i))
    log_ticks(axes, [row["length"] for row in measured], width - 1.0)
    if (crossing := crossover(measured)) is not None:
        label = f"sparse attention is faster from about {crossing:,.0f} tokens on"
        axes.axvline(crossing, color="black", linestyle=":", label=label)
    axes.set(xlabel="tokens of the prompt", ylabel="milliseconds per prompt token")
    axes.set_ylim(bottom=0)
    axes.grid()
    legend_below(figure, axes)
    save(figure, path)

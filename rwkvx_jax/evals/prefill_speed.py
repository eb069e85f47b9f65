"""Time to read a prompt against its length: the hybrid, its full-attention twin, RWKV-7.

Prompts are read piece by piece through the decode cache, as generation and evaluation do; all
lengths share one cache and so one compilation a model. Full attention is faster on short prompts
and slower on long ones: where the two lines cross is what the figure is for.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from rwkvx_jax.cache import cache_bytes
from rwkvx_jax.config import ConfigError, ModelConfig, RunConfig, to_dict
from rwkvx_jax.evals.common import open_console, until_interrupted
from rwkvx_jax.evals.figures import new_figure, save, style
from rwkvx_jax.evals.grid import Lengths
from rwkvx_jax.evals.results import Results
from rwkvx_jax.evals.speed import (
    LABELS,
    TIMED,
    ModelOptions,
    layered_model,
    load_subject,
    make_configs,
    random_params,
)
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.model import Params, with_params
from rwkvx_jax.progress import Progress
from rwkvx_jax.records import Record


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(ModelOptions):
    """Times the reading of prompts; draws milliseconds per token by length, and the crossover."""

    lengths: Lengths = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Tokens of the prompts."""
    piece: int = 2048
    """Tokens of a prompt read at once."""
    repeats: int = 3
    """Readings of each model and length, of which the median counts."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("piece", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"--{name} is {value}: it must be at least 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"--lengths is {self.lengths}: give positive numbers")

    @property
    def rows(self) -> int:
        """Rows of the cache that all lengths share."""
        return -(-max(self.lengths) // self.piece) * self.piece


class Reader:
    """Reads prompts with one model."""

    def __init__(self, config: ModelConfig, run: RunConfig, params: Params, piece: int, rows: int):
        self._piece, self._rows = piece, rows
        self._model, self._params = layered_model(config, run), params
        step = lambda p, tokens, cache, n: with_params(self._model, p).prefill(tokens, cache, n)
        self._step = jax.jit(step, donate_argnums=2)

    def __call__(self, tokens: np.ndarray) -> float:
        """Seconds in which a prompt [T] is read, from an empty cache to its last logits."""
        padded = np.pad(tokens, (0, -len(tokens) % self._piece))[None]
        cache = jax.block_until_ready(self._model.init_cache(1, self._rows))
        begin = time.perf_counter()
        for start in range(0, len(tokens), self._piece):
            count = jnp.full(1, min(self._piece, len(tokens) - start), jnp.int32)
            part = padded[:, start : start + self._piece]
            logits, cache = self._step(self._params, part, cache, count)
        logits.block_until_ready()
        return time.perf_counter() - begin


def run(options: PrefillOptions) -> None:
    """Times what an earlier run has not, prints a table, writes prefill.jsonl and prefill.png."""
    console = open_console()
    run_config, config, params = load_subject(options)
    _check_memory(options, config, run_config)
    results = open_results(options, run_config, config)
    with until_interrupted(console):
        measure(options, config, run_config, params, results, console)
    path, rows = results.path.with_suffix(".png"), results.trials(TIMED)
    print_table(rows, console)
    draw(rows, config, path)
    console.print(f"wrote {results.path} and {path}", soft_wrap=True)


def open_results(options: PrefillOptions, run_config: RunConfig, config: ModelConfig) -> Results:
    """The results file, with the rows that earlier runs measured."""
    return Results(
        options.output / "prefill.jsonl",
        task="prefill",
        settings={
            "model": to_dict(config),
            "compute_dtype": run_config.compute_dtype,
            "weights": str(options.checkpoint or "random"),
            "piece": options.piece,
            "repeats": options.repeats,
        },
        plan={"lengths": options.lengths},
        key_fields=("kind", "length"),
        planned=None,
        models=[
            {
                "label": TIMED,
                "device": jax.devices()[0].device_kind,
                "cores": os.cpu_count(),
            }
        ],
        identity_fields=("device", "cores"),
        summarize=summarize,
    )


def summarize(rows: list[Record]) -> Record:
    """Where sparse attention begins to be faster."""
    return {"crossover": crossover(rows)}


def _check_memory(options: PrefillOptions, config: ModelConfig, run_config: RunConfig) -> None:
    """Refuses a cache, or a prompt, that does not fit into the memory."""
    dtype, free = jnp.dtype(run_config.compute_dtype), memory_left()
    needed = cache_bytes(config, dtype, 1, options.rows) + 16 * options.rows
    if free is not None and needed > free:
        raise ConfigError(
            f"a prompt of {max(options.lengths):,} tokens, read {options.piece:,} at once, needs "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: lower --lengths or --piece"
        )


def measure(
    options: PrefillOptions,
    config: ModelConfig,
    run_config: RunConfig,
    params: Params,
    results: Results,
    console: Console,
    make_reader: Callable[..., Callable[[np.ndarray], float]] = Reader,
) -> None:
    """Adds the missing rows, and writes the file after each."""
    lengths, finished = sorted(set(options.lengths)), results.finished(TIMED)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, max(lengths)).astype(np.int32)
    todo = [
        (kind, length)
        for kind in options.kinds
        for length in lengths
        if (kind, length) not in finished and (kind != "full" or length <= options.full_limit)
    ]
    total = sum(length for _, length in todo) * options.repeats
    reader, current = None, None
    with Progress(console, total, "tokens") as tracker:
        for kind, length in todo:
            tracker.describe(f"{LABELS[kind]}, length {length:,}")
            if kind != current:
                reader, current = None, kind  # frees its parameters first
                own = make_configs(config)[kind]
                weights = random_params(own, run_config) if kind == "rwkv" else params
                reader = make_reader(own, run_config, weights, options.piece, options.rows)
                reader(tokens[: min(lengths)])  # compiles
                tracker.start_clock()
            seconds = []
            for _ in range(options.repeats):
                seconds.append(reader(tokens[:length]))
                tracker.advance(length)
            middle = statistics.median(seconds)
            row = {"kind": kind, "length": length, "seconds": middle, "samples": seconds}
            results.add(TIMED, [row])


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


def print_table(rows: list[Record], console: Console) -> None:
    """A row a length: seconds and tokens per second of each model, and the hybrids' ratio."""
    kinds = [k for k in LABELS if any(row["kind"] == k for row in rows)]
    table = Table("length", *[f"{LABELS[k]}\ns (tokens/s)" for k in kinds], "full / sparse")
    times = {(row["kind"], row["length"]): row["seconds"] for row in rows}
    for length in sorted({length for _, length in times}):
        own = [times.get((kind, length)) for kind in kinds]
        cells = [f"{s:.2f} ({length / s:,.0f})" if s else "–" for s in own]
        pair = times.get(("full", length)), times.get(("sparse", length))
        table.add_row(f"{length:,}", *cells, f"{pair[0] / pair[1]:.2f}" if all(pair) else "–")
    console.print(table)
    console.print(_verdict(crossover(rows)))


def _verdict(length: float | None) -> str:
    if length is None:
        return "no crossover: sparse attention is never faster at these lengths"
    return f"sparse attention is faster from about {length:,.0f} tokens on"


def draw(measured: list[Record], config: ModelConfig, path: Path) -> None:
    """Milliseconds per prompt token by length, one line a model; a mark at the crossover."""
    figure = new_figure(6.8, 4.4)
    axes = figure.add_subplot()
    for i, (kind, label) in enumerate(LABELS.items()):
        rows = sorted(
            (row for row in measured if row["kind"] == kind), key=lambda row: row["length"]
        )
        if rows:
            x = [row["length"] for row in rows]
            each = [1e3 * row["seconds"] / row["length"] for row in rows]
            axes.plot(x, each, label=label, markersize=5, **style(i))
    if (crossing := crossover(measured)) is not None:
        label = f"crossover, about {crossing:,.0f} tokens"
        axes.axvline(crossing, color="black", linestyle=":", label=label)
    axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="ms per prompt token")
    axes.set_title(
        f"Reading a prompt, L{config.num_blocks} M{config.num_attention_blocks} D{config.width}, "
        f"chunk {config.chunk_size}, top-k {config.top_k}, {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} cores",
        fontsize=9,
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.4)
    axes.legend(fontsize=8)
    save(figure, path)

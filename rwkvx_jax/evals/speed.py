"""Decode time per token against context length, beside the bytes that a token makes the model read.

Three models are timed in turn, step by step, so that their ratios come from one run: the hybrid
with sparse attention, the same weights with full attention, and RWKV-7 with as many blocks. A
decode step costs the same whatever the weights and the cache hold, so caches are not filled by
reading text: their length is set and their pages hold random rows. The machine's read bandwidth is
measured in between, and says how close a step comes to what memory allows.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from rwkvx_jax.cache import Cache, cache_bytes
from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.config import ConfigError, ModelConfig, RunConfig, to_dict
from rwkvx_jax.evals.common import check_output, open_console, until_interrupted
from rwkvx_jax.evals.figures import new_figure, save
from rwkvx_jax.evals.results import Results
from rwkvx_jax.generate.memory import memory_left
from rwkvx_jax.model import Params, abstract_model, create_model, get_params, unstack, with_params
from rwkvx_jax.ops.selection import selector_of
from rwkvx_jax.records import Record
from rwkvx_jax.storage import WorkPath

LABELS = {
    "sparse": "RWKV-X (sparse attention)",
    "rwkv": "RWKV-7 with as many blocks",
    "full": "full-attention hybrid",
}
_IDENTITY = ("model", "compute_dtype", "weights", "device", "cores")
TIMED = "model"  # the only one of a results file
_READ_BYTES = 1 << 29  # of the array by which the bandwidth is measured


def _numbers(words: list[str]) -> tuple[int, ...]:
    return tuple(int(word) for word in words[0].split(","))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Flags of every measurement of time: which models."""

    output: WorkPath
    """Directory of the results."""
    checkpoint: WorkPath | None = None
    """Model to time; without one, a model of the sizes below with random weights."""
    num_blocks: int = 12
    num_attention_blocks: int = 4
    width: int = 768
    vocab_size: int = 65536
    chunk_size: int = 2048
    top_k: int = 3
    kinds: tuple[Literal["sparse", "rwkv", "full"], ...] = ("sparse", "rwkv", "full")
    """Models to time."""
    full_limit: int = 65536
    """Longest context of the full-attention hybrid."""

    def __post_init__(self):
        for name in ("full_limit", *(() if self.checkpoint else ("num_blocks",))):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {getattr(self, name)}: it must be at least 1")
        if not self.kinds:
            raise ConfigError("--kinds is empty: name at least one of sparse, rwkv, full")
        check_output(self.output)


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(ModelOptions):
    """Times decode steps at several context lengths; draws milliseconds by context."""

    contexts: Annotated[
        tuple[int, ...],
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="N,N,...",
            instance_from_str=_numbers,
            is_instance=lambda x: isinstance(x, tuple),
            str_from_instance=lambda x: [",".join(map(str, x))],
        ),
    ] = (1024, 8192, 65536, 262144, 1048576)
    """Tokens in the cache, to which half a chunk is added."""
    steps: int = 15
    """Steps of each model and context, after two of warm-up."""
    memory_gb: float = 8.0
    """Contexts whose cache is larger than this are left out."""

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}: it must be at least 1")
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"--contexts is {self.contexts}: give positive numbers")
        if not 0 < self.memory_gb < math.inf:
            raise ConfigError(f"--memory-gb is {self.memory_gb}: give a number above 0")


class Runner(NamedTuple):
    """One model, ready to step."""

    step: Callable[[Params, jax.Array, Cache], tuple[jax.Array, Cache]]
    params: Params
    config: ModelConfig


def run(options: SpeedOptions) -> None:
    """Times what an earlier run has not, prints a table, writes `speed.jsonl` and `speed.png`."""
    console = open_console()
    run_config, config, params = load_subject(options)
    contexts, left_out = sorted(set(options.contexts)), []
    for context in contexts:
        size = _cache_size(config, run_config, context)
        if size > options.memory_gb * 1e9:
            left_out.append({"context": context, "cache_bytes": size})
            console.print(f"context {context:,} left out: its cache takes {size / 1e9:.1f} GB")
    contexts = [c for c in contexts if c not in [out["context"] for out in left_out]]
    results = _open_results(options, run_config, config, left_out)
    with until_interrupted(console):
        _measure(options, contexts, run_config, config, params, results)
    order = list(LABELS)
    rows = sorted(results.trials(TIMED), key=lambda row: (row["context"], order.index(row["kind"])))
    if not rows:
        raise ConfigError(
            f"none of the contexts {options.contexts} fits into --memory-gb {options.memory_gb:g}"
        )
    _print(console, rows)
    _draw(options.output / "speed.png", rows)


def _open_results(
    options: SpeedOptions, run_config: RunConfig, config: ModelConfig, left_out: list[Record]
) -> Results:
    model = {
        "label": TIMED,
        "model": to_dict(config),
        "compute_dtype": run_config.compute_dtype,
        "weights": str(options.checkpoint or "random"),
        "device": jax.devices()[0].device_kind,
        "cores": _cores(),
    }
    return Results(
        options.output / "speed.jsonl",
        task="speed",
        settings={},
        plan={"contexts": options.contexts, "steps": options.steps, "left_out": left_out},
        key_fields=("kind", "context"),
        planned=None,
        models=[model],
        identity_fields=_IDENTITY,
        summarize=lambda rows: {},
    )


def _measure(
    options: SpeedOptions,
    contexts: Sequence[int],
    run_config: RunConfig,
    config: ModelConfig,
    params: Params,
    results: Results,
) -> None:
    """Adds the missing rows, one context after the other."""
    runners, finished = _runners(options, config, run_config, params), results.finished(TIMED)
    data = np.ones(_READ_BYTES // 8, np.int64)
    for context in contexts:
        missing = {k: r for k, r in runners.items() if (k, context) not in finished}
        missing = {k: r for k, r in missing.items() if k != "full" or context <= options.full_limit}
        if missing:
            results.add(TIMED, _time_context(options, missing, run_config, context, data))


def _cache_size(config: ModelConfig, run_config: RunConfig, context: int) -> int:
    dtype = jnp.dtype(run_config.compute_dtype)
    return cache_bytes(config, dtype, 1, context + config.chunk_size)


def load_subject(options: ModelOptions) -> tuple[RunConfig, ModelConfig, Params]:
    """The hybrid's parameters, one array a layer."""
    if options.checkpoint is not None:
        loaded = load_checkpoint(options.checkpoint)
        return loaded.model.run, loaded.model.config, get_params(unstack(loaded.model))
    config = ModelConfig(
        num_blocks=options.num_blocks,
        num_attention_blocks=options.num_attention_blocks,
        width=options.width,
        vocab_size=options.vocab_size,
        chunk_size=options.chunk_size,
        top_k=options.top_k,
    )
    _check_size(config)
    cpu = jax.default_backend() == "cpu"
    run_config = RunConfig(compute_dtype="float32" if cpu else "bfloat16")
    return run_config, config, random_params(config, run_config)


def _check_size(config: ModelConfig) -> None:
    """Refuses random weights that can't fit into the memory, by their large matrices alone."""
    blocks = config.num_blocks + config.num_attention_blocks
    least = 4 * config.width * (8 * config.width * blocks + 2 * config.vocab_size)
    free = memory_left()
    if free is not None and least > free:
        raise ConfigError(
            f"a model of {blocks:,} blocks of width {config.width:,} and {config.vocab_size:,} "
            f"tokens has more than {least / 1e9:,.1f} GB of weights, and {free / 1e9:,.1f} GB are "
            "free: lower --num-blocks, --width or --vocab-size"
        )


def random_params(config: ModelConfig, run_config: RunConfig) -> Params:
    """Parameters of an unstacked model, drawn fast; good for nothing but timing."""
    rng = np.random.default_rng(0)
    shapes = get_params(layered_model(config, run_config))
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * 0.02)
    return jax.tree.map(draw, shapes)


def layered_model(config: ModelConfig, run_config: RunConfig):
    """The model with shapes in place of arrays, one array a layer."""
    return jax.eval_shape(lambda: unstack(create_model(config, run_config)))


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


def make_configs(config: ModelConfig) -> dict[str, ModelConfig]:
    """The models that are compared, by kind."""
    blocks = config.num_blocks + config.num_attention_blocks
    return {
        "sparse": config,
        "rwkv": replace(config, num_blocks=blocks, num_attention_blocks=0),
        "full": replace(config, attention="full"),
    }


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
    states = config.num_blocks * config.num_heads * config.head_size**2 * 4
    chunk = config.chunk_size
    past, filled = length // chunk, length % chunk + 1
    if config.attention == "full":
        rows, kept = length + 1, 0
    else:
        rows = min(past, config.top_k - 1) * chunk + filled
        kept = past * selector_of(config).rows
    attention = config.num_attention_blocks * config.width * (2 * rows * item + 4 * kept)
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
    pages = pages._replace(keys=fill(pages.keys, page), values=fill(pages.values, page))
    return replace(
        cache,
        length=jnp.full(1, length, jnp.int32),
        pages=pages._replace(key_sums=sums),
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


def _print(console: Console, rows: list[Record]) -> None:
    table = Table(
        "model", "context", "ms/token", "MB read", "GB/s", "of bandwidth", "time, bytes / RWKV-7"
    )
    base = {row["context"]: row for row in rows if row["kind"] == "rwkv"}
    for row in rows:
        other = base.get(row["context"])
        quotient = ""
        if other:
            times = row["milliseconds"] / other["milliseconds"]
            quotient = f"{times:.3f} / {row['bytes'] / other['bytes']:.3f}"
        table.add_row(
            LABELS[row["kind"]],
            f"{row['context']:,}",
            f"{row['milliseconds']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['bytes'] / row['milliseconds'] / 1e6:.1f}",
            f"{row['share_of_bandwidth']:.0%}",
            quotient,
        )
    console.print(table)


def _draw(path: Path, measured: list[Record]) -> None:
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for kind, label in LABELS.items():
        rows = [row for row in measured if row["kind"] == kind]
        if rows:
            x = [row["context"] for row in rows]
            (line,) = axes.plot(x, [row["milliseconds"] for row in rows], "o-", label=label)
            least = [row["bytes"] / row["bandwidth"] * 1e3 for row in rows]
            axes.plot(x, least, ":", color=line.get_color())
    axes.set(
        xscale="log",
        xlabel="tokens in the cache",
        ylabel="ms per token",
        title="Decoding; dotted: reading what must be read at the measured bandwidth",
    )
    axes.title.set_fontsize("medium")
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, path)

"""What packed documents cost: each operation with and without `segment_ids`, side by side.

    python benchmarks/segments.py --output segments.json

Forward + backward of the recurrence, of both kinds of attention (chunk selection included) and of a
model as `ModelConfig.tiny()` has it, three ways: without ids, with ids that say that a row is one
document (the same work, so that what is measured is what resets cost), and with documents of
`--document` tokens, of which attention reads less. Every figure is the median over rounds in which
the three take turns, after an untimed round.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax import ModelConfig, RunConfig, create_model, wkv7
from rwkvx_jax.model import get_params, with_params
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import full_attention

WAYS = ("without ids", "one document", "packed")


def main() -> None:
    options = parse_options()
    rows = {name: measure(*case, options) for name, case in cases(options).items()}
    print(table(rows))
    if options.output:
        machine = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
        settings = {k: str(v) for k, v in vars(options).items() if k != "output"}
        found = {"seconds": rows, "settings": settings, **machine}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--document", type=int, default=300, help="tokens of a packed document")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def cases(options) -> dict:
    """Function of (arrays, segment ids), and its arrays."""
    rng = np.random.default_rng(0)
    shape = (1, options.length, options.heads, 64)
    normal = lambda: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kk = normal()
    kk /= jnp.linalg.norm(kk, axis=-1, keepdims=True)
    log_w = -0.6 * jax.nn.sigmoid(normal())
    tokens = (normal(), log_w, normal(), normal(), -kk, kk * jax.nn.sigmoid(normal()))
    qkv = (normal(), normal(), normal())
    chunks = {"chunk_size": options.chunk_size, "top_k": options.top_k}
    sparse = lambda form: partial(sparse_attention, implementation=form, **chunks)
    config = dataclasses.replace(ModelConfig.tiny(), **chunks)
    model = create_model(config, RunConfig(compute_dtype="float32", remat="none"))
    text = jnp.asarray(rng.integers(0, config.vocab_size, shape[:2]), jnp.int32)
    logits = lambda params, segment_ids=None: with_params(model, params)(text, segment_ids)
    found = {
        "wkv7 chunked": (partial(wkv7, implementation="chunked"), tokens),
        "sparse_attention xla": (sparse("xla"), qkv),
        "sparse_attention masked": (sparse("masked"), qkv),
        "full_attention blocked": (partial(full_attention, implementation="blocked"), qkv),
        "model": (logits, (get_params(model),)),
    }
    return {name: case for name, case in found.items() if options.only in name}


def measure(op, arrays, options) -> dict[str, float]:
    """Median seconds of each way."""
    places = np.arange(options.length)[None]
    ids = dict(zip(WAYS, (None, 1 + 0 * places, 1 + places // options.document), strict=True))

    def loss(arrays, ids):
        out = op(*arrays, segment_ids=ids)
        return sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(out))

    ids = {way: None if x is None else jnp.asarray(x, jnp.int32) for way, x in ids.items()}
    run = jax.jit(jax.grad(loss))
    times = {way: [] for way in WAYS}
    for turn in range(options.repeats + 1):
        for way in WAYS:
            start = time.perf_counter()
            jax.block_until_ready(run(arrays, ids[way]))
            if turn:
                times[way].append(time.perf_counter() - start)
    return {way: statistics.median(t) for way, t in times.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| forward + backward, ms | " + " | ".join(WAYS) + " |", "|---|---|---|---|"]
    for name, seconds in rows.items():
        plain = seconds[WAYS[0]]
        cells = [f"{1000 * plain:.1f}"]
        for way in WAYS[1:]:
            cells.append(f"{1000 * seconds[way]:.1f} ({100 * (seconds[way] / plain - 1):+.1f} %)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

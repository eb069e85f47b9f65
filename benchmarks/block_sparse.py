"""Sparse attention beside dense causal attention, side by side in one run.

    python benchmarks/block_sparse.py --output block_sparse.json --plot block_sparse.png

For each length: the gate (`select_chunks`) alone, `sparse_attention` with the selection given, and
`full_attention`, forward and forward + backward. Every figure is the minimum over rounds in which
all the functions of a length take turns, after an untimed round; dense runs longer than
`--long-run` seconds are made once. Below the table stand the three statements it is for: how flat
the sparse time per token is, from which length on sparse attention (gate included) is the faster
one, and by how much at the greatest length.

    python benchmarks/block_sparse.py --forms --lengths 1024,4096,8192 --chunk-size 32 --top-k 64

also times both XLA forms of `sparse_attention`, between which the op chooses by shape. Where every
chunk is read (length <= chunk size * top-k), models neither select nor mask: there the columns of
sparse attention say what a given selection costs, and `full` is what they run.
"""

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.selection import select_chunks

COLUMNS = ("gate", "sparse", "sparse fb", "full", "full fb")
FORMS = ("xla", "masked")
FLAT_FROM = 16384


def main() -> None:
    options = parse_options()
    rows = [measure_length(length, options) for length in options.lengths]
    forms = [form + suffix for form in FORMS for suffix in ("", " fb")]
    print(table(rows, [*COLUMNS, *(forms if options.forms else ())]))
    print(summary := summarize(rows))
    if options.output:
        options.output.write_text(json.dumps(report(options, rows, summary), indent=1) + "\n")
    if options.plot:
        plot(rows, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    lengths = "1024,1536,2048,3072,4096,8192,16384,32768,65536,131072"
    parser.add_argument("--lengths", type=lambda s: [int(x) for x in s.split(",")], default=lengths)
    parser.add_argument("--longest-full", type=int, default=131072, help="no dense run beyond")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--key-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--skewed", action="store_true", help="all queries choose the first chunks")
    parser.add_argument("--forms", action="store_true", help="both XLA forms besides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long-run", type=float, default=10.0, help="seconds; such runs once")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    return parser.parse_args()


def measure_length(length: int, options) -> dict:
    """Compiles and times everything at one length; seconds, and bytes of temporaries."""
    functions, arguments = build(length, options)
    compiled = {name: f.lower(*arguments[name]).compile() for name, f in functions.items()}
    seconds = dict.fromkeys(compiled, float("inf"))
    once = set()
    for turn in range(options.repeats + 1):
        for name, run in compiled.items():
            if name in once:
                continue
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments[name]))
            elapsed = time.perf_counter() - start
            if elapsed > options.long_run:
                once.add(name)
            if turn or name in once:
                seconds[name] = min(seconds[name], elapsed)
    memory = {name: run.memory_analysis().temp_size_in_bytes for name, run in compiled.items()}
    print(f"{length}: " + ", ".join(f"{n} {s:.4f} s" for n, s in seconds.items()), file=sys.stderr)
    return {"length": length, "seconds": seconds, "temporary_bytes": memory}


def build(length: int, options) -> tuple[dict, dict]:
    """The functions to time and their arguments, by column."""
    shape = 1, length, options.heads, options.key_size
    q, k, v, grad = (jax.random.normal(jax.random.key(i), shape, options.dtype) for i in range(4))
    chunking = {"chunk_size": options.chunk_size, "top_k": options.top_k}
    gate = jax.jit(lambda q, k: select_chunks(q, k, **chunking))
    chosen = gate(q, jnp.zeros_like(k) if options.skewed else k)

    def sparse(q, k, v, chosen, form=None):
        return sparse_attention(q, k, v, selection=chosen, implementation=form, **chunking)

    def with_backward(attend):
        def run(grad, q, k, v, *more):
            return jax.vjp(lambda *qkv: attend(*qkv, *more), q, k, v)[1](grad)

        return jax.jit(run)

    functions = {"gate": gate, "sparse": jax.jit(sparse), "sparse fb": with_backward(sparse)}
    arguments = {
        "gate": (q, k),
        "sparse": (q, k, v, chosen),
        "sparse fb": (grad, q, k, v, chosen),
    }
    if length <= options.longest_full:
        functions |= {"full": jax.jit(full_attention), "full fb": with_backward(full_attention)}
        arguments |= {"full": (q, k, v), "full fb": (grad, q, k, v)}
    for form in FORMS if options.forms else ():
        attend = partial(sparse, form=form)
        functions |= {form: jax.jit(attend), form + " fb": with_backward(attend)}
        arguments |= {form: arguments["sparse"], form + " fb": arguments["sparse fb"]}
    return functions, arguments


def table(rows: list[dict], columns: list[str]) -> str:
    """Microseconds a token, and dense over sparse (gate included), as Markdown."""
    head = ["length", *columns, "full / sparse", "full / sparse fb", "MB sparse fb", "MB full fb"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row["length"])]
        cells += [number(row["seconds"].get(name), 1e6 / row["length"]) for name in columns]
        cells += [number(ratio(row, suffix), 1) for suffix in ("", " fb")]
        memory = row["temporary_bytes"]
        cells += [number(memory.get(name), 1 / 2**20, 0) for name in ("sparse fb", "full fb")]
        lines.append("| " + " | ".join(cells) + " |")
    return "microseconds a token\n\n" + "\n".join(lines) + "\n"


def number(value: float | None, factor: float, digits: int = 2) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def ratio(row: dict, suffix: str) -> float | None:
    """Time of dense attention over that of gate and sparse attention."""
    seconds = row["seconds"]
    if "full" not in seconds:
        return None
    return seconds["full" + suffix] / (seconds["gate"] + seconds["sparse" + suffix])


def summarize(rows: list[dict]) -> str:
    lines = []
    for suffix, name in (("", "forward"), (" fb", "forward + backward")):
        long = [row for row in rows if row["length"] >= FLAT_FROM]
        if len(long) > 1:
            costs = [row["seconds"]["sparse" + suffix] / row["length"] for row in long]
            spread = max(costs) / min(costs) - 1
            lines.append(
                f"{name}: sparse time per token varies by {spread:.1%} from "
                f"{long[0]['length']} to {long[-1]['length']} tokens (gate apart)"
            )
        lines.append(f"{name}: {crossover(rows, suffix)}")
        compared = [row for row in rows if ratio(row, suffix) is not None]
        if compared:
            lines.append(
                f"{name}: sparse with gate {ratio(compared[-1], suffix):.1f} times faster than "
                f"full at {compared[-1]['length']} tokens"
            )
    return "\n".join(lines)


def crossover(rows: list[dict], suffix: str) -> str:
    """Between which measured lengths sparse attention with its gate becomes the faster."""
    slower = [row["length"] for row in rows if (ratio(row, suffix) or 1) < 1]
    faster = [row["length"] for row in rows if (ratio(row, suffix) or 0) > 1]
    later = [length for length in faster if length > max(slower, default=0)]
    if not later:
        return "sparse is not faster at any measured length"
    if not slower:
        return f"sparse is faster at every measured length, from {later[0]} tokens"
    return f"sparse becomes faster between {max(slower)} and {later[0]} tokens"


def report(options, rows, summary) -> dict:
    return {
        "command": " ".join(["python", *sys.argv]),
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
        "summary": summary.splitlines(),
    }


def plot(rows: list[dict], options) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, sharey=True)
    panels = (("forward", ""), ("forward + backward", " fb"))
    for axis, (title, suffix) in zip(axes, panels, strict=True):
        for name in ("full" + suffix, "sparse" + suffix, "gate"):
            points = [
                (row["length"], row["seconds"][name] / row["length"] * 1e6)
                for row in rows
                if name in row["seconds"]
            ]
            axis.loglog(*zip(*points, strict=True), marker="o", label=name.removesuffix(" fb"))
        axis.set_title(f"{title}, chunk {options.chunk_size}, top-k {options.top_k}")
        axis.set_xlabel("tokens")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("microseconds a token")
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()

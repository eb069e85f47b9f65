"""The chunked recurrence beside scans over tokens, side by side in one run on the CPU.

    python benchmarks/recurrence.py --output recurrence.json --plot recurrence.png

Three questions, each with its table:
1. Speed: every scan we could think of, "chunked" and "associative", forward and forward + backward,
   at one length. A scan is only a fair rival at its best, so the ratio is to the fastest of them.
2. Is the time per token of "chunked" flat in the length?
3. Memory of forward + backward, chunked against the scans: the temporaries the compiler plans
   (inputs and outputs apart), and how far the process grows when it runs (outputs included).

All times are medians over rounds in which the candidates take turns, after an untimed round.
Before that, every candidate is checked against the oracle, gradients included.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scans import SCANS

from rwkvx_jax.ops.recurrence import wkv7

MEBIBYTE = 2**20
SLOW = 1.0  # seconds; functions that take longer are timed three times only


def main() -> None:
    options = parse_options()
    jax.config.update("jax_platforms", "cpu")
    if options.grow:
        print(growth(options.grow, options.length, options))
        return
    check(options)
    speed = measure_speed(options)
    flat = measure_flatness(options)
    memory = measure_memory(options)
    summary = summarize(speed, flat, memory)
    print("\n\n".join([speed_table(speed), flat_table(flat), memory_table(memory), summary]))
    if options.output:
        options.output.write_text(
            json.dumps(report(options, speed, flat, memory, summary), indent=1) + "\n"
        )
    if options.plot:
        plot(speed, flat, memory, options.plot)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096, help="T of the speed table")
    lengths = {"type": lambda s: [int(x) for x in s.split(",")]}
    parser.add_argument("--flat-lengths", **lengths, default="4096,8192,16384,32768,65536")
    parser.add_argument("--memory-lengths", **lengths, default="1024,4096,16384")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--grow", help=argparse.SUPPRESS)  # a child process: see `growth`
    return parser.parse_args()


OURS = {
    "chunked": functools.partial(wkv7, implementation="chunked"),
    "associative": functools.partial(wkv7, implementation="associative"),
}
CANDIDATES = SCANS | OURS


# ------------------------------------------------------------------------------------ measuring


def make_inputs(length: int, options) -> list[jax.Array]:
    """Random inputs as RWKV-7 makes them: unit removal keys, decays over their whole range."""
    rng = np.random.default_rng(0)
    shape = (options.batch, length, options.heads, options.head_size)
    r, k, v, kk = (rng.standard_normal(shape) for _ in range(4))
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    iclr = 1 / (1 + np.exp(-rng.standard_normal(shape)))
    log_w = -np.exp(-0.5) / (1 + np.exp(-2 * rng.standard_normal(shape)))
    state = rng.standard_normal((options.batch, options.heads, *shape[-1:] * 2))
    return [jnp.asarray(x, jnp.float32) for x in (r, log_w, k, v, -kk, kk * iclr, state)]


def forward_backward(form):
    """jit of the gradients of all seven inputs, of a sum of squares of y and the last state."""

    def loss(*inputs):
        y, state = form(*inputs)
        return (y**2).sum() + (state**2).sum()

    return jax.jit(jax.grad(loss, range(7)))


def check(options) -> None:
    """Raises unless every candidate has the oracle's gradients."""
    inputs = make_inputs(64, options)
    oracle = functools.partial(wkv7, implementation="sequential")
    expected = forward_backward(oracle)(*inputs)
    for name, form in CANDIDATES.items():
        for actual, wanted in zip(forward_backward(form)(*inputs), expected, strict=True):
            error = float(jnp.abs(actual - wanted).max() / jnp.abs(wanted).max())
            if not error < 1e-4:
                raise AssertionError(f"{name}: a gradient is off by {error:.1e}")


def take_turns(functions: dict, arguments: dict, repeats: int, settle=False) -> dict:
    """Median seconds of each compiled function; all of them run in every round.

    `settle` runs each once untimed just before it is timed: where sizes differ much, the memory a
    large one gave back makes the next small one pay for fresh pages.
    """
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, run in functions.items():
            if len(times[name]) == 3 and min(times[name]) > SLOW:
                continue
            if settle:
                jax.block_until_ready(run(*arguments[name]))
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments[name]))
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure_speed(options) -> list[dict]:
    inputs = make_inputs(options.length, options)
    functions = {}
    for name, form in CANDIDATES.items():
        functions[name, "forward"] = jax.jit(form).lower(*inputs).compile()
        functions[name, "both"] = forward_backward(form).lower(*inputs).compile()
    seconds = take_turns(functions, dict.fromkeys(functions, inputs), options.repeats)
    return [
        {
            "name": name,
            "forward_seconds": seconds[name, "forward"],
            "both_seconds": seconds[name, "both"],
            "temporary_bytes": functions[name, "both"].memory_analysis().temp_size_in_bytes,
        }
        for name in CANDIDATES
    ]


def measure_flatness(options) -> list[dict]:
    run = forward_backward(OURS["chunked"])
    arguments = {n: make_inputs(n, options) for n in options.flat_lengths}
    functions = {n: run.lower(*x).compile() for n, x in arguments.items()}
    seconds = take_turns(functions, arguments, options.repeats, settle=True)
    return [
        {
            "length": n,
            "both_seconds": s,
            "temporary_bytes": functions[n].memory_analysis().temp_size_in_bytes,
        }
        for n, s in seconds.items()
    ]


def measure_memory(options) -> list[dict]:
    """Forward + backward of "chunked" and of the scans that keep few states."""
    names = ["chunked", *(name for name in SCANS if "keep every" in name and "sum" not in name)]
    rows = []
    for length in options.memory_lengths:
        inputs = make_inputs(length, options)
        for name in names:
            compiled = forward_backward(CANDIDATES[name]).lower(*inputs).compile()
            row = {"name": name, "length": length}
            row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            row["growth_bytes"] = grown_in_a_process(name, length, options)
            rows.append(row)
    return rows


def grown_in_a_process(name: str, length: int, options) -> int | None:
    """`growth` in a process of its own, where nothing else has touched memory before."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    sizes = {"batch": options.batch, "heads": options.heads, "head-size": options.head_size}
    flags = [f"--{key}={value}" for key, value in sizes.items()]
    command = [sys.executable, __file__, f"--grow={name}", f"--length={length}", *flags]
    path = os.pathsep.join(
        [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    return int(result.stdout.split()[-1])


def growth(name: str, length: int, options) -> int:
    """Bytes by which one call raises this process's resident memory at its peak (Linux)."""

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024

    inputs = make_inputs(length, options)
    compiled = forward_backward(CANDIDATES[name]).lower(*inputs).compile()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that compilation left
    before = status("VmRSS")
    jax.block_until_ready(compiled(*inputs))
    return status("VmHWM") - before


# ------------------------------------------------------------------------------------ reporting


def fastest_scan(speed: list[dict], hand_written: bool) -> dict:
    rivals = [x for x in speed if x["name"] in SCANS]
    if not hand_written:
        rivals = [x for x in rivals if "hand-written" not in x["name"]]
    return min(rivals, key=lambda x: x["both_seconds"])


def summarize(speed, flat, memory) -> str:
    ours = next(x for x in speed if x["name"] == "chunked")
    lines = []
    for hand_written, words in ((False, "differentiated by JAX"), (True, "of all")):
        rival = fastest_scan(speed, hand_written)
        ratio = rival["both_seconds"] / ours["both_seconds"]
        lines.append(
            f"Forward + backward: {ratio:.2f} times as fast as the fastest scan {words} "
            f"({rival['name']})."
        )
    per_token = [x["both_seconds"] / x["length"] for x in flat]
    lines.append(
        f"Time per token from {flat[0]['length']} to {flat[-1]['length']} tokens: "
        f"highest / lowest = {max(per_token) / min(per_token):.3f}."
    )
    for rival in {fastest_scan(speed, h)["name"]: None for h in (False, True)}:
        of = lambda name, key: [x[key] for x in memory if x["name"] == name]
        pairs = zip(of("chunked", "temporary_bytes"), of(rival, "temporary_bytes"), strict=False)
        ratios = [f"{a / b:.2f}" for a, b in pairs]
        lines.append(f"Temporaries over those of {rival}: {', '.join(ratios)}.")
    return "\n".join(lines)


def markdown(header: list, rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def speed_table(speed) -> str:
    ours = next(x["both_seconds"] for x in speed if x["name"] == "chunked")
    rows = []
    for x in sorted(speed, key=lambda x: -x["both_seconds"]):
        times = f"{x['forward_seconds'] * 1e3:.1f}", f"{x['both_seconds'] * 1e3:.1f}"
        ratio, memory = x["both_seconds"] / ours, x["temporary_bytes"] / MEBIBYTE
        rows.append([x["name"], *times, f"{ratio:.2f}", f"{memory:.1f}"])
    header = ["", "forward ms", "forward + backward ms", "over chunked", "temporaries MiB"]
    return markdown(header, rows)


def flat_table(flat) -> str:
    rows = []
    for x in flat:
        length, seconds, memory = x["length"], x["both_seconds"], x["temporary_bytes"] / MEBIBYTE
        rows.append(
            [length, f"{seconds * 1e3:.0f}", f"{seconds / length * 1e6:.2f}", f"{memory:.1f}"]
        )
    header = ["T", "chunked, forward + backward ms", "microseconds a token", "temporaries MiB"]
    return markdown(header, rows)


def memory_table(memory) -> str:
    lengths = sorted({x["length"] for x in memory})
    cells = {x["name"]: [] for x in memory}
    for x in memory:
        grown = "-" if x["growth_bytes"] is None else f"{x['growth_bytes'] / MEBIBYTE:.0f}"
        cells[x["name"]].append(f"{x['temporary_bytes'] / MEBIBYTE:.1f} ({grown})")
    rows = [[name, *line] for name, line in cells.items()]
    return markdown(["MiB of temporaries (growth of the process)", *lengths], rows)


def report(options, speed, flat, memory, summary) -> dict:
    return {
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "sizes": {k: getattr(options, k) for k in ("batch", "heads", "head_size", "repeats")},
        "length": options.length,
        "speed": speed,
        "flatness": flat,
        "memory": memory,
        "summary": summary.split("\n"),
    }


def plot(speed, flat, memory, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    rows = sorted(speed, key=lambda x: x["both_seconds"])
    left.barh([x["name"] for x in rows], [x["both_seconds"] * 1e3 for x in rows])
    left.set(xscale="log", title="forward + backward", xlabel="ms")
    middle.plot(
        [x["length"] for x in flat], [x["both_seconds"] / x["length"] * 1e6 for x in flat], "o-"
    )
    middle.set(xscale="log", ylim=(0, None), title="chunked: time per token", xlabel="T")
    middle.set_ylabel("microseconds")
    for name in dict.fromkeys(x["name"] for x in memory):
        rows = [x for x in memory if x["name"] == name]
        sizes = [x["temporary_bytes"] / MEBIBYTE for x in rows]
        right.loglog([x["length"] for x in rows], sizes, "o-", label=name)
    right.set(title="temporaries, forward + backward", xlabel="T", ylabel="MiB")
    right.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

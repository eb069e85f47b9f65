"""The generalized delta rule in its four kinds beside scans over tokens, in one run on the CPU.

    python benchmarks/neighbours.py --output neighbours.json

The kinds: one decay a head or one a channel, each with what a key finds removed (a delta rule) or
not (linear attention). Rivals of a delta rule are all scans of scans.py, and of linear attention
the same without the removal; ratios are to the fastest of them. Forward + backward, medians over
rounds in which all take turns, after an untimed round. The last lines: linear attention beside the
delta rule, and RWKV-7's own op beside the general one.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from recurrence import take_turns
from scans import SCANS, outer, scan

from rwkvx_jax.ops.delta_rule import generalized_delta_rule
from rwkvx_jax.ops.recurrence import wkv7

# Name: whether one decay a head, whether anything is removed, the bound of its decays.
KINDS = {
    "Gated DeltaNet": (True, True, None),
    "KDA": (False, True, -5.0),
    "KDA, no bound given": (False, True, None),
    "Mamba-2": (True, False, None),
    "GLA": (False, False, None),
    "RWKV-7": (False, True, -0.6066),
}


def linear_step(state, token):
    """Linear attention as it is written; a and b are there for the scans' sake."""
    r, w, k, v, _, _ = token
    state = state * w[..., None, :] + outer(v, k)
    return state, jnp.einsum("bhvk,bhk->bhv", state, r)


LINEAR_SCANS = {
    "linear scan": scan(linear_step),
    "linear scan, keep every 16th": scan(linear_step, 16),
    "linear scan, keep every 32nd": scan(linear_step, 32),
}


def make_inputs(options, scalar: bool, bound: float | None) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shape = (options.batch, options.length, options.heads, options.head_size)
    r, k, v, key = (rng.standard_normal(shape) for _ in range(4))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    steps = rng.uniform(np.log(1e-3), np.log(-bound if bound else 16), shape)
    inputs = {"r": r, "k": k, "v": v, "a": -key, "b": 0.5 * key}
    inputs["log_w"] = -np.exp(steps)[..., :1] if scalar else -np.exp(steps)
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}


def candidates(options, scalar: bool, delta: bool, bound: float | None) -> dict:
    """Functions of the inputs, y and the state each, by name."""
    batch, heads, size = options.batch, options.heads, options.head_size
    state = jnp.zeros((batch, heads, size, size))

    def rival(run, inputs):
        wide = inputs | {"log_w": jnp.broadcast_to(inputs["log_w"], inputs["k"].shape)}
        return run(*(wide[name] for name in ("r", "log_w", "k", "v", "a", "b")), state)

    def ours(implementation, inputs):
        used = inputs if delta else {n: x for n, x in inputs.items() if n not in "ab"}
        options = {"decay_bound": bound, "implementation": implementation}
        return generalized_delta_rule(**used, **options)

    scans = SCANS if delta else LINEAR_SCANS
    found = {name: functools.partial(rival, run) for name, run in scans.items()}
    for name in ("chunked", "associative"):
        found[name] = functools.partial(ours, name)
    if bound == KINDS["RWKV-7"][2]:
        found["wkv7"] = functools.partial(rival, wkv7)
    return found


def forward_backward(run):
    def loss(inputs):
        y, state = run(inputs)
        return (y**2).sum() + (state**2).sum()

    return jax.jit(jax.grad(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    functions, arguments = {}, {}
    for kind, (scalar, delta, bound) in KINDS.items():
        inputs = make_inputs(options, scalar, bound)
        for name, run in candidates(options, scalar, delta, bound).items():
            arguments[kind, name] = (inputs,)
            functions[kind, name] = forward_backward(run).lower(inputs).compile()
    seconds = take_turns(functions, arguments, options.repeats)
    report(options, seconds)


def report(options, seconds: dict) -> None:
    rows = []
    for kind in KINDS:
        mine = {name: s for (of, name), s in seconds.items() if of == kind}
        scans = {name: s for name, s in mine.items() if "scan" in name}
        best = min(scans, key=scans.get)
        row = {"kind": kind, "fastest scan": best, "seconds": mine}
        rows.append(row)
        times = [f"{n} {mine[n] * 1e3:.0f} ms" for n in ("chunked", "associative")]
        times += [f"wkv7 {mine['wkv7'] * 1e3:.0f} ms"] if "wkv7" in mine else []
        ratio = scans[best] / min(mine["chunked"], mine["associative"])
        print(f"{kind:20} {best} {scans[best] * 1e3:.0f} ms, {', '.join(times)}: {ratio:.1f} times")
    chunked = {row["kind"]: row["seconds"]["chunked"] for row in rows}
    print(f"a head: delta / linear {chunked['Gated DeltaNet'] / chunked['Mamba-2']:.2f}")
    print(f"a channel: delta / linear {chunked['KDA, no bound given'] / chunked['GLA']:.2f}")
    if options.output:
        settings = {name: str(value) for name, value in vars(options).items()}
        settings |= {"jax": jax.__version__}
        options.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

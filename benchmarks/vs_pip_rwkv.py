"""Compares this library with the `rwkv` package on one RWKV-7: batch 1, CPU, float32.

Both run the same random weights, written by our converter, in processes of their own that take
turns, so that ratios come from one run. The `rwkv` package and torch live in a throw-away
environment, made on first use; nothing else in this project needs them:

    python benchmarks/vs_pip_rwkv.py --environment build/pip-rwkv

Prints milliseconds per decoded token and prompt tokens per second of both, their ratios, and the
largest difference of the logits (the two must agree, or the comparison means nothing).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("torch==2.13.0", "rwkv==0.8.32", "numpy", "safetensors")

# Commands on standard input, one a line; one JSON line in answer to each.
PIP_WORKER = """
import json, os, sys, time
os.environ["RWKV_V7_ON"] = "1"; os.environ["RWKV_JIT_ON"] = "1"; os.environ["RWKV_CUDA_ON"] = "0"
out, sys.stdout = sys.stdout, sys.stderr
import torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
prompt, count = json.loads(sys.argv[2]), int(sys.argv[3])
for line in sys.stdin:
    begin = time.perf_counter()
    with torch.no_grad():
        logits, state = model.forward(prompt, None)
        read = time.perf_counter() - begin
        steps = []
        for i in range(count):
            begin = time.perf_counter()
            logits, state = model.forward([prompt[i]], state)
            steps.append(time.perf_counter() - begin)
    out.write(json.dumps([read, steps, logits[:512].float().tolist()]) + "\\n"); out.flush()
"""

OUR_WORKER = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np
from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.generate.rows import Rows
from rwkvx_jax.generate.sampling import Sampling
model = load_checkpoint(sys.argv[1] + ".pth").model
prompt, count = json.loads(sys.argv[2]), int(sys.argv[3])
rows = Rows(model, 1, 1, len(prompt), Sampling(), None)
del model
decode = jax.jit(rows.programs.decode, donate_argnums=2)
for line in sys.stdin:
    begin = time.perf_counter()
    rows.restart(np.ones(1, bool), np.zeros(1, np.uint32))
    rows.read({0: np.asarray(prompt, np.int32)})
    read = time.perf_counter() - begin
    steps, cache = [], rows.cache
    for i in range(count):
        begin = time.perf_counter()
        logits, cache = decode(rows.params, np.asarray(prompt[i : i + 1], np.int32), cache)
        logits.block_until_ready()
        steps.append(time.perf_counter() - begin)
    rows.cache = cache
    print(json.dumps([read, steps, np.asarray(logits[0, :512]).tolist()]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True, help="where torch is installed")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in each round")
    parser.add_argument("--rounds", type=int, default=4, help="rounds, beside one of warm-up")
    options = parser.parse_args()
    python = _environment(options.environment)
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "model"
        _write_weights(weights.with_suffix(".pth"), options.blocks, options.width)
        prompt = [(7 * i) % 65530 + 1 for i in range(options.prompt)]
        arguments = [str(weights), json.dumps(prompt), str(options.steps)]
        workers = {
            "ours": _start(sys.executable, OUR_WORKER, arguments),
            "pip rwkv": _start(str(python), PIP_WORKER, arguments),
        }
        rounds = {name: [] for name in workers}
        for _ in range(options.rounds + 1):
            for name, worker in workers.items():
                rounds[name].append(_ask(name, worker))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    _report(rounds, options.prompt)


def _environment(directory: Path) -> Path:
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def _write_weights(path: Path, blocks: int, width: int) -> None:
    """A RWKV-7 with random weights in the official format."""
    import numpy as np

    from rwkvx_jax.checkpoint import flat
    from rwkvx_jax.config import ModelConfig
    from rwkvx_jax.convert.files import write_tensors
    from rwkvx_jax.convert.official import params_to_official
    from rwkvx_jax.model import abstract_model, get_params

    config = ModelConfig(num_blocks=blocks, num_attention_blocks=0, width=width)
    rng = np.random.default_rng(0)
    params = {}
    for name, p in flat(get_params(abstract_model(config))):
        scale = 1.0 if name.endswith("scale") else 0.0  # of a norm
        params[name] = scale + 0.05 * rng.standard_normal(p.shape, np.float32)
    write_tensors(path, params_to_official(config, params))


def _start(python: str, program: str, arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [python, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(name: str, worker: subprocess.Popen) -> list:
    worker.stdin.write("round\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"{name} ended early; its messages are above")
    return json.loads(answer)


def _report(rounds: dict[str, list], prompt: int) -> None:
    decode, read = {}, {}
    for name, results in rounds.items():
        decode[name] = statistics.median(s for _, steps, _ in results[1:] for s in steps)
        read[name] = statistics.median(seconds for seconds, _, _ in results[1:])
        print(
            f"{name}: {decode[name] * 1e3:.1f} ms/token, prompt {prompt / read[name]:.0f} tokens/s"
        )
    a, b = (rounds[name][-1][2] for name in rounds)
    difference = max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(map(abs, b))
    print(f"largest difference of logits, relative to the largest logit: {difference:.1e}")
    print(f"decode: ours takes {decode['ours'] / decode['pip rwkv']:.2f} of pip rwkv's time")
    print(f"prefill: ours is {read['pip rwkv'] / read['ours']:.1f} times faster")


if __name__ == "__main__":
    main()

"""Time of the models of configs/twins_4k.py: a training window and a decoded token, on the CPU.

    python benchmarks/twins.py --output twins.json

All variants take turns in one run, medians over the rounds after an untimed one; weights are those
before training, on which times do not depend. Training is loss and gradient of all parameters on
the windows of the last stage; decoding is one token after a prompt as long as such a window.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from recurrence import take_turns

from rwkvx_jax.experiment_files import load_config
from rwkvx_jax.model import create_model, get_params, unstack, with_params

VARIANTS = """rwkv7 gated_deltanet kda mamba2 rwkv6 rwkv5 rwkv4 deltanet lightning
rwkv7-alone gated_deltanet-alone kda-alone mamba2-alone rwkv6-alone rwkv5-alone rwkv4-alone
deltanet-alone lightning-alone transformer transformer-sparse""".split()


class Decoding:
    """Calls decode one token each; the cache is written in place."""

    def __init__(self, model, tokens):
        capacity = tokens.shape[1] + model.config.chunk_size
        cache = model.init_cache(1, capacity)
        _, self._cache = jax.jit(type(model).prefill, donate_argnums=2)(model, tokens[:1], cache)
        self._step = jax.jit(type(model).decode, donate_argnums=2)
        self._model, self._token = model, tokens[:1, 0]

    def __call__(self):
        logits, self._cache = self._step(self._model, self._token, self._cache)
        return logits


def training(model, tokens):
    """Compiled loss and gradient of all parameters."""

    def loss(params):
        logits = with_params(model, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    params = get_params(model)
    step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return lambda: step(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    functions, sizes = {}, {}
    for name in options.variants:
        config = load_config("twins_4k" + ("" if name == "rwkv7" else f":{name}"))
        last = config.stages[-1]
        model = create_model(config.model, replace(config.run, remat="none"))
        rng = np.random.default_rng(0)
        shape = (last.global_batch, last.seq_len + 1)
        tokens = jnp.asarray(rng.integers(config.model.vocab_size, size=shape), jnp.int32)
        functions[name, "training"] = training(model, tokens)
        functions[name, "decoding"] = Decoding(unstack(model), tokens[:, :-1])
        sizes[name] = shape[0] * last.seq_len
        print(f"compiled {name}", flush=True)
    seconds = take_turns(functions, dict.fromkeys(functions, ()), options.repeats)
    rows = []
    for name in options.variants:
        rate = sizes[name] / seconds[name, "training"]
        decode = seconds[name, "decoding"] * 1e3
        rows.append({"variant": name, "tokens_per_second": rate, "decode_ms": decode})
        print(f"{name:22} {rate:8,.0f} tokens/s {decode:6.2f} ms a token")
    if options.output:
        settings = {"repeats": options.repeats, "jax": jax.__version__}
        options.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

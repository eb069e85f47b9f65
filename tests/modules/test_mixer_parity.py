"""Mixers against layers of public PyTorch models (transformers), their weights mapped to ours.

Models whose every layer is simple enough are followed to their loss, and gradients are compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.mixers import MIXERS
from rwkvx_jax.modules.mixers.base import rms_norm
from rwkvx_jax.modules.parameters import LayerConstants
from tests.helpers import assert_close, shared_path
from tests.model_cases import FLOAT32


def reference(name):
    """Weights, and values and gradients, of a model."""
    folder = shared_path("reference", "neighbours", f"model_{name}")
    read = lambda file: {n: jnp.asarray(x) for n, x in np.load(folder / file).items()}
    return read("weights.npz"), read("ref.npz")


def mixer(name, params, layers=2, **sizes):
    """Our mixer around mapped weights; `sizes` are attributes to be changed."""
    config = ModelConfig(vocab_size=271, width=64, head_size=16, num_blocks=layers,
                         num_attention_blocks=layers, mixer=name)  # fmt: skip
    constants = LayerConstants(config, jnp.float32(0), layers)
    module = jax.eval_shape(lambda: MIXERS[name](config, constants, nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    module = nnx.merge(graphdef, state)
    for attribute, size in sizes.items():
        setattr(module, attribute, size)
    return lambda h: module(h, h, True, FLOAT32)[0]


def part_of(weights, prefix):
    return {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}


def compare_to_the_loss(logits_of, weights, ref):
    """Logits, loss and the gradients that are stored."""

    def loss_of(some):
        logits = logits_of(weights | some)
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), ref["ids"][:, 1:, None], axis=-1
        )
        return -chosen.mean(), logits

    names = [name.removeprefix("grad:") for name in ref if name.startswith("grad:")]
    assert len(names) == 3
    differentiate = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, logits), gradients = differentiate({name: weights[name] for name in names})
    assert_close(logits, ref["logits"], rel=1e-5, name="logits")
    assert_close(loss, ref["loss"], rel=1e-6, name="loss")
    for name in names:
        assert_close(gradients[name], ref[f"grad:{name}"], rel=1e-5, name=name)


# ------------------------------------------------------------------------------------------ Mamba-2


def mamba2(p):
    """One mixer for each of the two groups of heads, which share nothing but their input."""
    inner, keys, heads, groups = 128, 16, 8, 2
    ends = np.cumsum([inner, inner, groups * keys, groups * keys])
    z, x, b, c, dt = jnp.split(p["in_proj.weight"].T, ends, axis=1)

    def group(i):
        of = lambda array: jnp.split(array, groups, axis=-1)[i]
        mixed = (
            lambda array: jnp.concatenate(  # x, b and c
                [of(part) for part in jnp.split(array, ends[1:3] - inner, axis=-1)], axis=-1
            )
        )
        params = {
            "value": of(x),
            "gate": of(z),
            "receptance": of(c),
            "key": of(b),
            "alpha": of(dt),
            "conv": mixed(p["conv1d.weight"][:, 0, ::-1].T),
            "conv_bias": mixed(p["conv1d.bias"]),
            "rate": of(p["A_log"]),
            "step": of(p["dt_bias"]),
            "skip": of(p["D"]),
            "norm": of(p["norm.weight"]),
            "output": of(p["out_proj.weight"]).T,
        }
        return mixer("mamba2", params, heads=heads // groups)

    return lambda h: group(0)(h) + group(1)(h)


def scaled(x, weight):
    return rms_norm(x) * weight[None, None]


def test_mamba2():
    weights, ref = reference("mamba2")

    def layer(weights, i, x):
        p = part_of(weights, f"backbone.layers.{i}.")
        return x + mamba2(part_of(p, "mixer."))(scaled(x, p["norm.weight"]))

    found = jax.jit(lambda x: layer(weights, 1, x))(ref["h_layer0"])
    assert_close(found, ref["h_layer1"], rel=2e-6)

    def logits_of(weights):
        x = weights["backbone.embeddings.weight"][ref["ids"]]
        for i in range(3):
            x = layer(weights, i, x)
        return scaled(x, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T

    compare_to_the_loss(logits_of, weights, ref)


# ----------------------------------------------------------------------------------- Gated DeltaNet


def test_gated_deltanet():
    """Value heads 2 j and 2 j + 1 share a key head: ours have the same weights twice."""
    weights, ref = reference("qwen3_next")
    p = part_of(weights, "model.layers.0.")
    a = part_of(p, "linear_attn.")
    rows = a["in_proj_qkvz.weight"].reshape(2, 96, 64)  # of each key head: q, k, 2 v, 2 z
    flat = lambda x: x.reshape(64, 64)
    twice = lambda x: flat(jnp.repeat(x, 2, axis=0))
    taps = a["conv1d.weight"][:, 0, ::-1].T
    key_taps = lambda x: jnp.repeat(x.reshape(4, 2, 16), 2, axis=1).reshape(4, 64)
    conv = [key_taps(taps[:, :32]), key_taps(taps[:, 32:64]), taps[:, 64:]]
    steps = a["in_proj_ba.weight"].reshape(2, 4, 64)  # of each key head: 2 b, 2 a
    params = {
        "receptance": twice(rows[:, :16]).T,
        "key": twice(rows[:, 16:32]).T,
        "value": flat(rows[:, 32:64]).T,
        "gate": flat(rows[:, 64:]).T,
        "output": a["out_proj.weight"].T,
        "conv": jnp.concatenate(conv, axis=1),
        "beta": steps[:, :2].reshape(4, 64).T,
        "alpha": steps[:, 2:].reshape(4, 64).T,
        "rate": a["A_log"],
        "step": a["dt_bias"],
        "norm": a["norm.weight"],
    }
    norm = lambda x, name: rms_norm(x, 1e-6) * (1 + p[f"{name}.weight"])[None, None]

    def layer(x):
        x = x + mixer("gated_deltanet", params)(norm(x, "input_layernorm"))
        h = norm(x, "post_attention_layernorm")
        gate, up = h @ p["mlp.gate_proj.weight"].T, h @ p["mlp.up_proj.weight"].T
        return x + (jax.nn.silu(gate) * up) @ p["mlp.down_proj.weight"].T

    found = jax.jit(layer)(weights["model.embed_tokens.weight"][ref["ids"]])
    assert_close(found, ref["h_layer0"], rel=2e-6)


# ------------------------------------------------------------------------------ Lightning attention


def experts(p, h):
    """The two of three experts that a token's router prefers, weighed by it."""
    scores = jax.nn.softmax(h @ p["gate.weight"].T, axis=-1)
    scores = jnp.where(scores > scores.min(-1, keepdims=True), scores, 0)
    scores = scores / scores.sum(-1, keepdims=True)
    out = jnp.zeros_like(h)
    for i in range(3):
        e = part_of(p, f"experts.{i}.")
        one = (jax.nn.silu(h @ e["w1.weight"].T) * (h @ e["w3.weight"].T)) @ e["w2.weight"].T
        out = out + scores[..., i, None] * one
    return out


def test_lightning():
    weights, ref = reference("minimax")
    slopes = []
    for layer in (0, 2):
        config = ModelConfig(width=64, head_size=16, num_blocks=3, num_attention_blocks=0)
        constants = LayerConstants(config, jnp.float32(layer), 3)
        slopes.append(MIXERS["lightning"](config, constants, nnx.Rngs(0)).slope[...])
        stored = weights[f"model.layers.{layer}.self_attn.slope_rate"]
        assert_close(slopes[-1], stored.reshape(4), rel=1e-6, name=f"slopes of layer {layer}")

    p = part_of(weights, "model.layers.0.")
    a = part_of(p, "self_attn.")
    rows = a["qkv_proj.weight"].reshape(4, 3, 16, 64)  # of each head: q, k, v
    params = {name: rows[:, i].reshape(64, 64).T
              for i, name in enumerate(("receptance", "key", "value"))}  # fmt: skip
    params |= {
        "gate": a["output_gate.weight"].T,
        "output": a["out_proj.weight"].T,
        "norm": a["norm.weight"],
        "slope": slopes[0],
    }

    def layer(x):
        x = scaled(x, p["input_layernorm.weight"])
        x = x + mixer("lightning", params)(x)
        x = scaled(x, p["post_attention_layernorm.weight"])
        return x + experts(part_of(p, "block_sparse_moe."), x)

    found = jax.jit(layer)(weights["model.embed_tokens.weight"][ref["ids"]])
    assert_close(found, ref["h_layer0"], rel=2e-6)


# ------------------------------------------------------------------------------------------- RWKV-4


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * p["weight"][None, None] + p["bias"][None, None]


def channel_mix(p, h):
    before = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    mix = lambda name: h * p[f"time_mix_{name}"] + before * (1 - p[f"time_mix_{name}"])
    k = jnp.square(jax.nn.relu(mix("key") @ p["key.weight"].T))
    return jax.nn.sigmoid(mix("receptance") @ p["receptance.weight"].T) * (k @ p["value.weight"].T)


def rwkv4(p):
    params = {name: p[f"{name}.weight"].T for name in ("receptance", "key", "value", "output")}
    params |= {f"x_{name[0]}": 1 - p[f"time_mix_{name}"].reshape(64)
               for name in ("receptance", "key", "value")}  # fmt: skip
    return mixer("rwkv4", {**params, "w0": p["time_decay"], "u": p["time_first"]})


def test_rwkv4():
    weights, ref = reference("rwkv4")

    def logits_of(weights):
        x = weights["rwkv.embeddings.weight"][ref["ids"]]
        for i in range(2):
            p = part_of(weights, f"rwkv.blocks.{i}.")
            if i == 0:
                x = layer_norm(x, part_of(p, "pre_ln."))
            x = x + rwkv4(part_of(p, "attention."))(layer_norm(x, part_of(p, "ln1.")))
            x = x + channel_mix(part_of(p, "feed_forward."), layer_norm(x, part_of(p, "ln2.")))
        return layer_norm(x, part_of(weights, "rwkv.ln_out.")) @ weights["head.weight"].T

    compare_to_the_loss(logits_of, weights, ref)


# ------------------------------------------------------------------------------------- Small inputs


@pytest.mark.parametrize("name", ["lightning", "gated_deltanet"])
def test_epsilons_count_where_inputs_are_small(name):
    """A single token by the formulas: the models above, of large weights, hardly show epsilons."""
    config = ModelConfig(width=64, head_size=16, num_blocks=2, num_attention_blocks=0, mixer=name)
    constants = LayerConstants(config, jnp.float32(0), 2)
    p = nnx.to_pure_dict(nnx.state(MIXERS[name](config, constants, nnx.Rngs(0))))
    p["output"] = jnp.eye(64)
    h = jax.random.normal(jax.random.key(0), (64,)) * (0.1 if name == "lightning" else 0.02)
    found = mixer(name, p)(h[None, None])[0, 0]
    silu, sigmoid = jax.nn.silu, jax.nn.sigmoid
    inputs = [h @ p[x] for x in ("receptance", "key", "value")]
    if name == "gated_deltanet":
        inputs = [x * taps for x, taps in zip(inputs, jnp.split(p["conv"][0], 3), strict=True)]
    q, k, v = (silu(x).reshape(4, 16) for x in inputs)
    gate = h @ p["gate"]
    if name == "lightning":
        o = (jnp.sum(q * k, axis=-1, keepdims=True) * v).reshape(64)
        expected = o / jnp.sqrt(jnp.square(o).mean() + 1e-6) * sigmoid(gate)
    else:
        q, k = (x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        read = jnp.sum(q / 4 * k, axis=-1, keepdims=True) * sigmoid(h @ p["beta"])[:, None]
        o = read * v
        o = o / jnp.sqrt(jnp.square(o).mean(-1, keepdims=True) + 1e-6)
        expected = o.reshape(64) * silu(gate)
    assert_close(found, expected, rel=1e-5)

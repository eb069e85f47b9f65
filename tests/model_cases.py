"""Small models for the tests, and an independent forward pass to hold them against.

`numpy_logits` is written from the equations alone, one token after the other in float64: it shares
no line with the library.
"""

import jax
import numpy as np

from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.model import abstract_model, get_params
from tests.helpers import assert_close

FLOAT32 = RunConfig(compute_dtype="float32")
TINY = ModelConfig(
    vocab_size=40,
    num_blocks=4,
    num_attention_blocks=2,
    width=32,
    head_size=16,
    chunk_size=8,
    top_k=2,
    low_rank_override=(5, 6, 7, 9),
)


def random_params(config: ModelConfig, seed: int = 0):
    """Parameters none of which is zero or one, so that no term of the model can hide."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, normal = path[-1].key, rng.standard_normal(leaf.shape)
        if name == "scale":
            value = 1 + 0.2 * normal
        elif name.startswith("x_"):
            value = rng.uniform(0, 1, leaf.shape)
        elif name == "w0":
            value = rng.uniform(-6, 1, leaf.shape)
        elif name in ("k_k", "k_a"):
            value = 0.8 + 0.2 * normal
        elif name in ("a0", "v0", "embed"):
            value = normal
        elif name in ("bias", "r_k"):
            value = 0.3 * normal
        else:
            value = normal * leaf.shape[-2] ** -0.5
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, get_params(abstract_model(config)))


def numpy_logits(params, config: ModelConfig, tokens):
    """Float64 logits [T, W] of tokens [T], and the smallest gate margin [T] of each position.

    The margin is the gap between the last chunk that some head took and the first that it did not:
    where it is tiny, another order of summing may rightly choose another chunk.
    """
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    margins = np.full(len(tokens), np.inf)
    x = _layer_norm(params["embed"][tokens], params["ln0"])
    v_first = None
    for layer in range(config.num_blocks):
        block = jax.tree.map(lambda p, i=layer: p[i], params["blocks"])
        mixed, v_first = _time_mix(block["time_mix"], config, _layer_norm(x, block["ln1"]), v_first)
        x = x + mixed
        x = x + _channel_mix(block["channel_mix"], _layer_norm(x, block["ln2"]))
        group, last = divmod(layer + 1, config.blocks_per_group)
        if config.num_attention_blocks and last == 0:
            block = jax.tree.map(lambda p, i=group - 1: p[i], params["attention_blocks"])
            mixed, margin = _attention(block["attention"], config, _layer_norm(x, block["ln1"]))
            x, margins = x + mixed, np.minimum(margins, margin)
            x = x + _channel_mix(block["channel_mix"], _layer_norm(x, block["ln2"]))
    return _layer_norm(x, params["ln_out"]) @ params["head"]["weight"], margins


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def _shifted(h):
    return np.concatenate([np.zeros((1, h.shape[1])), h[:-1]])


def _channel_mix(p, h):
    k = (h + (_shifted(h) - h) * p["x_k"]) @ p["key"]
    return np.maximum(k, 0) ** 2 @ p["value"]


def _time_mix(p, config, h, v_first):
    size, d = config.head_size, _shifted(h) - h
    xr, xw, xk, xv, xa, xg = (h + d * p[f"x_{s}"] for s in "rwkvag")
    r, k, v = xr @ p["receptance"], xk @ p["key"], xv @ p["value"]
    w = np.exp(-np.exp(-0.5) * _sigmoid(p["w0"] + np.tanh(xw @ p["w1"]) @ p["w2"]))
    a = _sigmoid(p["a0"] + xa @ p["a1"] @ p["a2"])
    g = _sigmoid(xg @ p["g1"]) @ p["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * _sigmoid(p["v0"] + xv @ p["v1"] @ p["v2"])
    kk, k = k * p["k_k"], k * (1 + (a - 1) * p["k_a"])
    out = np.zeros_like(h)
    for head in range(config.num_heads):
        at = slice(head * size, (head + 1) * size)
        state = p["initial_state"][head] if config.learned_state else np.zeros((size, size))
        for t in range(len(h)):
            unit = kk[t, at] / max(np.linalg.norm(kk[t, at]), 1e-12)
            removed = np.outer(state @ unit, unit * a[t, at])
            state = state * w[t, at] - removed + np.outer(v[t, at], k[t, at])
            y = state @ r[t, at]
            y = (y - y.mean()) / np.sqrt(y.var() + 64e-5)
            y = y * p["ln_x"]["scale"][at] + p["ln_x"]["bias"][at]
            out[t, at] = y + (r[t, at] * k[t, at] * p["r_k"][head]).sum() * v[t, at]
    return (out * g) @ p["output"], v_first


def _chunk_score(q, keys, config):
    if config.selector == "mean":
        return q @ keys.mean(0)
    if config.selector == "bounds":
        return np.maximum(q * keys.min(0), q * keys.max(0)).sum()
    parts = np.array([q @ part.mean(0) for part in np.split(keys, config.selector_blocks)])
    if config.selector == "max":
        return parts.max()
    return np.log(np.exp(parts / np.sqrt(len(q))).sum())


def _attention(p, config, h):
    size, chunk = config.head_size, config.chunk_size
    q, k, v = (h @ p[name] for name in ("receptance", "key", "value"))
    for tap in range(config.key_conv):
        before = np.concatenate([np.zeros((tap, k.shape[1])), (h @ p["key"])[: len(h) - tap]])
        k = k + p["key_conv"][tap] * before
    out, margins = np.zeros_like(h), np.full(len(h), np.inf)
    for head in range(config.num_heads):
        at = slice(head * size, (head + 1) * size)
        for t in range(len(h)):
            own = t // chunk
            if config.attention == "full":
                chosen = range(own)
            else:
                chunks = [k[c * chunk : (c + 1) * chunk, at] for c in range(own)]
                scores = np.array([_chunk_score(q[t, at], keys, config) for keys in chunks])
                order = np.argsort(-scores, kind="stable")
                chosen, left = order[: config.top_k - 1], order[config.top_k - 1 :]
                if len(chosen) and len(left):
                    margins[t] = min(margins[t], scores[chosen[-1]] - scores[left[0]])
            rows = [i for c in chosen for i in range(c * chunk, (c + 1) * chunk)]
            rows += range(own * chunk, t + 1)
            scores = k[rows][:, at] @ q[t, at] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[t, at] = weights @ v[rows][:, at] / weights.sum()
    return out @ p["output"], margins


def perturbed(params, seed: int = 0):
    """Initial parameters of any mixer, moved away from where they start; slopes of decays kept."""
    rng = np.random.default_rng(seed)

    def move(path, leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        return leaf if path[-1].key == "slope" else leaf + noise

    return jax.tree_util.tree_map_with_path(move, params)


def compare_in_pieces(model, tokens, expected, max_length):
    """Two texts [2, T] read through a cache, in two pieces of different lengths and then token by
    token, against the logits [2, T, W] of whole sequences."""
    prefill, decode = jax.jit(model.prefill), jax.jit(model.decode)
    cache, done, rows = model.init_cache(2, max_length), np.zeros(2, int), np.arange(2)
    padded = np.pad(tokens, ((0, 0), (0, 30)))
    for lengths in ([23, 30], [17, 5]):
        piece = np.stack([row[at : at + 30] for row, at in zip(padded, done, strict=True)])
        found, cache = prefill(piece, cache, np.array(lengths))
        done += lengths
        assert_close(found, expected[rows, done - 1], rel=1e-5)
    while done.max() < tokens.shape[1]:
        found, cache = decode(tokens[rows, done], cache)
        done += 1
        assert_close(found, expected[rows, done - 1], rel=1e-5)

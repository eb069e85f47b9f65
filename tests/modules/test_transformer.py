"""A Transformer: against an oracle from the formulas alone, ways through a text, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ConfigError, MeshConfig, ModelConfig
from rwkvx_jax.model import (
    abstract_model,
    create_model,
    get_params,
    param_axes,
    unstack,
    with_params,
)
from rwkvx_jax.modules import context
from rwkvx_jax.modules.rotary import frequencies
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.training.step import shardings_of
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, perturbed

BATCH, TIME = 2, 23
TOKENS = np.arange(BATCH * TIME, dtype=np.int32).reshape(BATCH, TIME)  # each of its own
FULL = ModelConfig(
    vocab_size=BATCH * TIME,
    num_blocks=0,
    num_attention_blocks=2,
    backbone="llama",
    norm_eps=1e-3,
    width=48,
    head_size=8,
    ffn_width=40,
    attention="full",
    num_kv_heads=2,
    qkv_bias=True,
    rope_theta=100.0,
    chunk_size=4,
    top_k=3,
)
SCALED = dataclasses.replace(FULL, rope_scaling=(4.0, 1.0, 3.0, 20.0), tied_embeddings=True)
SPARSE = dataclasses.replace(FULL, attention="sparse", key_conv=2)
SHARED = dataclasses.replace(SPARSE, shared_attention=True)
# RWKV's surroundings for attention alone; Llama's for a recurrent hybrid of shared attention.
RWKV_BACKBONE = dataclasses.replace(FULL, backbone="rwkv", norm_eps=1e-5, num_kv_heads=0)
HYBRID = dataclasses.replace(SHARED, num_blocks=2, mixer="mamba2")
MODELS = {
    "full": FULL,
    "scaled": SCALED,
    "sparse": SPARSE,
    "shared": SHARED,
    "rwkv": RWKV_BACKBONE,
    "hybrid": HYBRID,
}
every_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(m, marks=[pytest.mark.thorough] * (m not in ("scaled", "shared")))
        for m in MODELS
    ],
)


@functools.cache
def params_of(name):
    return perturbed(jax.jit(lambda: get_params(create_model(MODELS[name])))())


def run(config, way, model=None):
    """A method of the model as a function of parameters and its arguments."""
    model = model or abstract_model(config, FLOAT32)
    return jax.jit(lambda params, *given: getattr(with_params(model, params), way)(*given))


@functools.cache
def logits_of(name):
    return np.asarray(run(MODELS[name], "__call__")(params_of(name), TOKENS))


def numpy_rotated(x, theta, scaling):
    """x [T, K] turned by its positions, pair by pair, as complex numbers."""
    time, size = x.shape
    out = np.empty_like(x)
    for i in range(size // 2):
        frequency = theta ** (-2 * i / size)
        if scaling:
            factor, low, high, original = scaling
            wavelength = 2 * np.pi / frequency
            if wavelength > original / low:
                frequency /= factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        pair = x[:, i] + 1j * x[:, i + size // 2]
        pair = pair * np.exp(1j * frequency * np.arange(time))
        out[:, i], out[:, i + size // 2] = pair.real, pair.imag
    return out


def numpy_transformer(params, config, tokens):
    """Float64 logits [T, W] of one text, and the smallest gap between chosen and other chunks."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    gap, size, chunk = np.inf, config.head_size, config.chunk_size

    def norm(x, p):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale"]

    def attention(p, h):
        nonlocal gap
        q, k, v = (h @ p[n] + p[f"{n}_bias"] for n in ("receptance", "key", "value"))
        if config.key_conv:
            before = np.concatenate([np.zeros((1, k.shape[1])), k[:-1]])
            k = k + p["key_conv"][0] * k + p["key_conv"][1] * before
        outs = []
        for head in range(config.num_heads):
            cut = lambda x, i: x[:, i * size : (i + 1) * size]
            shared = head // (config.num_heads // config.kv_heads)
            rotated = lambda x: numpy_rotated(x, config.rope_theta, config.rope_scaling)
            qh, kh, vh = rotated(cut(q, head)), rotated(cut(k, shared)), cut(v, shared)
            out = np.zeros((len(h), size))
            for t in range(len(h)):
                rows, own = list(range(t + 1)), t // chunk
                if config.attention == "sparse":
                    means = [kh[c * chunk : (c + 1) * chunk].mean(0) for c in range(own)]
                    scores = np.array([qh[t] @ mean for mean in means])
                    order = np.argsort(-scores, kind="stable")
                    few = config.top_k - 1
                    if own > few:
                        gap = min(gap, scores[order[few - 1]] - scores[order[few]])
                    rows = [r for c in order[:few] for r in range(c * chunk, (c + 1) * chunk)]
                    rows += range(own * chunk, t + 1)
                weights = np.exp(kh[rows] @ qh[t] / np.sqrt(size))
                out[t] = weights @ vh[rows] / weights.sum()
            outs.append(out)
        return np.concatenate(outs, axis=-1) @ p["output"]

    head = params["head"]["weight"]
    x = (head if config.tied_embeddings else params["embed"])[tokens]
    for layer in range(config.num_attention_blocks):
        at = 0 if config.shared_attention else layer
        p = jax.tree.map(lambda leaf: leaf[at], params["attention_blocks"])  # noqa: B023
        x = x + attention(p["attention"], norm(x, p["ln1"]))
        h, mlp = norm(x, p["ln2"]), p["channel_mix"]
        gate = h @ mlp["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["key"])) @ mlp["value"]
    x = norm(x, params["ln_out"])
    return x @ (head.T if config.tied_embeddings else head), gap


@pytest.mark.parametrize("name", ["full", "scaled", "sparse", "shared"])
def test_logits_are_those_of_the_formulas(name):
    for row in range(BATCH):
        expected, gap = numpy_transformer(params_of(name), MODELS[name], TOKENS[row])
        assert gap > 1e-5  # no chunk is chosen by rounding
        assert_close(logits_of(name)[row], expected, rel=2e-5)


def test_scaled_frequencies_slow_down_long_waves_alone():
    plain, scaled = (np.asarray(frequencies(config)) for config in (FULL, SCALED))
    ratio = plain / scaled
    assert ratio[0] == 1 and np.isclose(ratio[-1], 4)
    assert (np.diff(ratio) >= 0).all() and ((ratio > 1.01) & (ratio < 3.99)).any()


@every_model
def test_sizes_are_those_counted(name):
    config = MODELS[name]
    params = get_params(abstract_model(config))
    assert config.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    names = {path for path, _ in flat(params)}
    assert config.num_blocks > 0 or not any(path.startswith("blocks.") for path in names)
    assert ("embed" in names) == (not config.tied_embeddings)
    assert ("ln0.scale" in names) == (config.backbone == "rwkv")


@every_model
def test_a_whole_text_is_its_pieces_is_its_tokens(name):
    """Rows of different lengths, one of them empty in a piece; then token by token."""
    config, params = MODELS[name], params_of(name)
    layered = jax.eval_shape(lambda: unstack(create_model(config, FLOAT32)))
    copies = get_params(unstack(with_params(abstract_model(config, FLOAT32), params)))
    prefill, decode = run(config, "prefill"), run(config, "decode", layered)
    cache, at = abstract_model(config, FLOAT32).init_cache(BATCH, TIME), np.zeros(BATCH, int)
    for counts in ((9, 3), (0, 9), (8, 5)):
        piece = np.full((BATCH, 9), 3, np.int32)
        for row, count in enumerate(counts):
            piece[row, :count] = TOKENS[row, at[row] : at[row] + count]
        logits, cache = prefill(params, piece, cache, np.asarray(counts, np.int32))
        at = at + counts
        for row, count in enumerate(counts):
            if count:
                expected = logits_of(name)[row, at[row] - 1]
                assert_close(logits[row], expected, rel=2e-5, name=f"row {row} up to {at[row]}")
    assert (at == 17).all()
    for t in range(17, TIME):
        logits, cache = decode(copies, TOKENS[:, t], cache)
        assert_close(logits, logits_of(name)[:, t], rel=2e-5, name=f"decoded {t}")
    assert (np.asarray(cache.position) == TIME).all()


@pytest.mark.parametrize("name", ["full", "sparse"])
def test_a_policy_keeps_the_positions_of_the_text(name):
    """Read at once and token by token; the last row's key is rotated by its place in the text."""
    config, params = MODELS[name], params_of(name)
    model = abstract_model(config, FLOAT32)
    prefill, decode = run(config, "prefill"), run(config, "decode")
    empty = model.init_cache(BATCH, TIME, policy=CachePolicy(trigger=12, keep=7, window=3))
    logits, at_once = prefill(params, TOKENS, empty)
    one_by_one = empty
    for t in range(TIME):
        single, one_by_one = decode(params, TOKENS[:, t], one_by_one)
    assert_close(single, logits, rel=2e-5)
    rows = np.asarray(at_once.length)
    assert (rows < TIME).all() and (np.asarray(at_once.position) == TIME).all()
    pages = (jax.tree.leaves(cache.pages) for cache in (at_once, one_by_one))
    for found, expected in zip(*pages, strict=True):
        assert_close(found, expected, rel=2e-5)

    @jax.jit
    def first_keys(params):  # of the first block, which no attention comes before
        bound = with_params(model, params)
        block = jax.tree.map(lambda p: p[0], bound.attention_blocks)
        return block.attention.project(block.ln1(bound.embed_tokens(TOKENS)))[1]

    kept = at_once.pages.keys[0].reshape(BATCH, config.kv_heads, -1, config.head_size)
    assert_close(kept[:, :, rows[0] - 1], first_keys(params)[:, -1], rel=1e-5)


@every_model
def test_gradients_show_causality_and_reach_every_parameter(name):
    config, params = MODELS[name], params_of(name)
    model = abstract_model(config, FLOAT32)
    weights = np.zeros((BATCH, TIME, config.vocab_size), np.float32)
    weights[:, 14] = np.random.default_rng(0).standard_normal(weights[:, 14].shape)

    def objective(params):
        if config.tied_embeddings:  # so that the table's gradient is that of the embedding alone
            head = jax.lax.stop_gradient(params["head"]["weight"])
            features = with_params(model, params).features(TOKENS)
            return jnp.sum(jnp.einsum("btd,wd->btw", features, head) * weights)
        return jnp.sum(with_params(model, params)(TOKENS) * weights)

    gradients = jax.jit(jax.grad(objective))(params)
    table = gradients["head"]["weight"] if config.tied_embeddings else gradients["embed"]
    reached = np.asarray(jnp.abs(table).sum(-1)).reshape(BATCH, TIME) > 0
    assert not reached[:, 15:].any() and reached[:, 12:15].all()
    if config.attention == "full" or config.num_blocks:
        assert reached[:, :15].all()
    for path, leaf in flat(gradients):
        assert np.isfinite(leaf).all() and np.any(leaf), path


@pytest.mark.parametrize("name", ["full", "shared"])
def test_shared_heads_and_blocks_are_copies_with_summed_gradients(name):
    """All gradients of a model with a head for each query, and with a block for each use."""
    config, params = MODELS[name], params_of(name)
    each, layers = config.num_heads // config.kv_heads, config.num_attention_blocks
    plain = dataclasses.replace(config, num_kv_heads=0, shared_attention=False)

    def copied(params):
        def copy(path, leaf):
            if config.shared_attention:
                leaf = jnp.repeat(leaf, layers, axis=0)
            if path[-1].key in ("key", "value", "key_bias", "value_bias", "key_conv") and (
                path[-2].key == "attention"
            ):
                heads = leaf.reshape(*leaf.shape[:-1], config.kv_heads, config.head_size)
                leaf = jnp.repeat(heads, each, axis=-2).reshape(*leaf.shape[:-1], config.width)
            return leaf

        blocks = jax.tree_util.tree_map_with_path(copy, params["attention_blocks"])
        return params | {"attention_blocks": blocks}

    weights = np.random.default_rng(1).standard_normal((BATCH, TIME, config.vocab_size))

    def gradients(config, through):
        model = abstract_model(config, FLOAT32)
        objective = lambda params: jnp.sum(with_params(model, through(params))(TOKENS) * weights)
        return jax.jit(jax.grad(objective))(params)

    found, expected = gradients(config, lambda params: params), gradients(plain, copied)
    for (path, leaf), (_, wanted) in zip(flat(found), flat(expected), strict=True):
        assert_close(leaf, wanted, rel=2e-5, name=path)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("full", {"data": 2, "tensor": 2}),
        ("sparse", {"data": 1, "context": 2, "tensor": 2}),
        pytest.param("hybrid", {"data": 1, "fsdp": 2, "context": 2}, marks=pytest.mark.thorough),
        pytest.param("shared", {"data": 1, "context": 4}, marks=pytest.mark.thorough),
    ],
)
def test_gradients_over_devices_are_those_of_one(name, sizes):
    config, params = MODELS[name], params_of(name)
    model, tokens = abstract_model(config, FLOAT32), TOKENS[:, :16]
    weights = np.random.default_rng(2).standard_normal((BATCH, 16, config.vocab_size))
    objective = lambda params: jnp.sum(with_params(model, params)(tokens) * weights)
    expected = jax.jit(jax.grad(objective))(params)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    spread = jax.device_put(params, shardings_of(get_params(model), param_axes(model), mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(objective))(spread)
    for (path, leaf), (_, wanted) in zip(flat(found), flat(expected), strict=True):
        assert_close(leaf, wanted, rel=2e-5, name=path)


@pytest.mark.parametrize(
    ("heads", "groups", "parts"), [(12, 3, 2), (12, 3, 4), (6, 2, 4), (3, 1, 2)]
)
def test_grouped_heads_over_parts_of_a_sequence(heads, groups, parts):
    """Traded as they are, repeated, filled up or collected: values and all gradients."""
    rng = np.random.default_rng(3)
    draw = lambda heads, size: rng.standard_normal((1, 4 * parts, heads, size)).astype(np.float32)
    arrays, weights = (draw(heads, 6), draw(groups, 6), draw(groups, 5)), draw(heads, 5)

    def objective(*arrays):
        out = over_devices(full_attention, *arrays) if spread else full_attention(*arrays)
        return jnp.sum(out * weights), out

    over_devices = context.attention
    both = lambda: jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(*arrays)
    spread = False
    (_, out), gradients = both()
    spread = True
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=parts), jax.devices()[:parts])):
        (_, found), found_gradients = both()
    assert_close(found, out, rel=1e-6)
    for leaf, wanted in zip(found_gradients, gradients, strict=True):
        assert_close(leaf, wanted, rel=1e-5)


def test_attention_without_positions_does_not_know_the_order():
    """In a single block the rotary positions are all that tells where a token stands."""
    params = params_of("full")
    blocks = jax.tree.map(lambda p: p[:1], params["attention_blocks"])
    for theta, same in ((0.0, True), (100.0, False)):
        last = run(dataclasses.replace(FULL, num_attention_blocks=1, rope_theta=theta), "__call__")
        swapped = TOKENS.copy()
        swapped[:, [2, 5]] = swapped[:, [5, 2]]
        given = params | {"attention_blocks": blocks}
        one, other = (last(given, tokens)[:, -1] for tokens in (TOKENS, swapped))
        assert np.allclose(one, other, atol=1e-4) == same


def test_one_score_over_all_channels_needs_as_many_keys_as_queries():
    with pytest.raises(ConfigError, match=r"all channels.* 48 and 16: use gate=.per_head"):
        abstract_model(SPARSE, FLOAT32).init_cache(1, 8, gate="shared")


def test_bfloat16_stays_near_float32():
    model = abstract_model(FULL, dataclasses.replace(FLOAT32, compute_dtype="bfloat16"))
    rounded = jax.jit(lambda params: with_params(model, params)(TOKENS))(params_of("full"))
    assert np.abs(rounded - logits_of("full")).mean() < 0.02 * np.abs(logits_of("full")).max()

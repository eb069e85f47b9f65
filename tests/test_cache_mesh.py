"""A cache spread over 8 simulated devices: logits, rows and answers are those of one device."""

import dataclasses

import jax
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import Config, ConfigError, MeshConfig, ModelConfig, Stage
from rwkvx_jax.model import abstract_model, create_model, get_params, param_axes, with_params
from rwkvx_jax.perf.context_traffic import decode_traffic
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.training.step import shardings_of
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, perturbed, random_params

MODEL = ModelConfig(
    vocab_size=40,
    num_blocks=1,
    num_attention_blocks=1,
    width=32,
    head_size=8,
    chunk_size=4,
    top_k=3,
    low_rank_override=(5, 6, 7, 9),
)
MESHES = {
    "data 8": {"data": 8},
    "tensor 2 x context 4": {"data": 1, "tensor": 2, "context": 4},
    "context 8": {"data": 1, "context": 8},
    "data 2 x tensor 2 x context 2": {"data": 2, "tensor": 2, "context": 2},
}
ROWS = 60  # 15 pages: on 2, 4 and 8 devices one more
# Tokens of each text in each piece: none, some, all; and what is decoded then, one by one.
PIECES = ((13, 0, 1, 7, 13, 2, 12, 5), (13, 3, 13, 0, 1, 13, 13, 9), (0, 13, 12, 13, 13, 0, 1, 13))
STEPS = 13
SIZE = max(map(max, PIECES))


def mesh_of(name):
    return make_mesh(MeshConfig(**MESHES[name]))


def read(config, params, mesh=None, rows=8, **options):
    """Logits after each piece and step, of texts read by PIECES and STEPS; and the last cache."""
    model = abstract_model(config, FLOAT32)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (rows, ROWS)).astype(np.int32)
    tokens[:, 8:12] = tokens[:, 28:32] = tokens[:, 4:8]  # equal keys, where only those count
    bind = lambda p: with_params(model, p)
    prefill = jax.jit(lambda p, t, c, n: bind(p).prefill(t, c, n), donate_argnums=2)
    decode = jax.jit(lambda p, t, c: bind(p).decode(t, c), donate_argnums=2)
    logits, done = [], np.zeros(rows, int)

    def run(params):
        cache = model.init_cache(rows, ROWS, **options)
        for counts in PIECES:
            counts = np.asarray(counts[:rows])
            piece = np.zeros((rows, SIZE), np.int32)
            for row, (at, n) in enumerate(zip(done, counts, strict=True)):
                piece[row, :n] = tokens[row, at : at + n]
            out, cache = prefill(params, piece, cache, counts.astype(np.int32))
            logits.append(np.where((counts > 0)[:, None], out, 0))
            done[:] += counts
        for _ in range(STEPS):
            out, cache = decode(params, tokens[np.arange(rows), done], cache)
            logits.append(np.asarray(out))
            done[:] += 1
        return cache

    if mesh is None:
        return np.stack(logits) if (cache := run(params)) is None else (np.stack(logits), cache)
    spread = jax.device_put(params, shardings_of(get_params(model), param_axes(model), mesh))
    with jax.set_mesh(mesh):
        cache = run(spread)
        assert prefill._cache_size() <= 2 and decode._cache_size() == 1
    return np.stack(logits), cache


@pytest.fixture(scope="module")
def alone():
    return read(MODEL, random_params(MODEL))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("data 8", marks=pytest.mark.thorough),
        "tensor 2 x context 4",
        pytest.param("context 8", marks=pytest.mark.thorough),
        "data 2 x tensor 2 x context 2",
    ],
)
def test_reading_over_a_mesh_is_reading_on_one_device(name, alone):
    logits, cache = read(MODEL, random_params(MODEL), mesh_of(name))
    assert_close(logits, alone[0], rel=2e-5)
    np.testing.assert_array_equal(cache.length, alone[1].length)
    held = {shard.data.shape for shard in cache.pages.keys.addressable_shards}
    sizes = {"tensor": 1, "context": 1} | MESHES[name]
    _, batch, heads, count, *_ = cache.pages.keys.shape
    parts = batch // sizes["data"], heads // sizes["tensor"], count // sizes["context"]
    assert held == {(1, *parts, 4, 8)}


POLICY = CachePolicy(trigger=22, keep=12, window=5)


@pytest.mark.parametrize(
    "changes, options, name",
    [
        ({}, {"gate": "shared"}, "tensor 2 x context 4"),
        ({"selector": "bounds"}, {"policy": POLICY}, "data 2 x tensor 2 x context 2"),
        pytest.param(
            {"selector": "index", "selector_blocks": 2, "index_size": 4},
            {"policy": POLICY},
            "data 2 x tensor 2 x context 2",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"selector": "bounds", "selection_span": 2, "forced_chunks": "both", "top_k": 4},
            {},
            "data 8",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {}, {"gate": "shared", "policy": POLICY}, "context 8", marks=pytest.mark.thorough
        ),
        pytest.param({"attention": "full"}, {}, "context 8", marks=pytest.mark.thorough),
        pytest.param(
            {"selector": "max", "selector_blocks": 2, "key_conv": 3},
            {},
            "tensor 2 x context 4",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"selector": "pooled", "selector_blocks": 4, "top_k": 8},
            {},
            "data 2 x tensor 2 x context 2",
            marks=pytest.mark.thorough,
        ),
        pytest.param({"top_k": 1}, {}, "context 8", marks=pytest.mark.thorough),
        pytest.param(
            {"forced_chunks": "both", "top_k": 4, "selection_groups": 2, "num_kv_heads": 2},
            {},
            "tensor 2 x context 4",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"selector": "index", "selector_blocks": 2, "selection_groups": 2},
            {},
            "tensor 2 x context 4",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            {"selector": "seer", "selection_groups": 2, "num_kv_heads": 2, "top_k": 4},
            {"policy": POLICY},
            "tensor 2 x context 4",
            marks=pytest.mark.thorough,
        ),
        pytest.param({"num_attention_blocks": 0}, {}, "context 8", marks=pytest.mark.thorough),
        pytest.param({"learned_state": True}, {}, "context 8", marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_gates_selectors_and_policies_over_a_mesh(changes, options, name):
    config = dataclasses.replace(MODEL, **changes)
    params = random_params(config)
    rows = MESHES[name]["data"]
    expected, cache = read(config, params, rows=rows, **options)
    found, spread = read(config, params, mesh_of(name), rows, **options)
    assert_close(found, expected, rel=2e-5)
    np.testing.assert_array_equal(spread.length, cache.length)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mixer", ["rwkv4", "rwkv6", "mamba2", "gated_deltanet", "kda", "lightning"]
)
def test_other_recurrences_over_a_mesh(mixer):
    config = dataclasses.replace(MODEL, mixer=mixer, low_rank_override=None)
    params = perturbed(jax.jit(lambda: get_params(create_model(config)))())
    expected, _ = read(config, params, rows=2)
    found, _ = read(config, params, mesh_of("data 2 x tensor 2 x context 2"), rows=2)
    assert_close(found, expected, rel=2e-5)


@pytest.mark.parametrize(
    "name", ["tensor 2 x context 4", pytest.param("context 8", marks=pytest.mark.thorough)]
)
def test_what_a_decode_step_sends_does_not_depend_on_the_length(name):
    """From the compiled program, of 64 and of 1024 pages."""
    config = Config(model=MODEL, run=FLOAT32, stages=(Stage("one", 64, 8, 1, 1e-3),))
    short, long = (decode_traffic(config, mesh_of(name), 4 * pages) for pages in (64, 1024))
    assert short == long
    page = 4 * 8 * 4 * MODEL.num_heads
    assert 0 < sum(short.values()) < 64 * page / 8, short  # far from a share of all keys


def test_spans_of_pages_are_not_parted():
    config = dataclasses.replace(MODEL, selector="bounds", selection_span=2)
    with jax.set_mesh(mesh_of("context 8")):
        with pytest.raises(ConfigError, match="mesh.context 8 would part the spans"):
            abstract_model(config, FLOAT32).init_cache(1, 8)


def test_heads_that_the_mesh_does_not_divide_are_refused():
    model = abstract_model(dataclasses.replace(MODEL, width=24), FLOAT32)
    with jax.set_mesh(mesh_of("tensor 2 x context 4")):
        with pytest.raises(ConfigError, match="3 heads, which mesh.tensor 2"):
            model.init_cache(1, 8)

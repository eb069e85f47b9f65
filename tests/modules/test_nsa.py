"""Attention blocks of Native Sparse Attention: the whole sequence against the oracle, reading from
a cache against the whole sequence, causality, packed documents, devices against one, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError, MeshConfig, ModelConfig
from rwkvx_jax.model import abstract_model, get_params, param_axes, with_params
from rwkvx_jax.modules.nsa import NativeSparseAttention
from rwkvx_jax.ops.nsa_reference import nsa_reference
from rwkvx_jax.sharding import check_fits, make_mesh
from rwkvx_jax.snapshots import rewind, snapshot
from rwkvx_jax.training.step import shardings_of
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, compare_in_pieces, random_params
from tests.training.training_cases import CURRICULUM

# A Transformer: nothing but attention blocks, so that nothing hides what these read.
NSA = ModelConfig(
    vocab_size=40,
    num_blocks=0,
    num_attention_blocks=2,
    width=32,
    head_size=8,
    num_kv_heads=2,
    attention="nsa",
    chunk_size=8,
    top_k=4,
    window_size=13,
)
CASES = {
    "two key heads": {},
    "each head its own": {"num_kv_heads": 0, "window_size": 5},
    "one key head, moved": {"num_kv_heads": 1, "key_conv": 2, "rope_theta": 100.0},
    "window of all": {"window_size": 100, "chunk_size": 5, "top_k": 3},
}
THOROUGH = "each head its own", "window of all"
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 77))


def config_of(name):
    return dataclasses.replace(NSA, **CASES[name])


def model_of(config, params=None):
    return with_params(abstract_model(config, FLOAT32), params or random_params(config))


@functools.cache
def logits_of(name):
    return jax.jit(model_of(config_of(name)))(TOKENS)


def test_a_whole_sequence_is_what_the_oracle_reads():
    model = model_of(NSA)
    attention = jax.tree.map(lambda p: jnp.asarray(p[0]), model.attention_blocks).attention
    h = np.random.default_rng(1).standard_normal((2, 77, 32)).astype(np.float32)
    q, k, v, _ = jax.jit(lambda h: attention.project(h))(h)
    sizes = {"chunk_size": 8, "top_k": 4, "window": 13, "scale": 8**-0.5}
    branches = jax.jit(functools.partial(nsa_reference, **sizes))(q, k, v)[:3]
    logits = h @ np.asarray(attention.gate[...])
    gates = 1 / (1 + np.exp(-logits.reshape(2, 77, 4, 3)))
    out = sum(gates[..., i, None] * x for i, x in enumerate(branches)).reshape(2, 77, 32)
    expected = out @ np.asarray(attention.output[...])
    assert_close(jax.jit(lambda h: attention(h, FLOAT32))(h), expected, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.thorough] * (n in THOROUGH)) for n in CASES],
)
def test_pieces_and_tokens_are_the_whole_sequence(name):
    """Rows of different lengths, read in two pieces, then token by token."""
    compare_in_pieces(model_of(config_of(name)), TOKENS, logits_of(name), max_length=80)


def test_a_text_goes_on_from_where_it_was_left():
    """The sums of values go back with those of keys."""
    model, prefill = model_of(NSA), jax.jit(model_of(NSA).prefill)
    _, cache = prefill(TOKENS[:, :29], model.init_cache(2, 80))
    _, after = prefill((TOKENS[:, :30] + 7) % 40, cache)
    found, _ = prefill(TOKENS[:, 29:59], rewind(after, snapshot(cache)))
    assert_close(found, logits_of("two key heads")[:, 58], rel=1e-5)


def test_no_token_sees_a_later_one():
    model = model_of(NSA)
    embedded = jnp.asarray(np.random.default_rng(2).standard_normal((1, 45, 32)), jnp.float32)
    attention = jax.tree.map(lambda p: jnp.asarray(p[0]), model.attention_blocks).attention
    of = lambda h: attention(h, FLOAT32)[0].sum(-1)
    reach = np.abs(jax.jit(jax.jacrev(of))(embedded)[:, 0]).max(-1)  # [queries, keys]
    assert (np.triu(reach, 1) == 0).all()
    assert (np.tril(reach)[np.tril_indices(45)] > 0).all()  # the compressed branch misses nothing


@pytest.mark.parametrize("name", ["two key heads"])
def test_packed_documents_are_read_as_alone(name):
    """One that begins at a chunk; the next, which begins within one, has no say, nor has it seen
    anything of the one before."""
    model = model_of(config_of(name))
    ids = jnp.repeat(jnp.array([[1, 2, 3]] * 2), jnp.array([8, 43, 26]), axis=1)
    run = jax.jit(model)
    packed = run(TOKENS, ids)
    assert_close(packed[:, 8:51], run(TOKENS[:, 8:51]), rel=1e-5)
    other = np.where(ids == 3, TOKENS, (TOKENS + 7) % 40)
    assert_close(run(other, ids)[:, 51:], packed[:, 51:], rel=1e-6)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "tensor": 2}, {"data": 1, "context": 2, "tensor": 1, "fsdp": 2}]
)
def test_devices_compute_what_one_does(sizes):
    config, tokens = config_of("two key heads"), TOKENS[:, :64]
    model, params = abstract_model(config, FLOAT32), random_params(config)
    run = jax.jit(lambda params: with_params(model, params)(tokens))
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    spread = jax.device_put(params, shardings_of(get_params(model), param_axes(model), mesh))
    with jax.set_mesh(mesh):
        found = run(spread)
    assert_close(found, logits_of("two key heads")[:, :64], rel=1e-5)


def test_a_cache_over_tensor_is_that_of_one_device():
    model, expected = model_of(NSA), logits_of("two key heads")
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        cache = model.init_cache(2, 80)
        found, cache = jax.jit(model.prefill)(TOKENS[:, :60], cache)
        assert_close(found, expected[:, 59], rel=1e-5)
        found, cache = jax.jit(model.decode)(TOKENS[:, 60], cache)
        assert_close(found, expected[:, 60], rel=1e-5)
        sums = cache.pages.value_sums
        assert sums.sharding.shard_shape(sums.shape)[1:3] == (1, 1)


def test_sizes_are_those_counted_and_gates_begin_at_a_half():
    for name in CASES:
        config = config_of(name)
        sizes = [x.size for x in jax.tree.leaves(get_params(abstract_model(config)))]
        assert sum(sizes) == config.num_parameters
    gate = NativeSparseAttention(NSA, nnx.Rngs(0)).gate[...]
    assert gate.shape == (32, 12) and not gate.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 2}, 'top_k is 2, but attention "nsa" always reads'),
        ({"selector": "bounds"}, "selector is 'bounds', but .* leave it 'mean'"),
        ({"selection_join": "max"}, "selection_join is 'max'"),
        ({"forced_chunks": "first"}, "forced_chunks is 'first', but attention \"nsa\""),
        ({"selection_groups": 4}, 'selection_groups is 4, but with attention "nsa"'),
        ({"window_size": 0}, "window_size"),
    ],
)
def test_what_contradicts_it_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(NSA, **changes)


def test_caches_it_can_not_read_are_refused():
    model = abstract_model(NSA, FLOAT32)
    with pytest.raises(ConfigError, match="reads the means of whole chunks"):
        model.init_cache(1, 64, policy=CachePolicy(trigger=20, keep=14, window=5))
    with pytest.raises(ConfigError, match='gate "shared"'):
        model.init_cache(1, 64, gate="shared")
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])
    with (
        jax.set_mesh(mesh),
        pytest.raises(ConfigError, match="mesh.context 2 would part the chunks"),
    ):
        model.init_cache(1, 64)


def test_heads_that_choose_together_stay_on_one_device():
    stage = dataclasses.replace(CURRICULUM.stages[2], seq_len=64)
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])
    fits = lambda model: check_fits(
        dataclasses.replace(CURRICULUM, model=model, stages=(stage,)), mesh
    )
    fits(NSA)
    with pytest.raises(ConfigError, match="would part heads that choose chunks together"):
        fits(dataclasses.replace(NSA, num_kv_heads=1))
    with pytest.raises(ConfigError, match="make seq_len a multiple of"):
        stage = dataclasses.replace(stage, seq_len=60)
        fits(NSA)

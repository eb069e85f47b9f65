"""Heads that choose chunks together, and choices by learned vectors: the whole sequence against an
oracle of the choice, reading from a cache against the whole sequence, devices against one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError, MeshConfig, ModelConfig
from rwkvx_jax.model import abstract_model, create_model, get_params, param_axes, with_params
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.selection import selector_of
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from rwkvx_jax.sharding import check_fits, make_mesh
from rwkvx_jax.training.expand import with_indexers
from rwkvx_jax.training.step import shardings_of
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, compare_in_pieces, random_params
from tests.ops.test_chunk_mass import plain_divergence
from tests.training.training_cases import CURRICULUM

# A Transformer: nothing but attention blocks, so that nothing hides what these choose.
PLAIN = ModelConfig(
    vocab_size=40,
    num_blocks=0,
    num_attention_blocks=2,
    width=32,
    head_size=8,
    chunk_size=8,
    top_k=3,
)
SEER = dataclasses.replace(PLAIN, selector="seer", index_size=4)
INDEX = dataclasses.replace(PLAIN, selector="index", selector_blocks=4, index_size=4)
CASES = {
    "mean of 2, joined": {"num_kv_heads": 2, "selection_groups": 2},
    "bounds of 4, largest": {
        "num_kv_heads": 1,
        "selection_groups": 1,
        "selector": "bounds",
        "selection_join": "max",
    },
    "pooled of 2": {
        "num_kv_heads": 1,
        "selection_groups": 2,
        "selector": "pooled",
        "selector_blocks": 2,
    },
    "index of each head": {"key_conv": 2, "index_size": 0},
    "index of 2, keys of each": {"selection_groups": 2},
    "index of 4, keys of 2": {"selection_groups": 1, "num_kv_heads": 2},
    "index of 2, one key head": {"selection_groups": 2, "num_kv_heads": 1},
    "index of 2, in spans": {
        "selection_groups": 2,
        "selection_span": 2,
        "selection_spans": 2,
        "forced_chunks": "previous",
    },
    "seer of each head": {"key_conv": 2, "index_size": 0, "forced_chunks": "first"},
    "seer of 2, one key head": {"selection_groups": 2, "num_kv_heads": 1},
    "seer of 2, keys of each": {"selection_groups": 2, "num_kv_heads": 2, "rope_theta": 100.0},
}
STARTS = {"index": INDEX, "seer": SEER}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 53))


def config_of(name):
    return dataclasses.replace(STARTS.get(name.split()[0], PLAIN), **CASES[name])


def model_of(config, params=None):
    return with_params(abstract_model(config, FLOAT32), params or random_params(config))


@functools.cache
def logits_of(name):
    return jax.jit(model_of(config_of(name)))(TOKENS)


def first_attention(config):
    """The first attention module of random parameters."""
    model = model_of(config)
    return jax.tree.map(lambda p: jnp.asarray(p[0]), model.attention_blocks).attention


@pytest.mark.parametrize("name", CASES)
def test_a_whole_sequence_reads_what_the_oracle_chooses(name):
    config = config_of(name)
    attention = first_attention(config)
    h = np.random.default_rng(1).standard_normal((2, 53, 32)).astype(np.float32)
    q, k, v, _ = attention.project(h)
    options = {"chunk_size": 8, "top_k": 3}
    if config.learned_selector:
        plain = plain_index if config.selector == "index" else plain_gate
        asked, scored = plain(attention.indexer, config, q, k)
        selector = selector_of(config)
        kind = ("bounds", config.selector_blocks) if config.selector == "index" else ("seer", 1)
        assert selector[:3] == (*kind, 1)
        chosen = select_chunks_reference(asked, scored, **options, selector=selector)
        chosen = jnp.repeat(chosen, 4 // config.choices, axis=2)
    else:
        chosen = select_chunks_reference(q, k, **options, selector=selector_of(config))
    assert chosen.shape[2] == (4 if config.learned_selector else config.choices)
    run = functools.partial(sparse_attention, implementation="reference", **options)
    expected = attention.combine(run(q, k, v, selection=chosen))
    assert_close(jax.jit(lambda h: attention(h, FLOAT32))(h), expected, rel=1e-5)


def plain_index(indexer, config, q, k):
    """Index queries and keys, one head after the other."""
    groups = range(config.choices)
    of = lambda s, count: range(s * count // config.choices, (s + 1) * count // config.choices)
    maps = indexer.query_map[...], indexer.key_map[...]
    heads, mapped = q.shape[2], maps[1].shape[0]
    query = [sum(q[:, :, h] @ maps[0][h] for h in of(s, heads)) for s in groups]
    key_head = lambda n: n * k.shape[2] // mapped
    key = [sum(k[:, :, key_head(n)] @ maps[1][n] for n in of(s, mapped)) for s in groups]
    return jnp.stack(query, 2), jnp.stack(key, 2)


def plain_gate(indexer, config, q, k):
    """Queries of the gate, one head after the other: by the map of keys, transposed."""
    each = config.num_heads // config.choices
    mapped = [q[:, :, h] @ indexer.query_map[...][h] for h in range(config.num_heads)]
    asked = [
        sum(mapped[s * each : (s + 1) * each]) @ indexer.key_map[...][s].T
        for s in range(config.choices)
    ]
    return jnp.stack(asked, 2), k


THOROUGH = (
    "mean of 2, joined",
    "pooled of 2",
    "index of 4, keys of 2",
    "seer of 2, keys of each",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.thorough] * (n in THOROUGH)) for n in CASES]
)
def test_pieces_and_tokens_are_the_whole_sequence(name):
    """Rows of different lengths, read in two pieces, then token by token."""
    compare_in_pieces(model_of(config_of(name)), TOKENS, logits_of(name), max_length=64)


@pytest.mark.parametrize("name", ["index of 2, in spans", "seer of 2, one key head"])
def test_rows_follow_keys_that_a_policy_moves(name):
    config = config_of(name)
    model = model_of(config)
    cache = model.init_cache(2, 64, policy=CachePolicy(trigger=20, keep=14, window=5))
    _, cache = jax.jit(model.prefill)(TOKENS, cache)
    length = int(cache.length[0])
    assert length < 53
    for layer in range(2):
        attention = jax.tree.map(lambda p, i=layer: p[i], model.attention_blocks).attention
        keys = cache.pages.keys[layer].reshape(2, config.kv_heads, -1, 8)
        keys = keys[:, :, :length].swapaxes(1, 2)
        rows = selector_of(config).rows_of(attention.indexer.keys(keys), 8).swapaxes(1, 2)
        pairs = [(cache.pages.key_sums[layer], rows)]
        if config.selection_span:
            spans = selector_of(config).span_rows(rows)
            pairs.append((cache.pages.span_rows[layer], spans))
        for found, wanted in pairs:
            found, finite = found[:, :, : wanted.shape[2]], np.isfinite(wanted)
            assert (finite == np.isfinite(found)).all()
            assert_close(np.where(finite, found, 0), np.where(finite, wanted, 0), rel=1e-6)


@pytest.mark.parametrize(
    ("selector", "begins", "other"), [("index", "bounds", "mean"), ("seer", "mean", "bounds")]
)
def test_an_indexer_begins_as_a_selector_of_the_keys(selector, begins, other):
    learned = dataclasses.replace(PLAIN, selector=selector, selector_blocks=1)
    plain = dataclasses.replace(PLAIN, selector=begins)
    params = random_params(plain)
    started = with_indexers(params, learned)
    assert with_indexers(started, learned) is started
    expected = jax.jit(model_of(plain, params))(TOKENS)
    assert_close(jax.jit(model_of(learned, started))(TOKENS), expected, rel=1e-6)
    others = jax.jit(model_of(dataclasses.replace(plain, selector=other), params))(TOKENS)
    assert np.abs(others - expected).max() > 1e-3  # so that this comparison can fail


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("index of 2, keys of each", {"data": 2, "tensor": 2}),
        ("index of 2, keys of each", {"data": 1, "context": 4}),
        ("index of 4, keys of 2", {"data": 2, "context": 2}),
        ("mean of 2, joined", {"data": 2, "context": 2}),
        ("seer of each head", {"data": 1, "tensor": 2, "context": 2}),
        ("seer of 2, one key head", {"data": 1, "context": 4}),
    ],
)
def test_devices_choose_as_one_does(name, sizes):
    config, tokens = config_of(name), TOKENS[:, :32]
    model, params = abstract_model(config, FLOAT32), random_params(config)
    run = jax.jit(lambda params: with_params(model, params)(tokens))
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    spread = jax.device_put(params, shardings_of(get_params(model), param_axes(model), mesh))
    with jax.set_mesh(mesh):
        found = run(spread)
    assert_close(found, logits_of(name)[:, :32], rel=1e-5)


@pytest.mark.parametrize(
    "name", ["index of 2, keys of each", "bounds of 4, largest", "seer of 2, one key head"]
)
def test_a_packed_document_chooses_as_it_does_alone(name):
    """One that begins at a chunk; the next, which begins within one, has no say."""
    model = model_of(config_of(name))
    ids = jnp.repeat(jnp.array([[1, 2, 3]] * 2), jnp.array([8, 27, 18]), axis=1)
    run = jax.jit(model)
    packed = run(TOKENS, ids)
    assert_close(packed[:, 8:35], run(TOKENS[:, 8:35]), rel=1e-5)
    other = np.where(ids == 3, TOKENS, (TOKENS + 7) % 40)
    assert_close(run(other, ids)[:, 35:], packed[:, 35:], rel=1e-6)


def test_spans_of_other_documents_have_no_say():
    model = model_of(config_of("index of 2, in spans"))
    ids = jnp.repeat(jnp.array([[1, 2]] * 2), jnp.array([13, 40]), axis=1)
    run = jax.jit(model)
    other = np.where(ids == 2, TOKENS, (TOKENS + 7) % 40)
    assert_close(run(other, ids)[:, 13:], run(TOKENS, ids)[:, 13:], rel=1e-6)


def test_the_gate_learns_as_its_formula_says():
    """The pooled keys mapped, as in the paper; all other parameters get no gradient."""
    config = config_of("seer of 2, one key head")
    attention = first_attention(config)
    h = jnp.asarray(np.random.default_rng(1).standard_normal((2, 53, 32)), jnp.float32)

    def plain(attention):
        q, k, _, _ = jax.lax.stop_gradient(attention.project(h))
        query_map, key_map = attention.indexer.query_map[...], attention.indexer.key_map[...]
        asked = jnp.einsum("bthk,hki->bthi", q, query_map).reshape(2, 53, 2, 2, 4).sum(3)
        chunks = k[:, :48, 0].reshape(2, 6, 8, 8)
        pooled = jnp.concatenate([chunks.min(2), chunks.max(2), chunks.mean(2)], axis=-1)
        scores = jnp.einsum("btsi,bnf,sfi->btns", asked, pooled, key_map) * 8**-0.5
        return plain_divergence(q, k, scores).sum()

    learned = lambda attention: attention.selection_loss(h).sum()
    found, expected = (
        jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(f))(attention))
        for f in (learned, plain)
    )
    for (path, actual), (_, wanted) in zip(found, expected, strict=True):
        name = jax.tree_util.keystr(path)
        assert bool(jnp.any(actual)) == ("indexer" in name), name
        if "indexer" in name:
            assert_close(actual, wanted, rel=1e-4, name=name)


def test_sizes_are_those_counted():
    for name in CASES:
        config = config_of(name)
        sizes = [x.size for x in jax.tree.leaves(get_params(abstract_model(config)))]
        assert sum(sizes) == config.num_parameters
    fresh = get_params(create_model(config_of("index of 2, keys of each"), FLOAT32))
    maps = fresh["attention_blocks"]["attention"]["indexer"]["query_map"][0]
    assert_close(maps[0].T @ maps[3], 2 * np.eye(4), rel=1e-6)  # K / I times orthonormal columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection_groups": 3}, "selection_groups is 3: it must divide the 4 heads"),
        ({"selection_groups": 2}, 'use a multiple of the 4 heads of keys .* or selector="index"'),
        ({"index_size": 8}, "index_size is 8: it is of the selectors .*, not of 'mean'"),
        ({"selector": "seer", "selection_groups": 2}, "but heads that choose together by the sel"),
        ({"selector": "seer", "selection_span": 4}, "selection_span is 4 with the selector 'seer'"),
        ({"selector": "index", "selector_blocks": 3}, "selector_blocks 3 does not divide"),
        ({"selection_span": 4}, "selection_span is 4 with the selector 'mean'"),
        (
            {"selector": "bounds", "selection_span": 2, "selection_spans": 2, "top_k": 4},
            "may hold fewer past chunks than model.top_k 4",
        ),
    ],
)
def test_choices_that_can_not_be_made_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_heads_that_choose_together_stay_on_one_device():
    model = dataclasses.replace(PLAIN, num_kv_heads=1, selection_groups=1)
    stage = dataclasses.replace(CURRICULUM.stages[2], seq_len=32)
    config = dataclasses.replace(CURRICULUM, model=model, stages=(stage,))
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])
    with pytest.raises(ConfigError, match="would part heads that choose chunks together"):
        check_fits(config, mesh)

"""Every mixer in a small model: its sizes, its three ways through a text, its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.cache import init_cache
from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.model import abstract_model, create_model, get_params, param_axes, with_params
from rwkvx_jax.modules.mixers import MIXERS
from rwkvx_jax.modules.trees import select
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, perturbed

BATCH, TIME, PIECE = 2, 44, 12
# Valid tokens of each piece, by row; together TIME - DECODED.
PIECES = ((12, 5), (1, 12), (7, 0), (12, 12), (0, 3))
DECODED = 12
# Every position has a token of its own, so that row i of the embedding belongs to one position.
TOKENS = np.arange(BATCH * TIME, dtype=np.int32).reshape(BATCH, TIME)
SMALL = ModelConfig(
    vocab_size=BATCH * TIME,
    num_blocks=2,
    num_attention_blocks=1,
    width=64,
    head_size=16,
    ffn_width=96,
    chunk_size=8,
    top_k=2,
    low_rank_override=(5, 6, 7, 9),
)

SIMPLER = "deltanet", "rwkv5", "rwkv6", "kda", "lightning"  # or much like another
pytestmark = pytest.mark.parametrize(
    "mixer",
    [pytest.param(m, marks=[pytest.mark.thorough] * (m in SIMPLER)) for m in MIXERS],
)


def config_of(mixer):
    return dataclasses.replace(SMALL, mixer=mixer)


@functools.cache
def fresh(mixer):
    return jax.jit(lambda: get_params(create_model(config_of(mixer))))()


@functools.cache
def moved(mixer):
    return perturbed(fresh(mixer))


@functools.cache
def program(mixer, run=FLOAT32):
    """(parameters, weights [B, T, W]) -> logits, and gradients of their sum times the weights."""
    model = abstract_model(config_of(mixer), run)

    def objective(params, weights):
        logits = with_params(model, params)(TOKENS)
        return jnp.sum(logits * weights), logits

    differentiated = jax.jit(jax.value_and_grad(objective, has_aux=True))

    def both(params, weights):
        (_, logits), gradients = differentiated(params, weights)
        return logits, gradients

    return both


def weights_at(*positions):
    """Random weights of the logits at these positions of every text; none elsewhere."""
    weights = np.zeros((BATCH, TIME, SMALL.vocab_size), np.float32)
    for at in positions:
        weights[:, at] = np.random.default_rng(at).standard_normal(weights[:, at].shape)
    return weights


def test_sizes_are_those_counted(mixer):
    config = config_of(mixer)
    params = get_params(abstract_model(config))
    assert config.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    matrices = flat(select_matrices(abstract_model(config)))
    assert config.mixer_sizes.matrices * config.num_blocks == sum(x.size for _, x in matrices)
    model = abstract_model(config, FLOAT32)
    cache = jax.eval_shape(lambda: init_cache(config, model.dtype, BATCH, TIME))
    prefill = lambda params, cache: with_params(model, params).prefill(TOKENS, cache)
    _, after = jax.eval_shape(prefill, params, cache)
    assert jax.tree.map(_described, after) == jax.tree.map(_described, cache)


def select_matrices(model):
    """Those parameters of the mixers that each token is multiplied with, as a tree."""
    axes = dict(flat(jax.tree.map(set, param_axes(model), is_leaf=lambda x: isinstance(x, tuple))))
    chosen = lambda name: "time_mix" in name and axes[name] & {"embed", "rank"}
    return select(get_params(model), chosen)


def _described(leaf):
    return leaf.shape, leaf.dtype


def test_a_whole_text_is_its_pieces_is_its_tokens(mixer):
    """Pieces are padded, some rows empty; the last tokens are decoded one by one."""
    config = config_of(mixer)
    expected = np.asarray(program(mixer)(moved(mixer), weights_at(TIME - 1))[0])
    model = abstract_model(config, FLOAT32)
    run = lambda way: jax.jit(lambda params, *given: way(with_params(model, params), *given))
    prefill, decode = run(type(model).prefill), run(type(model).decode)
    same = functools.partial(assert_close, rel=2e-5)

    def decoded(cache, at, count):
        """`count` tokens one by one, from where each row is."""
        for _ in range(count):
            logits, cache = decode(moved(mixer), TOKENS[np.arange(BATCH), at], cache)
            same(logits, expected[np.arange(BATCH), at], name=f"decoded at {at}")
            at = at + 1
        return cache

    in_pieces, at = model.init_cache(BATCH, TIME), np.zeros(BATCH, int)
    for counts in PIECES:
        piece = np.full((BATCH, PIECE), 3, np.int32)
        for row, count in enumerate(counts):
            piece[row, :count] = TOKENS[row, at[row] : at[row] + count]
        logits, in_pieces = prefill(moved(mixer), piece, in_pieces, np.asarray(counts, np.int32))
        at = at + counts
        for row, count in enumerate(counts):
            if count:
                same(logits[row], expected[row, at[row] - 1], name=f"row {row} up to {at[row]}")
    assert (at == TIME - DECODED).all()
    token_by_token = decoded(model.init_cache(BATCH, TIME), np.zeros(BATCH, int), at[0])
    for found, wanted in zip(
        in_pieces.blocks.time_mix, token_by_token.blocks.time_mix, strict=True
    ):
        same(found, wanted, name="state")
    decoded(in_pieces, at, DECODED)


def test_gradients_reach_every_parameter_and_no_later_token(mixer):
    at = TIME // 2
    _, gradients = program(mixer)(moved(mixer), weights_at(at))
    by_token = np.abs(gradients["embed"]).max(-1).reshape(BATCH, TIME)
    assert (by_token[:, : at + 1] > 0).all()
    assert (by_token[:, at + 1 :] == 0).all()
    # Layer by layer, of what is stacked; of the rest as a whole.
    layers = lambda name, leaf: leaf if "blocks." in name else leaf[None]
    reached = lambda leaf: np.abs(leaf).reshape(len(leaf), -1).max(-1) > 0
    missed = {name for name, leaf in flat(gradients) if not reached(layers(name, leaf)).all()}
    # Slopes are fixed; layer 0 of RWKV-7 has no use for the values of the first layer.
    unused = {"lightning": {"slope"}, "rwkv7": {"v0", "v1", "v2"}}.get(mixer, set())
    assert missed == {f"blocks.time_mix.{name}" for name in unused}


def test_fresh_blocks_add_nothing(mixer):
    logits, gradients = program(mixer)(fresh(mixer), weights_at(*range(TIME)))
    model = with_params(abstract_model(config_of(mixer), FLOAT32), fresh(mixer))
    assert_close(logits, model.head(model.ln_out(model.embed_tokens(TOKENS))), rel=1e-6)
    assert np.asarray(gradients["blocks"]["time_mix"]["output"]).any()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_gradients_at_the_start_are_finite(mixer, dtype):
    run = dataclasses.replace(FLOAT32, compute_dtype=dtype)
    _, gradients = program(mixer, run)(fresh(mixer), weights_at(*range(TIME)))
    for name, leaf in flat(gradients):
        assert np.isfinite(leaf).all(), name

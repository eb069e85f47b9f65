"""Whole models on packed documents: as if each were run alone, and nothing across a border.

Logits and gradients of all parameters to 1e-5 of the largest entry (float32), for all mixers,
backbones and kinds of attention, on one device and with sequences cut over several.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ConfigError, MeshConfig, ModelConfig
from rwkvx_jax.model import abstract_model, create_model, get_params, param_axes, with_params
from rwkvx_jax.modules.convolution import short_convolution
from rwkvx_jax.modules.mixers import MIXERS
from rwkvx_jax.modules.token_shift import previous_token
from rwkvx_jax.sharding import make_mesh
from rwkvx_jax.training.step import shardings_of
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, perturbed

TIME, CHUNK, TOP_K = 72, 8, 2
TOKENS = np.arange(TIME, dtype=np.int32)[None]  # each position has a token of its own
HYBRID = ModelConfig(
    vocab_size=TIME,
    num_blocks=2,
    num_attention_blocks=1,
    width=32,
    head_size=8,
    ffn_width=40,
    chunk_size=CHUNK,
    top_k=TOP_K,
    low_rank_override=(5, 6, 7, 9),
    key_conv=3,
)
LLAMA = dataclasses.replace(
    HYBRID, num_blocks=0, num_attention_blocks=2, backbone="llama", attention="full",
    num_kv_heads=2, qkv_bias=True, rope_theta=100.0,
)  # fmt: skip
MODELS = {mixer: dataclasses.replace(HYBRID, mixer=mixer) for mixer in MIXERS} | {
    "transformer": LLAMA,
    "sparse transformer": dataclasses.replace(LLAMA, attention="sparse", shared_attention=True),
}
RECOMPUTED = dataclasses.replace(FLOAT32, remat="block")
every_model = pytest.mark.parametrize(
    "name",
    [pytest.param(m, marks=[pytest.mark.thorough] * (m != "rwkv7")) for m in MODELS],
)
# Borders at 1, 2, 16 (a chunk), 17, 24, 40, 55; padding before, between and behind.
LENGTHS = (1, 1, 14, 1, 7, -16, 15, 10, -7)
ONE_IN_MANY_CHUNKS = (3, 64, 5)  # read differently, yet by nobody else


def ids_of(lengths):
    """Segment ids [1, T] of lengths; a negative one is padding."""
    numbers = np.cumsum([n > 0 for n in lengths]) * [n > 0 for n in lengths]
    return np.repeat(numbers, np.abs(lengths))[None].astype(np.int32)


def documents(ids):
    """(start, stop) of each document of the first row."""
    edges = [0, *(np.flatnonzero(np.diff(ids[0])) + 1), ids.shape[1]]
    return [(a, b) for a, b in itertools.pairwise(edges) if ids[0, a]]


def as_if_alone(start, stop):
    """Whether sparse attention reads a document as if it were alone."""
    return start % CHUNK == 0 or (stop - 1) // CHUNK - start // CHUNK < TOP_K


@functools.cache
def params_of(name):
    return perturbed(jax.jit(lambda: get_params(create_model(MODELS[name])))())


@functools.cache
def program(name, run=FLOAT32):
    """(parameters, tokens, segment ids or None, weights of logits) -> logits, gradients."""
    model = abstract_model(MODELS[name], run)

    def objective(params, tokens, ids, weights):
        logits = with_params(model, params)(tokens, ids)
        return jnp.sum(logits * weights), logits

    both = jax.jit(jax.value_and_grad(objective, has_aux=True))

    def run_both(params, *given):
        (_, logits), gradients = both(params, *given)
        return logits, gradients

    return run_both


def weights_for(ids, exact):
    """Random weights of the logits of documents that `exact` says yes to; 0 elsewhere."""
    weights = np.random.default_rng(0).standard_normal((1, TIME, TIME)).astype(np.float32)
    keep = np.zeros(TIME, bool)
    for start, stop in documents(ids):
        keep[start:stop] = exact(start, stop)
    return np.where(keep[None, :, None], weights, 0)


def alone(name, ids, weights):
    """Each document at the beginning of a row of its own: logits put back, gradients added up."""
    spans = documents(ids)
    rows = 8  # one compiled program for any documents
    tokens, moved = np.zeros((rows, TIME), np.int32), np.zeros((rows, TIME, TIME), np.float32)
    assert len(spans) <= rows
    for row, (a, b) in enumerate(spans):
        tokens[row, : b - a], moved[row, : b - a] = TOKENS[0, a:b], weights[0, a:b]
    found, gradients = program(name)(params_of(name), tokens, None, moved)
    logits = np.zeros((1, TIME, TIME), np.float32)
    for row, (a, b) in enumerate(spans):
        logits[0, a:b] = found[row, : b - a]
    return logits, gradients


def compare_with_alone(name, lengths):
    ids = ids_of(lengths)
    exact = as_if_alone if MODELS[name].attention == "sparse" else lambda start, stop: True
    weights = weights_for(ids, exact)
    logits, gradients = program(name)(params_of(name), TOKENS, ids, weights)
    expected, expected_gradients = alone(name, ids, weights)
    assert np.isfinite(logits).all()
    kept = (weights != 0).any(-1, keepdims=True)
    assert_close(np.where(kept, logits, 0), np.where(kept, expected, 0), rel=1e-5)
    for (path, x), (_, y) in zip(flat(gradients), flat(expected_gradients), strict=True):
        if np.abs(y).max() > 1e-6:
            assert_close(x, y, rel=1e-5, name=path)


@every_model
def test_a_packed_window_equals_its_documents(name):
    compare_with_alone(name, LENGTHS)


borders = st.sets(st.sampled_from([1, 2, 8, 9, 32, 33, 63, 64, 65, TIME - 1]), max_size=7)


# Not of every mixer: the gradient of Mamba-2's rate sums terms that nearly cancel, and its rounding
# alone is 1.4e-5 of the largest entry with a border at 63.
@settings(max_examples=6, deadline=None, derandomize=True)
@given(borders, st.sets(st.integers(0, 7), max_size=2))
def test_any_borders(borders, padding):
    lengths = np.diff([0, *sorted(borders), TIME])
    apart = [n if i not in padding else -n for i, n in enumerate(lengths)]
    compare_with_alone("rwkv7", apart)


@every_model
def test_nothing_crosses_a_border(name):
    """Gradients of a document's logits with respect to the embeddings of all others are 0."""
    for lengths in (LENGTHS, ONE_IN_MANY_CHUNKS):
        ids = ids_of(lengths)
        for start, stop in documents(ids)[1:-1]:
            weights = weights_for(ids, lambda a, b, start=start: a == start)
            _, gradients = program(name)(params_of(name), TOKENS, ids, weights)
            embedding = np.asarray(gradients["embed"])
            others = np.r_[0:start, stop:TIME]
            assert not embedding[others].any()
            assert embedding[start:stop].any(axis=1).all()


def test_padding_gives_finite_rows_that_nobody_reads():
    """Also where nothing else is there; other tokens in it change nothing but rounding."""
    run, params = program("rwkv7"), params_of("rwkv7")
    none = np.zeros((1, TIME, TIME), np.float32)
    logits, gradients = run(params, TOKENS, ids_of((-TIME,)), none)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(x).all() for _, x in flat(gradients))
    ids = ids_of(LENGTHS)
    before, _ = run(params, TOKENS, ids, none)
    after, _ = run(params, np.where(ids > 0, TOKENS, 3), ids, none)
    assert_close(np.asarray(after)[ids > 0], np.asarray(before)[ids > 0], rel=1e-6)


@pytest.mark.thorough
def test_recomputed_blocks_give_the_same():
    """The policies of `run.remat` see the ids as well."""
    given = params_of("rwkv7"), TOKENS, ids_of(LENGTHS), weights_for(ids_of(LENGTHS), as_if_alone)
    expected, found = program("rwkv7")(*given)[1], program("rwkv7", RECOMPUTED)(*given)[1]
    for (path, x), (_, y) in zip(flat(found), flat(expected), strict=True):
        assert_close(x, y, rel=1e-5, name=path)


def test_no_ids_leave_no_trace():
    model, params = abstract_model(MODELS["rwkv7"], FLOAT32), params_of("rwkv7")
    text = lambda *ids: str(
        jax.make_jaxpr(lambda params: with_params(model, params)(TOKENS, *ids))(params)
    )
    assert text() == text(None) != text(jnp.asarray(ids_of(LENGTHS)))


# ---------------------------------------------------------------------------- over several devices


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("rwkv7", {"data": 1, "context": 3}),  # heads traded for tokens; logits alone
        pytest.param("rwkv7", {"data": 1, "context": 2}, marks=pytest.mark.thorough),
        pytest.param("mamba2", {"data": 1, "context": 3, "tensor": 2}, marks=pytest.mark.thorough),
        pytest.param("sparse transformer", {"data": 1, "context": 3}, marks=pytest.mark.thorough),
        pytest.param("rwkv6", {"data": 1, "context": 8}, marks=pytest.mark.thorough),
        pytest.param("rwkv4", {"data": 2, "tensor": 2}, marks=pytest.mark.thorough),
        pytest.param("kda", {"data": 1, "fsdp": 2, "context": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_that_share_a_window(name, sizes):
    """A border anywhere, also at a device's edge (24, 48; 9, 18, ...), against one device."""
    params, model = params_of(name), abstract_model(MODELS[name], FLOAT32)
    devices = int(np.prod([*sizes.values()]))
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
    spread = jax.device_put(params, shardings_of(get_params(model), param_axes(model), mesh))
    over_devices = program.__wrapped__(name)
    if quick := sizes == {"data": 1, "context": 3} and name == "rwkv7":
        over_devices = jax.jit(lambda params, *given: with_params(model, params)(*given[:2]))
    # One begins at an edge and goes on behind the next: nothing comes to there through its stretch.
    for lengths in (LENGTHS, (24, 24, 24), (9, 15, -24, 1, 23), (24, 40, 8)):
        ids = ids_of(lengths)
        given = TOKENS, ids, weights_for(ids, lambda start, stop: True)
        logits, gradients = program(name)(params, *given)
        with jax.set_mesh(mesh):
            found = over_devices(spread, *given)
        found, found_gradients = (found, {}) if quick else found
        read = ids[..., None] > 0
        assert_close(np.where(read, found, 0), np.where(read, logits, 0), rel=1e-5)
        for (path, x), (_, y) in zip(flat(found_gradients), flat(gradients), strict=not quick):
            assert_close(x, y, rel=2e-5, name=path)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "ids, message",
    [
        (np.ones((1, TIME + 1), np.int32), r"model: segment_ids must be int32 \[1, 72\]"),
        (np.ones((1, TIME), np.float32), "got float32"),
        (ids_of((5, 67)) * 2, "go from 2 to 4 at token 5 of row 0"),
        (ids_of((5, 67))[:, ::-1], "go from 2 to 1"),
    ],
)
def test_ids_that_number_no_documents(ids, message):
    model = with_params(abstract_model(MODELS["rwkv7"], FLOAT32), params_of("rwkv7"))
    with pytest.raises(ValueError, match=message):
        model(TOKENS, jnp.asarray(ids))


def test_a_learned_state_begins_no_document():
    config = dataclasses.replace(MODELS["rwkv7"], learned_state=True)
    run = lambda: create_model(config, FLOAT32)(TOKENS, jnp.asarray(ids_of(LENGTHS)))
    with pytest.raises(ConfigError, match="learned_state"):
        jax.eval_shape(run)


def test_shifts_and_convolutions_stay_in_a_document():
    """Against each document by itself, across borders closer to each other than the taps."""
    rng = np.random.default_rng(0)
    x, taps = rng.standard_normal((1, TIME, 4)), rng.standard_normal((4, 4))
    x, taps = jnp.asarray(x, jnp.float32), jnp.asarray(taps, jnp.float32)
    ids = ids_of(LENGTHS)
    run = lambda x, *ids: (
        previous_token(x, None, *ids), short_convolution(x, taps, None, None, *ids)[0]
    )  # fmt: skip
    found = run(x, jnp.asarray(ids))
    for start, stop in documents(ids):
        for y, expected in zip(found, run(x[:, start:stop]), strict=True):
            assert_close(y[:, start:stop], expected, rel=1e-6)

"""Attention blocks that read the chunks which another one chose: against the choice handed over by
hand, in values and gradients; reading from a cache against the whole sequence; devices, too."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import Config, ConfigError, MeshConfig, Stage
from rwkvx_jax.evals.chunk_mass import measure, positions_of, selectors
from rwkvx_jax.evals.tasks.selection import Observer
from rwkvx_jax.model import abstract_model, get_params, param_axes, unstack, with_params
from rwkvx_jax.modules import attention
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.selection import repeated_choices, selector_of
from rwkvx_jax.ops.selection_reference import select_chunks_reference
from rwkvx_jax.sharding import check_fits, make_mesh
from rwkvx_jax.snapshots import row_of, with_row
from rwkvx_jax.training.losses import selecting_queries
from rwkvx_jax.training.model_flops import attention_flops, visible_keys
from rwkvx_jax.training.step import shardings_of
from tests.helpers import assert_close
from tests.model_cases import FLOAT32, random_params
from tests.modules.test_indexer import INDEX, PLAIN, SEER, TOKENS

# Three blocks of which every second one chooses; a Transformer, as nothing else hides the choices.
SHARED = {"num_attention_blocks": 3, "share_selection_every": 2}
CASES = {
    "mean": dataclasses.replace(PLAIN, **SHARED),
    "seer": dataclasses.replace(SEER, **SHARED, num_kv_heads=1, selection_groups=2),
    "index": dataclasses.replace(
        INDEX, **SHARED, num_kv_heads=2, selection_groups=1, selection_span=2, selection_spans=2
    ),
}


def model_of(config, run=FLOAT32):
    return with_params(abstract_model(config, run), random_params(config))


def by_hand(model, tokens):
    """Logits, block by block, with choices of the oracle."""
    config, x, chosen = model.config, model.embed_tokens(tokens), None
    options = {"chunk_size": 8, "top_k": 3}
    for i in range(config.num_attention_blocks):
        block = jax.tree.map(lambda p, i=i: p[i], model.attention_blocks)

        def attend(attention, h, i=i):
            nonlocal chosen
            q, k, v, _ = attention.project(h)
            if i % config.share_selection_every == 0:
                scored = jax.lax.stop_gradient(attention.scored(q, k))
                chosen = select_chunks_reference(*scored, **options, selector=selector_of(config))
            selection = repeated_choices(chosen, k.shape[2])
            run = functools.partial(sparse_attention, implementation="reference", **options)
            return attention.combine(run(q, k, v, selection=selection)), None

        x, *_ = block(x, attend)
    return model.head(model.ln_out(x))


@functools.cache
def expected_of(name):
    """Logits and gradients by hand."""
    return value_and_gradients(model_of(CASES[name]), by_hand)


def value_and_gradients(model, forward):
    weights = jnp.asarray(np.random.default_rng(5).standard_normal((2, 53, 40)), jnp.float32)

    def loss(params):
        logits = forward(with_params(model, params), TOKENS)
        return (weights * logits).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(get_params(model))
    return logits, gradients


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("mean", "none"),
        ("seer", "block"),
        pytest.param("index", "save_projections", marks=pytest.mark.thorough),
    ],
)
def test_choices_are_those_handed_over_by_hand(name, remat):
    model = model_of(CASES[name], dataclasses.replace(FLOAT32, remat=remat))
    logits, gradients = value_and_gradients(model, lambda model, tokens: model(tokens))
    expected, wanted = expected_of(name)
    assert_close(logits, expected, rel=1e-5)
    jax.tree.map(lambda x, y: assert_close(x, y, rel=1e-4), gradients, wanted)
    alone = dataclasses.replace(CASES[name], share_selection_every=1)
    assert np.abs(jax.jit(model_of(alone))(TOKENS) - expected).max() > 1e-3


def read(model, cache, tokens=TOKENS):
    """Logits after two pieces, of rows of different lengths, and after each token then."""
    prefill, decode = jax.jit(model.prefill), jax.jit(model.decode)
    done, found = np.zeros(2, int), []
    padded = np.pad(tokens, ((0, 0), (0, 30)))
    for lengths in ([23, 30], [17, 5]):
        piece = np.stack([row[at : at + 30] for row, at in zip(padded, done, strict=True)])
        logits, cache = prefill(piece, cache, np.array(lengths))
        done += lengths
        found.append((done.copy(), logits))
    while done.max() < 53:
        logits, cache = decode(tokens[np.arange(2), done], cache)
        done += 1
        found.append((done.copy(), logits))
    return found, cache


@pytest.mark.parametrize(
    "name", ["mean", "seer", pytest.param("index", marks=pytest.mark.thorough)]
)
def test_pieces_and_tokens_are_the_whole_sequence(name):
    model, expected = model_of(CASES[name]), expected_of(name)[0]
    cache = model.init_cache(2, 64)
    assert cache.pages.keys.shape[0] == 3 and cache.pages.key_sums.shape[0] == 2
    for done, logits in read(model, cache)[0]:
        assert_close(logits, expected[np.arange(2), done - 1], rel=1e-5)


def test_one_row_by_itself_and_layers_by_themselves_change_nothing():
    model, expected = unstack(model_of(CASES["seer"])), expected_of("seer")[0]
    cache = model.init_cache(2, 64)
    advance = jax.jit(lambda piece, cache, row: model.prefill(piece, row_of(cache, row)))
    for row in (1, 0):
        logits, own = advance(TOKENS[row : row + 1, :40], cache, jnp.int32(row))
        cache = with_row(cache, own, jnp.int32(row))
        assert_close(logits[0], expected[row, 39], rel=1e-5)
    logits, _ = jax.jit(model.decode)(TOKENS[:, 40], cache)
    assert_close(logits, expected[:, 40], rel=1e-5)


POLICY = CachePolicy(trigger=40, keep=29, window=9)


def test_blocks_that_share_choices_keep_the_same_rows(monkeypatch):
    """So that a page holds the same places of a text in all of them."""
    model, kept = model_of(CASES["mean"]), {}
    _, cache = jax.jit(model.prefill)(TOKENS[:, :41], model.init_cache(2, 64, policy=POLICY))
    original = attention.compress

    def note(pages, layer, rows, *more):
        jax.debug.callback(lambda layer, rows: kept.update({int(layer): rows}), layer, rows)
        return original(pages, layer, rows, *more)

    monkeypatch.setattr(attention, "compress", note)
    _, cache = jax.jit(model.decode)(TOKENS[:, 41], cache)
    assert cache.length.tolist() == [30, 30]
    jax.effects_barrier()
    np.testing.assert_array_equal(kept[0], kept[1])
    assert (kept[2] != kept[0]).any()


@pytest.mark.thorough
def test_a_policy_does_not_mind_how_a_text_is_read():
    model = model_of(CASES["seer"])
    pieces, _ = read(model, model.init_cache(2, 64, policy=POLICY))
    cache, decode, by_token = model.init_cache(2, 64, policy=POLICY), jax.jit(model.decode), []
    for i in range(53):
        logits, cache = decode(TOKENS[:, i], cache)
        by_token.append(logits)
    assert int(cache.length[0]) < 53
    for done, logits in pieces:
        assert_close(logits, np.stack(by_token)[done - 1, np.arange(2)], rel=1e-5)


def test_only_blocks_that_choose_are_taught():
    config = CASES["seer"]
    model = model_of(config)
    look = lambda attention, h: attention.selection_loss(h)

    @jax.jit
    def sums(params):
        def total(params):
            _, seen = with_params(model, params).observe(TOKENS, look, choosing=True)
            return seen.sum(), seen

        _, every = with_params(model, params).observe(TOKENS, look)
        return *jax.grad(total, has_aux=True)(params), every

    gradients, taught, every = sums(get_params(model))
    assert_close(taught, every.at[1].set(0), rel=1e-6)
    assert every[1].min() > 0
    for name, x in gradients["attention_blocks"]["attention"]["indexer"].items():
        assert not x[1].any() and min(abs(x[0]).max(), abs(x[2]).max()) > 0, name
    assert selecting_queries(config, 53) == 2 * 2 * (53 - 8)


def test_a_packed_document_shares_as_it_does_alone():
    run = jax.jit(model_of(CASES["mean"]))
    ids = jnp.repeat(jnp.array([[1, 2, 3]] * 2), jnp.array([8, 27, 18]), axis=1)
    assert_close(run(TOKENS, ids)[:, 8:35], run(TOKENS[:, 8:35]), rel=1e-5)


@pytest.mark.thorough
def test_the_mass_that_is_held_is_that_of_shared_choices():
    """As `eval.py selection` measures it, in a block that reads what another one chose."""
    model, tokens = model_of(CASES["mean"]), TOKENS[0]
    options = SimpleNamespace(length=53, queries=20, blocks=2)
    placed = lambda: get_params(model)
    known = SimpleNamespace(config=model.config, abstract=model, placed=placed)
    found = Observer(known, options)(tokens)["selectors"]["own"]

    def look(attention, h):
        q, k, *_ = attention.project(h)
        return q[0], k[0]

    _, (q, k) = model.observe(tokens[None], look)
    positions, named = positions_of(model.config, 53, 20), selectors(model.config, 2)
    wanted = measure(q[1], k[1], (q[0], k[0]), jnp.asarray(positions), model.config, named)
    for name, expected in wanted["selectors"]["own"].items():
        assert_close(found[name][1], expected, rel=1e-5, name=name)


def test_the_gate_is_counted_where_blocks_choose():
    shared, length = CASES["mean"], 53
    alone = dataclasses.replace(shared, share_selection_every=1)
    rest = 4.0 * shared.width * visible_keys(shared, length)
    gates = [attention_flops(config, length) - rest for config in (shared, alone)]
    assert gates[0] == pytest.approx(gates[1] * 2 / 3) and gates[0] > 0


def config_on(**model):
    return Config(
        dataclasses.replace(CASES["mean"], **model), (Stage("one", 32, 4, 1, 1e-3),), run=FLOAT32
    )


def test_what_can_not_be_shared_is_refused():
    with pytest.raises(ConfigError, match="share_selection_every is 0: use 1"):
        config_on(share_selection_every=0)
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])
    wanted = "share_selection_every 2 hands .* with mesh.context 2 .*: use mesh.context 1"
    with pytest.raises(ConfigError, match=wanted):
        check_fits(config_on(), mesh)
    check_fits(config_on(share_selection_every=1), mesh)
    model = abstract_model(CASES["mean"], FLOAT32)
    with jax.set_mesh(mesh):
        with pytest.raises(ConfigError, match=wanted):
            model.init_cache(2, 64)
    with pytest.raises(ConfigError, match='gate "shared" .*share_selection_every is 2'):
        model.init_cache(2, 64, gate="shared")


def test_devices_share_as_one_does():
    config = dataclasses.replace(CASES["seer"], num_kv_heads=2)
    model, params = abstract_model(config, FLOAT32), random_params(config)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    spread = jax.device_put(params, shardings_of(get_params(model), param_axes(model), mesh))
    whole = with_params(model, params)
    expected = jax.jit(whole)(TOKENS)
    bind = lambda params: with_params(model, params)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params: bind(params)(TOKENS))(spread)
        cache = model.init_cache(2, 64)
        read = jax.jit(lambda params, cache: bind(params).prefill(TOKENS[:, :50], cache))
        last, cache = read(spread, cache)
        decode = jax.jit(lambda params, cache: bind(params).decode(TOKENS[:, 50], cache))
        token, _ = decode(spread, cache)
    assert_close(found, expected, rel=1e-5)
    assert_close(last, expected[:, 49], rel=1e-5)
    assert_close(token, expected[:, 50], rel=1e-5)

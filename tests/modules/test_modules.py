"""Initial values of both families against constants worked out by hand, and expansion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkvx_jax.config import ConfigError
from rwkvx_jax.model import create_model, get_params
from rwkvx_jax.modules.attention import Attention
from rwkvx_jax.modules.token_shift import last_valid, previous_token
from rwkvx_jax.training.expand import expand
from tests.helpers import assert_close
from tests.model_cases import TINY, random_params  # noqa: F401

CONFIG = dataclasses.replace(TINY, num_blocks=3, num_attention_blocks=1)
D, L, K = CONFIG.width, CONFIG.num_blocks, CONFIG.head_size


@pytest.fixture(scope="module", params=["rwkvx", "rwkv_lm"])
def fresh(request):
    config = dataclasses.replace(CONFIG, init=request.param)
    return request.param, jax.jit(lambda: get_params(create_model(config)))()


def expected_vectors(family, layer):
    """The table of initial values, for one layer."""
    n = np.arange(D)
    ddd, position, lin = n / D, n / (D - 1), n / (D - 1) - 0.5
    r01, r10 = layer / (L - 1), 1 - layer / L
    z = ((n % K) - (K - 1) / 2) / ((K - 1) / 2)
    zig = z * np.abs(z)
    both = {
        "x_r": 1 - ddd ** (0.2 * r10),
        "x_g": 1 - ddd ** (0.2 * r10),
        "x_w": 1 - ddd ** (0.9 * r10),
        "x_a": 1 - ddd ** (0.9 * r10),
    }
    ones = np.ones(D)
    if family == "rwkvx":
        return both | {
            "x_k": 1 - (ddd ** (0.9 * r10) + 0.4 * r01),
            "x_v": 1 - (ddd ** (0.4 * r10) + 0.6 * r01),
            "w0": -7 + 5 * position ** (0.85 + r01**0.5) + 0.5,
            "a0": 0 * ones,
            "v0": ones,
            "k_k": 0.85 * ones,
            "k_a": ones,
            "r_k": np.zeros((D // K, K)),
        }
    return both | {
        "x_k": 1 - ddd ** (0.7 * r10),
        "x_v": 1 - ddd ** (0.7 * r10),
        "w0": -6 + 6 * position ** (1 + r01**0.3) + 0.5 + 2.5 * zig,
        "a0": -0.19 + 0.3 * zig + 0.4 * lin,
        "v0": 0.73 - 0.4 * lin,
        "k_k": 0.71 - 0.1 * lin,
        "k_a": 1.02 * ones,
        "r_k": np.full((D // K, K), -0.04),
    }


def test_vectors_follow_the_table(fresh):
    family, params = fresh
    for layer in range(L):
        for name, expected in expected_vectors(family, layer).items():
            found = params["blocks"]["time_mix"][name][layer]
            assert np.abs(found - expected).max() < 2e-6, (name, layer)
        shift = 1 - (np.arange(D) / D) ** ((1 - layer / L) ** 4)
        found = params["blocks"]["channel_mix"]["x_k"][layer]
        assert np.abs(found - shift).max() < 2e-6
        scale = ((1 + layer) / L) ** 0.7 if family == "rwkv_lm" else 1.0
        assert_close(
            params["blocks"]["time_mix"]["ln_x"]["scale"][layer], np.full(D, scale), rel=1e-6
        )


def test_hand_computed_entries(fresh):
    """A few entries worked out on paper: layer 1 of 3, channel 8 of 32, heads of 16."""
    family, params = fresh
    mix = params["blocks"]["time_mix"]
    assert abs(mix["x_r"][1, 8] - 0.168762) < 1e-5  # 1 - 0.25^(2/15)
    if family == "rwkvx":
        assert abs(mix["x_k"][1, 8] - 0.364725) < 1e-5  # 1 - (0.25^0.6 + 0.2)
        assert abs(mix["w0"][1, 0] + 6.5) < 1e-6
        assert abs(mix["w0"][1, 31] + 1.5) < 1e-6
    else:
        assert abs(mix["w0"][1, 0] + 8.0) < 1e-5  # -6 + 0.5 - 2.5
        assert abs(mix["w0"][1, 31] - 3.0) < 1e-5  # -6 + 6 + 0.5 + 2.5
        assert abs(mix["a0"][1, 31] - 0.31) < 1e-6


def test_matrices_follow_the_table(fresh):
    family, params = fresh
    mix, channel = params["blocks"]["time_mix"], params["blocks"]["channel_mix"]
    gram = lambda matrix: np.asarray(
        matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    )
    for name in ("output",):
        assert not np.any(mix[name]) and not np.any(channel["value"])
        assert not np.any(params["attention_blocks"]["attention"][name])
    for pair in "wavg":
        assert not np.any(mix[pair + "1"])
        second = mix[pair + "2"][1]
        assert np.abs(gram(second) - 0.01 * np.eye(len(gram(second)))).max() < 1e-6, pair
    bounds = {"receptance": 0.5, "key": 0.05, "value": 0.5}
    gains = {"receptance": 1.0, "key": 0.1, "value": 1.0}
    for name in bounds:
        matrix = mix[name][1]
        if family == "rwkvx":
            bound = bounds[name] * D**-0.5
            assert 0.9 * bound < np.abs(matrix).max() <= bound, name
        else:
            assert np.abs(gram(matrix) - gains[name] ** 2 * np.eye(D)).max() < 1e-5, name
    if family == "rwkv_lm":
        assert np.abs(gram(channel["key"][0]) - np.eye(D)).max() < 1e-5
    head = params["head"]["weight"]  # [32, 40]: W > D
    assert np.abs(gram(head) - 0.25 * 40 / 32 * np.eye(D)).max() < 1e-5
    assert 0.9e-4 < np.abs(params["embed"]).max() <= 1e-4
    assert np.any(mix["receptance"][0] != mix["receptance"][1])  # layers differ


def test_token_shift_and_last_valid_row():
    h = jnp.arange(12.0).reshape(2, 3, 2)
    shift = jnp.full((2, 2), -1.0)
    assert_close(previous_token(h, shift)[:, 0], shift, rel=0)
    assert_close(previous_token(h, None)[:, 1:], h[:, :-1], rel=0)
    found = last_valid(h, shift, jnp.asarray([2, 0]))
    assert_close(found, [[2.0, 3.0], [-1.0, -1.0]], rel=0)


@pytest.mark.thorough
def test_copied_blocks_are_those_before_them():
    config = dataclasses.replace(TINY, attention_init="copy")
    plain = random_params(config.without_attention())
    new = expand(plain, config)["attention_blocks"]
    for j, source in enumerate([1, 3]):  # of 4 RWKV-7 blocks, 2 before each attention block
        for name in ("receptance", "key", "value", "output"):
            assert np.array_equal(
                new["attention"][name][j], plain["blocks"]["time_mix"][name][source]
            )
        for name in ("key", "value"):
            assert np.array_equal(
                new["channel_mix"][name][j], plain["blocks"]["channel_mix"][name][source]
            )
        assert np.all(new["ln1"]["scale"][j] == 1) and np.all(new["ln1"]["bias"][j] == 0)


def test_copied_blocks_can_be_given_away_with_their_sources():
    """With an attention block after each RWKV-7 block the copy is of everything, yet a copy."""
    config = dataclasses.replace(TINY, attention_init="copy", num_attention_blocks=TINY.num_blocks)
    params = jax.tree.map(jnp.asarray, random_params(config.without_attention()))
    hybrid = expand(params, config)
    expected = jax.tree.map(np.array, hybrid)
    given_away = jax.jit(lambda params: jax.tree.map(jnp.negative, params), donate_argnums=0)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, -y), given_away(hybrid), expected)


@pytest.mark.slow
def test_aligned_blocks_look_for_what_came_after():
    config = dataclasses.replace(TINY, attention_init="aligned", key_conv=3)
    block = create_model(config).attention_blocks.attention
    assert np.array_equal(block.key[...], block.receptance[...]) and np.any(block.key[...])
    assert not np.any(block.output[...])  # so that expansion changes nothing
    new = expand(random_params(config.without_attention()), config)["attention_blocks"]
    for name in ("receptance", "key", "key_conv"):
        assert np.array_equal(new["attention"][name], getattr(block, name)[...])

    # Twelve different tokens, number 5 of them again at the end.
    rng = np.random.default_rng(0)
    h = rng.standard_normal((1, 13, config.width)).astype(np.float32)
    h[:, 12] = h[:, 5]
    attention = Attention(config, nnx.Rngs(0))
    q, k, _, _ = attention.project(jnp.asarray(h))
    scores = np.einsum("hk,thk->th", q[0, 12], k[0]).sum(1)
    assert set(np.argsort(-scores[:12])[:2]) == {5, 6}  # itself and what followed
    # One tap is that of the token itself: nothing to set.
    assert not np.any(Attention(dataclasses.replace(config, key_conv=1), nnx.Rngs(0)).key_conv[...])


@pytest.mark.thorough
def test_zero_expansion_keeps_every_bit_of_the_logits():
    from rwkvx_jax.model import abstract_model, with_params
    from tests.model_cases import FLOAT32

    plain = random_params(TINY.without_attention())
    hybrid = expand(plain, TINY)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 30))
    logits = []
    for config, params in ((TINY.without_attention(), plain), (TINY, hybrid)):
        model = abstract_model(config, FLOAT32)
        apply = jax.jit(lambda params, model=model: with_params(model, params)(tokens))
        logits.append(np.asarray(apply(params)))
    assert logits[0].tobytes() == logits[1].tobytes()


def test_expanding_twice_or_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="already have attention blocks"):
        expand(random_params(TINY), TINY)
    with pytest.raises(ConfigError, match="num_attention_blocks is 0"):
        expand({}, TINY.without_attention())


def test_key_convolution_is_the_identity_at_first_and_learns():
    config = dataclasses.replace(TINY, num_blocks=1, num_attention_blocks=1)
    h = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, config.width)), jnp.float32)

    def project(width):
        attention = Attention(dataclasses.replace(config, key_conv=width), nnx.Rngs(0))
        return attention, attention.project(h)

    (_, plain), (attention, convolved) = project(0), project(3)
    assert attention.key_conv.shape == (3, config.width)
    for without, with_it in zip(plain[:3], convolved[:3], strict=True):
        np.testing.assert_array_equal(without, with_it)
    graphdef, state = nnx.split(attention)
    loss = lambda state: nnx.merge(graphdef, state).project(h)[1].sum()
    grads = jax.grad(loss)(state)["key_conv"][...]
    keys = np.asarray(plain[1]).reshape(12, -1)
    expected = [keys[: 12 - j].sum(0) for j in range(3)]
    assert_close(grads, expected, rel=1e-5)

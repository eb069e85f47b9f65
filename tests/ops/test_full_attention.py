"""Dense causal attention: the blocked form against the quadratic oracle, lengths and offsets that
do not fit its blocks, and the TPU kernel interpreted and lowered on the CPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops import blocked_attention, dispatch
from rwkvx_jax.ops import full_attention as module
from rwkvx_jax.ops.full_attention import _splash_attention, full_attention
from tests.helpers import assert_close
from tests.ops.attention_cases import compare, jaxpr_shapes, random_qkv, value_and_gradients


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks at small lengths."""
    monkeypatch.setattr(blocked_attention, "MAX_BLOCK", 16)


def attend(implementation, **options):
    return functools.partial(full_attention, implementation=implementation, **options)


def check(qkv, q_offset=0, window=None, **tolerances):
    """The blocked form against the reference."""
    runs = [
        value_and_gradients(
            lambda q, k, v, o, name=name: attend(name, q_offset=o, window=window)(q, k, v)
        )
        for name in ("blocked", "reference")
    ]
    compare(*(run(*qkv, q_offset) for run in runs), **tolerances)


def test_oracle_follows_the_definition():
    q, k, v = random_qkv(0, 2, 5, 11, values=3)
    offsets = [2, 6]
    actual = full_attention(
        q, k, v, q_offset=jnp.array(offsets), scale=0.3, implementation="reference"
    )
    for b, t, h in np.ndindex(2, 5, 2):
        seen = offsets[b] + t + 1
        weight = np.exp(0.3 * np.asarray(k)[b, :seen, h] @ np.asarray(q)[b, t, h])
        expected = weight @ np.asarray(v)[b, :seen, h] / weight.sum()
        assert_close(actual[b, t, h], expected, rel=1e-5)


@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_matches_oracle(small_blocks, length):
    check(random_qkv(length, 2, length))


def test_matches_oracle_at_full_blocks():
    check(random_qkv(0, 1, 1000))


@pytest.mark.parametrize("offset", [0, 5, 48, 55, [16, 37]])
def test_queries_in_the_middle(small_blocks, offset):
    check(random_qkv(1, 2, 45, 100, values=8), jnp.asarray(np.broadcast_to(offset, 2)))


@pytest.mark.parametrize(
    "window", [19, *(pytest.param(w, marks=pytest.mark.thorough) for w in (1, 200))]
)
def test_a_window_is_that_of_the_definition(small_blocks, window):
    check(random_qkv(1, 2, 45, 100, values=8), jnp.array([16, 55]), window=window)
    q, k, v = random_qkv(0, 1, 30, heads=1)
    seen = np.tril(np.triu(np.ones((30, 30)), 1 - window))
    weights = np.exp(0.25 * np.asarray(q)[0, :, 0] @ np.asarray(k)[0, :, 0].T) * seen
    expected = weights @ np.asarray(v)[0, :, 0] / weights.sum(1, keepdims=True)
    oracle = attend("reference", window=window, scale=0.25)(q, k, v)
    assert_close(oracle[0, :, 0], expected, rel=1e-5)


def test_loops_of_a_window_are_as_short_as_it():
    """What the planner takes for their length, in a text of 32 blocks."""
    run = attend("blocked", window=512)
    gradient = lambda *qkv: jax.grad(lambda q: run(q, *qkv[1:]).sum())(qkv[0])
    qkv = [jax.ShapeDtypeStruct((1, 16384, 1, 8), jnp.float32)] * 3
    for function in (run, gradient):
        text = jax.jit(function).lower(*qkv).as_text(debug_info=True)
        bounds = {int(n) for n in re.findall(r"at_most_(\d+)_times", text)}
        assert bounds and max(bounds) <= 4


@pytest.mark.parametrize("window", [0, 2.0])
def test_what_is_no_window_is_refused(window):
    with pytest.raises(ValueError, match="pass a positive Python int"):
        full_attention(*random_qkv(0, 1, 8), window=window)


@pytest.mark.slow
@pytest.mark.parametrize("length, keys, offset", [(45, 100, 16), (3, 90, 80), (90, 90, 0)])
def test_traced_offset(small_blocks, length, keys, offset):
    check(random_qkv(2, 2, length, keys, values=5), jnp.int32(offset))


def test_bfloat16(small_blocks):
    check(random_qkv(3, 1, 100, dtype=jnp.bfloat16), forward=1e-2, gradient=2e-2)


def test_large_scores_stay_finite(small_blocks):
    q, k, v = random_qkv(4, 1, 60)
    check((10 * q, 10 * k, v))


def test_causality_by_gradient(small_blocks):
    qkv = random_qkv(5, 1, 40)
    run = attend("blocked")
    dq, dk, dv = jax.grad(lambda q, k, v: run(q, k, v)[:, 20].sum(), (0, 1, 2))(*qkv)
    assert np.abs(np.asarray(dk)[:, 21:]).max() == np.abs(np.asarray(dv)[:, 21:]).max() == 0
    assert np.abs(np.asarray(dv)[:, :21]).min() > 0
    assert np.abs(np.delete(np.asarray(dq), 20, axis=1)).max() == 0


def test_under_vmap(small_blocks):
    qkv = random_qkv(6, 6, 40)

    def run(q, k, v):
        out, pullback = jax.vjp(attend("blocked"), q, k, v)
        return out, *pullback(out)

    expected = run(*qkv)
    actual = jax.vmap(run, 1, 1)(*(x.reshape(3, 2, *x.shape[1:]) for x in qkv))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.reshape(e.shape), e, rel=1e-6)


def test_no_quadratic_array():
    qkv = [jax.ShapeDtypeStruct((1, 16384, 1, 8), jnp.float32)] * 3

    def run(q, k, v):
        out, pullback = jax.vjp(attend("blocked"), q, k, v)
        return pullback(out)

    assert max(np.prod(shape) for shape in jaxpr_shapes(run, *qkv)) <= 512 * 512


@pytest.mark.parametrize(
    "length, keys, offset, window",
    [
        (256, 256, 0, None),
        (70, 200, 130, None),
        (70, 600, 530, 90),
        pytest.param(530, 530, 0, 40, marks=pytest.mark.thorough),
    ],
)
def test_splash_matches_oracle_when_interpreted(length, keys, offset, window):
    qkv = random_qkv(7, 1, length, keys, heads=1, size=64)
    options = {"q_offset": offset, "window": window}
    fast = functools.partial(_splash_attention, scale=0.125, interpret=True, **options)
    oracle = attend("reference", **options)
    compare(value_and_gradients(fast)(*qkv), value_and_gradients(oracle)(*qkv))


@pytest.mark.parametrize(
    "platform, change, choice",
    [
        ("cpu", {}, "blocked"),
        ("tpu", {}, "splash"),
        ("tpu", dict(dtype=jnp.float32), "blocked"),
        ("tpu", dict(size=32), "blocked"),
        ("tpu", dict(q_offset=8), "splash"),
        ("tpu", dict(q_offset=jnp.int32(8)), "blocked"),
        ("gpu", {}, "cudnn"),
        ("gpu", dict(dtype=jnp.float32), "blocked"),
        ("gpu", dict(q_offset=8), "blocked"),
        ("gpu", dict(keys=24), "blocked"),
        ("gpu", dict(size=12), "blocked"),
    ],
)
def test_choice_by_platform(monkeypatch, platform, change, choice):
    case = dict(dtype=jnp.bfloat16, size=64, keys=16, q_offset=0) | change
    q_offset = case.pop("q_offset")
    if isinstance(q_offset, jax.Array) or q_offset:
        case["keys"] = 24
    q, k, v = random_qkv(8, 1, 16, **case)
    chosen = []
    monkeypatch.setattr(dispatch, "current_platform", lambda: platform)

    def record(name, q, k, v, **kwargs):
        chosen.append(name)
        return q

    for name in module._IMPLEMENTATIONS:
        monkeypatch.setitem(module._IMPLEMENTATIONS, name, functools.partial(record, name))
    full_attention(q, k, v, q_offset=q_offset)
    assert chosen == [choice]


@pytest.mark.parametrize("length", [64, 1000, 4096])
def test_splash_lowers_for_tpu(length):
    x = jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(_splash_attention(q, k, v, scale=0.125, q_offset=0).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") >= 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q_offset=1), "positions 1..8"),
        (dict(q_offset=-1), "q_offset is -1"),
        (dict(scale=0.0), "scale is 0.0"),
        (dict(implementation="fast"), "unknown implementation 'fast'"),
        (dict(implementation="splash"), "platform is cpu; use"),
    ],
)
def test_bad_arguments(change, message):
    x = jnp.zeros((2, 8, 2, 4))
    with pytest.raises(ValueError, match=message):
        full_attention(x, x, x, **change)

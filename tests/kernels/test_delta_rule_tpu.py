"""The delta rule's kernels for TPU, interpreted on a CPU, against a sequential oracle in float64.

The oracle runs on the very inputs the kernel gets (rounded to bfloat16 where those are). Cases are
deliberately unround: odd numbers of heads, T around and off multiples of the chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule_tpu import generalized_delta_rule, unsupported_reason
from pallas_kernels.recurrence_tpu import TileConfig
from tests.helpers import assert_close

NAMES = ("r", "log_w", "k", "v", "a", "b", "state")
SMALL = TileConfig(chunk=16, max_packs=1, max_items=2)


def make_inputs(decay, *, delta=True, key=32, value=32, time=37, heads=1, dtype="float32", seed=0):
    """Inputs, a and b None if not delta, and cotangents, as numpy arrays.

    decay: a function (generator, [B, T, H]) -> log decays [B, T, H, 1 or K].
    """
    rng = np.random.default_rng(seed)
    lead = 1, time, heads

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    r, k = unit(rng.standard_normal((*lead, key))), unit(rng.standard_normal((*lead, key)))
    v = rng.standard_normal((*lead, value))
    beta = 1 / (1 + np.exp(-rng.standard_normal((*lead, 1))))
    a, b = (-k, k * beta) if delta else (None, None)
    state = rng.standard_normal((1, heads, value, key))
    log_w = np.float32(decay(rng, lead))
    tokens = [None if x is None else jnp.asarray(x, dtype) for x in (r, k, v, a, b)]
    dy = jnp.asarray(rng.standard_normal(v.shape), dtype)
    d_end = np.float32(rng.standard_normal(state.shape))
    return (tokens[0], log_w, *tokens[1:], np.float32(state)), (dy, d_end)


def constant(value, channels=1):
    return lambda rng, lead: np.full((*lead, channels), value)


def spread(least, channels):
    """Log decays from -1e-4 to `least`, evenly in their logarithm."""
    return lambda rng, lead: -np.exp(rng.uniform(np.log(1e-4), np.log(-least), (*lead, channels)))


def with_resets(reset, decay):
    """A decay that now and then forgets everything: at the first token, twice in a row, later."""

    def make(rng, lead):
        log_w = decay(rng, lead)
        log_w[:, [0, 5, 6, lead[1] // 2, lead[1] - 3]] = reset
        return log_w

    return make


def sequential(r, log_w, k, v, a, b, state, *, before):
    """Token by token, [B, T, H, ..]."""

    def step(state, xs):
        r, w, k, v, a, b = xs
        old = state
        state = old * jnp.exp(w)[..., None, :] + v[..., :, None] * k[..., None, :]
        if a is not None:
            removed = jnp.einsum("bhvk,bhk->bhv", old, a)
            state = state + removed[..., :, None] * b[..., None, :]
        return state, jnp.einsum("bhvk,bhk->bhv", old if before else state, r)

    time_first = [None if x is None else x.swapaxes(0, 1) for x in (r, log_w, k, v, a, b)]
    end, y = jax.lax.scan(step, state, tuple(time_first))
    return y.swapaxes(0, 1), end


@functools.lru_cache
def with_gradients(function, **options):
    """Jitted (inputs, cotangents) -> (y, final state), gradients."""

    @jax.jit
    def run(inputs, cotangents):
        outputs, pull = jax.vjp(functools.partial(function, **options), *inputs)
        return outputs, pull(cotangents)

    return run


def oracle(inputs, cotangents, *, before):
    """(y, final state), gradients in float64."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (inputs, cotangents))
        return jax.tree.map(np.asarray, with_gradients(sequential, before=before)(*exact))


def kernel(inputs, cotangents, **options):
    return with_gradients(generalized_delta_rule, **options)(inputs, cotangents)


def check(decay, rel=1e-5, *, read="after", tile=SMALL, decay_bound=None, interpret=None, **sizes):
    inputs, cotangents = make_inputs(decay, **sizes)
    if interpret is None:  # True is quicker, but wrong in bfloat16 with many chunks a grid step
        interpret = pltpu.InterpretParams() if inputs[0].dtype == jnp.bfloat16 else True
    options = {"read": read, "tile": tile, "decay_bound": decay_bound, "interpret": interpret}
    (y, end), grads = kernel(inputs, cotangents, **options)
    (y0, end0), grads0 = oracle(inputs, cotangents, before=read == "before")
    assert y.dtype == inputs[3].dtype and end.dtype == jnp.float32
    assert_close(y, y0, rel=rel, name="y")
    assert_close(end, end0, rel=rel, name="final state")
    for name, x, grad, grad0 in zip(NAMES, inputs, grads, grads0, strict=True):
        if x is not None:
            assert grad.dtype == x.dtype, name
            assert_close(grad, grad0, rel=rel, name=f"gradient of {name}")


DECAYS = {
    "-1e-4": constant(-1e-4),
    "-0.6": constant(-0.6),
    "-5": constant(-5.0),
    "-20": constant(-20.0),
    "reset -1e4": with_resets(-1e4, constant(-1e-3)),
    "reset -inf": with_resets(-np.inf, constant(-1e-3)),
}


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
def test_scalar_decays(decay, delta):
    check(DECAYS[decay], delta=delta, rel=2e-5 if decay == "-20" else 1e-5)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(
    "key, value", [pytest.param(32, 96, marks=pytest.mark.thorough), (64, 32), (128, 64)]
)
def test_scalar_sizes(key, value, delta):
    check(spread(-2.0, 1), key=key, value=value, heads=3, delta=delta)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("channels", [1, 32])
def test_read_before(channels, delta):
    bound = -5.0 if channels > 1 else None
    check(spread(-5.0, channels), read="before", delta=delta, decay_bound=bound)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("decay, rel", [(constant(-5.0, 32), 2e-5), (spread(-5.0, 32), 1e-5)])
def test_bounded_vector_decays(decay, rel, delta):
    """Two blocks of 16 tokens a chunk, undone inside and multiplied up across. Where all decays are
    e^-5, gradients of log_w are as small, beside pairs without a decay that cancel."""
    tile = TileConfig(chunk=32, max_items=1)
    check(decay, rel, delta=delta, decay_bound=-5.0, tile=tile, time=70)


@pytest.mark.parametrize(
    "decay", [spread(-5.0, 32), constant(-20.0, 32), with_resets(-np.inf, spread(-1.0, 32))]
)
def test_unbounded_vector_decays(decay):
    check(decay, rel=2e-5)


@pytest.mark.parametrize("channels", [1, 32])
def test_a_gradient_at_minus_infinity_is_zero(channels):
    inputs, cotangents = make_inputs(with_resets(-np.inf, constant(-0.1, channels)))
    _, grads = kernel(inputs, cotangents, tile=SMALL, interpret=True)
    assert np.all(np.asarray(grads[1])[np.isinf(inputs[1])] == 0)
    assert all(np.isfinite(np.asarray(x)).all() for x in grads)


def test_small_decays_after_a_reset_keep_their_precision():
    """y reads one early key: only decays matter. A difference of sums would lose 1e-3 in 1e4."""
    inputs, _ = make_inputs(constant(-1e-3), time=20, delta=False)
    r, log_w, k, v = (np.array(x) for x in inputs[:4])
    log_w[:, 2] = -1e4
    r[:], k[:] = 0, 0
    r[..., 0], k[:, 3, :, 0] = 1, 1
    y, _ = generalized_delta_rule(r, log_w, k, v, tile=TileConfig(chunk=32), interpret=True)
    expected = v[0, 3, 0] * np.exp(-1e-3 * (np.arange(3, 20) - 3))[:, None]
    np.testing.assert_allclose(y[0, 3:, 0], expected, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(
    "decay, bound",
    [
        (spread(-5.0, 1), None),
        (spread(-5.0, 64), -5.0),
        (constant(-5.0, 64), -5.0),
        (spread(-20.0, 64), None),
    ],
)
def test_bfloat16(decay, bound, delta):
    """Four chunks a grid step. Rounding cancels where it must: see the gradient of log_w at -5."""
    tile = TileConfig(chunk=32, max_packs=1, max_items=4)
    sizes = {"key": 64, "value": 64, "heads": 2, "time": 128, "dtype": "bfloat16"}
    check(decay, 2e-2, delta=delta, decay_bound=bound, tile=tile, **sizes)


@pytest.mark.thorough
def test_tpu_semantics():
    """NaN in memory nobody wrote, and no two accesses that race, on two cores."""
    interpret = pltpu.InterpretParams(
        uninitialized_memory="nan", detect_races=True, num_cores_or_threads=2
    )
    tile = TileConfig(chunk=16, max_packs=1, max_items=2, cores=2)
    check(spread(-1.0, 1), key=32, value=64, heads=5, interpret=interpret, tile=tile)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("channels", [1, 128])
def test_any_length(channels, delta, time):
    bound = -5.0 if channels > 1 else None
    check(
        spread(-5.0, channels),
        key=128,
        value=128,
        heads=2,
        delta=delta,
        time=time,
        decay_bound=bound,
        tile=TileConfig(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype, rel", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("key, value", [(96, 160), (256, 256), (192, 64), (224, 32)])
@pytest.mark.parametrize("channels", [1, None])
def test_other_sizes(channels, key, value, dtype, rel):
    check(
        spread(-5.0, channels or key),
        rel,
        key=key,
        value=value,
        heads=3,
        dtype=dtype,
        decay_bound=None if channels else -5.0,
        tile=TileConfig(),
        time=70,
    )


@pytest.mark.slow
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("channels", [1, 128])
def test_chunks_of_128(channels, delta):
    bound = -5.0 if channels > 1 else None
    tile = TileConfig(chunk=128, max_packs=1, max_items=2)
    sizes = {"key": 128, "value": 128, "time": 150}
    check(spread(-5.0, channels), delta=delta, decay_bound=bound, tile=tile, **sizes)


def test_missing_state_is_zeros():
    inputs, _ = make_inputs(spread(-1.0, 1), time=20)
    run = functools.partial(generalized_delta_rule, tile=SMALL, interpret=True)
    y, end = run(*inputs[:6])
    y0, end0 = run(*inputs[:6], np.zeros_like(inputs[6]))
    assert_close(y, y0, rel=0.0)
    assert_close(end, end0, rel=0.0)


def test_a_bound_changes_no_result():
    inputs, cotangents = make_inputs(spread(-2.0, 32))
    one, other = (
        kernel(inputs, cotangents, tile=SMALL, interpret=True, decay_bound=bound)
        for bound in (None, -2.0)
    )
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert_close(x, y, rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": 48}, "key size 48"),
        ({"value": 288}, "value size 288"),
        ({"dtype": "float16"}, "float16"),
        ({"decay_bound": 1.0}, "decay_bound 1.0"),
    ],
)
def test_unsupported_reasons(change, message):
    given = {"key": 128, "value": 64, "dtype": "bfloat16", "decay_bound": -5.0} | change
    key, value, dtype, bound = given.values()
    reason = unsupported_reason(key, value, dtype, scalar=False, decay_bound=bound)
    assert message in reason
    assert unsupported_reason(128, 64, "float32", scalar=True, decay_bound=None) is None
    assert unsupported_reason(128, 64, "float32", scalar=False, decay_bound=None) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {"b": None}, "a and b must both"),
        (lambda x: {"read": "never"}, "'never'"),
        (lambda x: {"k": x["k"][:, :3]}, "k has shape"),
        (lambda x: {"v": x["v"][:, :3]}, "v has shape"),
        (lambda x: {"log_w": x["log_w"][..., :1, :]}, "log_w has shape"),
        (lambda x: {"v": x["v"].astype(jnp.bfloat16)}, "share a dtype"),
        (lambda x: {"state": x["state"][:, :, :3]}, "state has shape"),
        (lambda x: {"r": x["r"][..., :31]}, "key size 31"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs, _ = make_inputs(spread(-1.0, 1), time=5, heads=2)
    given = dict(zip(NAMES, inputs, strict=True))
    with pytest.raises(ValueError, match=message):
        generalized_delta_rule(**(given | change(given)))

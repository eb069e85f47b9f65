"""WKV-7: the oracle against a loop in float64, every other form against the oracle.

Values and final state to 1e-5, gradients of all seven inputs to 1e-4 of the largest entry, on
lengths that fill no chunk and on inputs made to hurt.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.ops import dispatch, recurrence
from rwkvx_jax.ops.recurrence import segment_map, wkv7, wkv7_sequential
from rwkvx_jax.ops.recurrence_chunked import MAX_EXPONENT, wkv7_chunked
from rwkvx_jax.ops.segments import CHUNK_SIZE, Plan
from tests.helpers import assert_close, assert_within

NAMES = ("r", "log_w", "k", "v", "a", "b", "state")
STRONGEST = -np.exp(-0.5)
# One compilation a length and form serves all kinds of input.
KINDS = ("random", "strongest_decay", "repeated_keys", "zero_keys", "mixed")
SHAPES = {1: (16, 16), 7: (16, 16), 64: (8, 12), 200: (16, 16), 1000: (16, 16)}  # T: K, V
ALL_AT_ONCE = Plan(64, 8, False, jax.lax.Precision.HIGHEST)  # as accelerators cut the work

FORMS = {
    "chunked": functools.partial(wkv7, implementation="chunked"),
    "associative": functools.partial(wkv7, implementation="associative", chunk_size=16),
    "segments": functools.partial(wkv7_chunked, plan=ALL_AT_ONCE),
    "token_maps": functools.partial(wkv7, implementation="associative", chunk_size=1),
}


def make_inputs(kind, time, *, batch=1, heads=3, keys=16, values=16, seed=0):
    """Inputs as RWKV-7 makes them (unit kk, iclr in (0, 1)), bent towards one extreme."""
    rng = np.random.default_rng([seed, time])

    def normal(*shape):
        return rng.standard_normal((batch, time, heads, *shape))

    r, k, v, kk = normal(keys), normal(keys), normal(values), normal(keys)
    iclr = 1 / (1 + np.exp(-normal(keys)))
    log_w = STRONGEST / (1 + np.exp(-2 * normal(keys)))
    if kind == "strongest_decay":
        log_w = np.full_like(log_w, STRONGEST)
    elif kind == "repeated_keys":  # what breaks inverses that form powers: a run of equal tokens
        kk = np.broadcast_to(kk[:, :1], kk.shape) + 1e-3 * kk
        # Not one decay for all: the rounding of exp(log_w) would then add up in the oracle.
        iclr, log_w = np.full_like(iclr, 0.999), 2e-4 * log_w
    elif kind == "zero_keys":  # as padding and dead channels give
        kk, k = np.where(normal(1) > 0, kk, 0), np.where(normal(1) > 0, k, 0)
    elif kind == "mixed":  # a stretch of each, neighbours in one chunk
        third = np.arange(time)[None, :, None, None] * 3 // time
        log_w = np.choose(third, [STRONGEST, 2e-4 * log_w, log_w])
        kk = np.where(third == 1, kk[:, :1], kk)
        iclr = np.where(third == 1, 0.999, iclr)
    kk = kk / np.maximum(np.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
    state = rng.standard_normal((batch, heads, values, keys))
    return [np.asarray(x, np.float32) for x in (r, log_w, k, v, -kk, kk * iclr, state)]


def numpy_loop(r, log_w, k, v, a, b, state):
    """The definition, in float64."""
    r, log_w, k, v, a, b, state = (np.asarray(x, np.float64) for x in (r, log_w, k, v, a, b, state))
    y, state = np.zeros(v.shape), state.copy()
    for n in range(r.shape[0]):
        for h in range(r.shape[2]):
            for t in range(r.shape[1]):
                s = state[n, h]
                s = (
                    s @ np.diag(np.exp(log_w[n, t, h]))
                    + np.outer(s @ a[n, t, h], b[n, t, h])
                    + np.outer(v[n, t, h], k[n, t, h])
                )
                y[n, t, h], state[n, h] = s @ r[n, t, h], s
    return y, state


def with_gradients(form):
    """jit of (inputs, cotangents) -> (y, final state), gradients of the seven inputs."""

    def run(inputs, cotangents):
        outputs, pull_back = jax.vjp(form, *inputs)
        return outputs, pull_back(cotangents)

    return jax.jit(run)


ORACLE = with_gradients(wkv7_sequential)
COMPILED = {name: with_gradients(form) for name, form in FORMS.items()}


def cotangents_for(inputs, dtype=np.float32):
    rng = np.random.default_rng(9)
    *_, v, _, _, state = inputs
    return (
        rng.standard_normal(v.shape).astype(dtype),
        rng.standard_normal(state.shape).astype(np.float32),
    )


def assert_same(actual, expected, *, values=1e-5, gradients=1e-4):
    for name, x, y in zip(("y", "final state"), actual[0], expected[0], strict=True):
        assert_close(x, y, rel=values, name=name)
    for name, x, y in zip(NAMES, actual[1], expected[1], strict=True):
        assert_close(x, y, rel=gradients, name=f"gradient of {name}")


def compare(form, inputs):
    cotangents = cotangents_for(inputs)
    assert_same(form(inputs, cotangents), ORACLE(inputs, cotangents))


# ------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_matches_a_loop_in_float64(kind):
    inputs = make_inputs(kind, 60, batch=2, heads=2, keys=8, values=12)
    y, state = wkv7(*inputs, implementation="sequential")
    expected = numpy_loop(*inputs)
    assert y.dtype == state.dtype == jnp.float32
    assert_close(y, expected[0], rel=1e-6, name="y")
    assert_close(state, expected[1], rel=1e-6, name="final state")


# ------------------------------------------------------------------------ other forms against it


@pytest.mark.parametrize("time", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked(kind, time):
    keys, values = SHAPES[time]
    compare(COMPILED["chunked"], make_inputs(kind, time, keys=keys, values=values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["associative", "segments"])
def test_associative_and_segments(form, kind):
    compare(COMPILED[form], make_inputs(kind, 200))


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["associative", "segments"])
def test_associative_and_segments_at_other_lengths(form, kind, time):
    compare(COMPILED[form], make_inputs(kind, time))


@pytest.mark.parametrize("kind", KINDS)
def test_token_maps_agree_with_chunk_maps(kind):
    inputs = make_inputs(kind, 20)
    cotangents = cotangents_for(inputs)
    token_maps = COMPILED["token_maps"](inputs, cotangents)
    assert_same(token_maps, ORACLE(inputs, cotangents))
    assert_same(token_maps, COMPILED["associative"](inputs, cotangents))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 2, 8, 32, 64, 128])
def test_every_chunk_size(chunk_size, kind):
    form = functools.partial(wkv7, implementation="chunked", chunk_size=chunk_size)
    compare(with_gradients(form), make_inputs(kind, 300, heads=2, keys=64, values=64))


def test_no_state_means_zeros():
    *inputs, state = make_inputs("random", 20)
    without, given = wkv7(*inputs), wkv7(*inputs, jnp.zeros_like(state))
    for x, y in zip(without, given, strict=True):
        np.testing.assert_array_equal(x, y)


def test_pieces_give_what_the_whole_gives():
    *inputs, state = make_inputs("random", 69)
    whole = wkv7(*inputs, state)
    outputs = []
    for piece in (slice(0, 23), slice(23, 46), slice(46, 69)):
        y, state = wkv7(*(x[:, piece] for x in inputs), state)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1), whole[0], rel=1e-5, name="y")
    assert_close(state, whole[1], rel=1e-5, name="final state")


def test_bfloat16():
    """16-bit inputs, against the oracle on the same rounded values; states are float32."""
    *inputs, state = make_inputs("random", 200)
    r, log_w, *rest = (jnp.asarray(x, jnp.bfloat16) for x in inputs)
    inputs = [r, log_w.astype(jnp.float32), *rest, state]
    cotangents = cotangents_for(inputs, jnp.bfloat16)
    actual, expected = COMPILED["chunked"](inputs, cotangents), ORACLE(inputs, cotangents)
    assert actual[0][0].dtype == jnp.bfloat16 and actual[0][1].dtype == jnp.float32
    assert [g.dtype for g in actual[1]] == [x.dtype for x in inputs]
    one_rounding = 2**-8
    assert_close(actual[0][0], expected[0][0], rel=one_rounding, name="y")
    assert_close(actual[0][1], expected[0][1], rel=1e-5, name="final state")
    for name, x, y in zip(NAMES, actual[1], expected[1], strict=True):
        rel = 1e-4 if x.dtype == jnp.float32 else one_rounding
        assert_close(x, y, rel=rel, name=f"gradient of {name}")


@pytest.mark.parametrize("form", ["chunked", "associative", "segments"])
def test_causality(form):
    """y_t depends on every token up to t and on none after it, inside a chunk and across chunks."""
    *inputs, state = make_inputs("random", 40)

    @jax.jit
    def gradients(t):
        return jax.grad(lambda x: FORMS[form](*x, state)[0][:, t].sum())(inputs)

    for t in (0, 5, 21, 37):
        for name, gradient in zip(NAMES, gradients(t), strict=False):
            by_time = np.abs(np.asarray(gradient)).max(axis=(0, 2, 3))
            assert (by_time[t + 1 :] == 0).all(), f"y[{t}] reads {name} of later tokens"
            if name == "r":  # only the own receptance reads
                assert (by_time[:t] == 0).all() and by_time[t] > 0
            elif name in ("k", "v"):
                assert (by_time[: t + 1] > 0).all(), f"y[{t}] misses {name} of earlier tokens"


# --------------------------------------------------------------------- maps between segments


@pytest.mark.parametrize("implementation", ["chunked", "associative"])
def test_segment_maps_compose(implementation):
    """(M1, G1) and then (M2, G2) is the map of both; applied to a state it is the recurrence."""
    *inputs, state = make_inputs("random", 50, batch=2, values=24)
    to_map = functools.partial(segment_map, implementation=implementation)
    first = to_map(*(x[:, :25] for x in inputs[1:]))
    second = to_map(*(x[:, 25:] for x in inputs[1:]))
    m, g = first[0] @ second[0], first[1] @ second[0] + second[1]
    whole = to_map(*inputs[1:])
    assert_close(m, whole[0], rel=1e-5, name="M")
    assert_close(g, whole[1], rel=1e-5, name="G")
    _, end = wkv7(*inputs, state, implementation="sequential")
    assert_close(state @ m + g, end, rel=1e-5, name="final state")


# ------------------------------------------------------------------- inside transformations


def test_backward_keeps_inputs_and_states_only():
    *inputs, state = make_inputs("random", 256)
    inputs = [jnp.asarray(x) for x in inputs]
    _, pull_back = jax.vjp(FORMS["chunked"], *inputs, jnp.asarray(state))
    kept = sum(x.size for x in jax.tree.leaves(pull_back))
    states = (256 // CHUNK_SIZE["cpu"] + 2) * state.size  # and the first and the last
    assert kept <= sum(x.size for x in inputs) + states + 256


def test_remat_inside_a_scan_over_layers():
    """The op under jax.checkpoint in a scan, as the model runs it: same values and gradients."""
    layers = [make_inputs("random", 40, seed=s)[:6] for s in range(3)]
    stacked = [jnp.stack(x) for x in zip(*layers, strict=True)]

    def layer(form, x, inputs):
        r, log_w, k, v, a, b = inputs
        return x + form(r, log_w, k, v + x, a, b)[0], None

    def scanned(stacked):
        body = jax.checkpoint(functools.partial(layer, FORMS["chunked"]))
        return (jax.lax.scan(body, jnp.zeros_like(stacked[3][0]), stacked)[0] ** 2).sum()

    def unrolled(stacked):
        x = jnp.zeros_like(stacked[3][0])
        form = functools.partial(wkv7, implementation="sequential")
        for i in range(3):
            x, _ = layer(form, x, [s[i] for s in stacked])
        return (x**2).sum()

    actual, expected = (jax.jit(jax.value_and_grad(f))(stacked) for f in (scanned, unrolled))
    assert_close(actual[0], expected[0], rel=1e-5)
    for name, x, y in zip(NAMES, actual[1], expected[1], strict=False):
        assert_close(x, y, rel=1e-4, name=f"gradient of {name}")


def test_vmap():
    pair = (make_inputs("random", 20, seed=s) for s in (1, 2))
    inputs = [jnp.stack(x) for x in zip(*pair, strict=True)]
    run = with_gradients(jax.vmap(FORMS["chunked"]))
    cotangents = cotangents_for(inputs)
    expected = [ORACLE([x[i] for x in inputs], tuple(c[i] for c in cotangents)) for i in (0, 1)]
    assert_same(run(inputs, cotangents), jax.tree.map(lambda *x: jnp.stack(x), *expected))


# ------------------------------------------------------------------------------------- bad input


def bad(name, change):
    inputs = dict(zip(NAMES, make_inputs("random", 4), strict=True))
    inputs[name] = change(jnp.asarray(inputs[name]))
    return inputs


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "r",
            lambda x: x[0],
            r"r must be a non-empty \[B, T, heads, channels\], got the shape \(4, 3, 16\)",
        ),
        ("r", lambda x: x.astype(int), "r must be one of float32, bfloat16, float16, got int32"),
        (
            "k",
            lambda x: x[:, :3],
            r"k must be \[1, 4, 3, 16\] for r .*, got \(1, 3, 3, 16\)",
        ),
        ("v", lambda x: x[:, :, :2], "v has 2 heads and r has 3: those of v must be as many"),
        ("b", lambda x: x[..., :8], r"b must be \[1, 4, 3, 16\]"),
        (
            "a",
            lambda x: x.astype(jnp.bfloat16),
            "a must have the dtype of r, float32, got bfloat16",
        ),
        ("log_w", lambda x: x.astype(jnp.bfloat16), "log_w must have the dtype of r, float32 or"),
        ("state", lambda x: x[..., :8], r"state must be \[B, HV, V, K\] = \(1, 3, 16, 16\), got"),
        ("state", lambda x: x.astype(jnp.bfloat16), "state must be float32, got bfloat16; cast it"),
    ],
)
def test_bad_arrays_are_named(name, change, message):
    with pytest.raises(ValueError, match=f"wkv7: {message}"):
        wkv7(**bad(name, change))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"chunk_size": 24}, "chunk_size must be a power of two from 1 to 128, got 24"),
        ({"chunk_size": 256}, "chunk_size must be a power of two from 1 to 128, got 256"),
        ({"chunk_size": 0}, "chunk_size must be a power of two from 1 to 128, got 0"),
        (
            {"chunk_size": 16, "implementation": "sequential"},
            "chunk_size is for 'chunked' and 'associative'; 'sequential' has none",
        ),
        ({"implementation": "fast"}, "unknown implementation 'fast'; one of 'pallas', 'chunked'"),
        ({"implementation": "pallas"}, "'pallas' cannot run here: .*use 'chunked'"),
    ],
)
def test_bad_choices_say_what_to_use(arguments, message):
    with pytest.raises(ValueError, match=f"wkv7: .*{message}"):
        wkv7(*make_inputs("random", 4), **arguments)


def test_kernel_is_chosen_where_it_can_run(monkeypatch):
    """A kernel for the shapes that it takes, with packed documents or not; "chunked" for others."""
    x = lambda keys: np.zeros((1, 4, 2, keys), np.float32)
    for platform in ("tpu", "gpu"):
        monkeypatch.setattr(dispatch, "current_platform", lambda platform=platform: platform)
        for keys, chosen in ((64, "pallas"), (16, "chunked")):
            candidates = recurrence._candidates(x(keys), x(keys))
            assert dispatch.resolve("wkv7", None, candidates) == chosen


# ------------------------------------------------------------------------------- strong decays


def compare_strong(form, inputs):
    """As `compare`; what little gradient reaches a strong decay is a difference of large terms."""
    cotangents = cotangents_for(inputs)
    actual, expected = form(inputs, cotangents), ORACLE(inputs, cotangents)
    largest = float(jnp.abs(expected[1][0]).max())
    assert_within(actual[1][1], expected[1][1], 1e-5 * largest)
    assert_same((actual[0], (actual[1][0], expected[1][1], *actual[1][2:])), expected)


def decaying(log_w, time=300):
    inputs = make_inputs("random", time, heads=1, keys=8, values=8)
    inputs[1] = np.full_like(inputs[1], log_w)
    return inputs


@pytest.mark.parametrize(
    "implementation, size",
    [("chunked", 1), ("chunked", 16), ("chunked", 128), ("associative", 32)],
)
def test_decays_up_to_the_limit_are_exact(implementation, size):
    """Half a chunk's sum is what counts: at the limit all is exact, below it refused."""
    half = -(-size // 2)
    limit = -MAX_EXPONENT / half
    run = functools.partial(wkv7, implementation=implementation, chunk_size=size)
    inputs = decaying(limit * 0.999)
    wkv7(*inputs, implementation="sequential")
    compare_strong(with_gradients(run), inputs)
    message = rf"log_w goes down to {limit * 1.01:.4g}.* over {half} tokens; '{implementation}'"
    with pytest.raises(ValueError, match=message + ".*smaller chunk_size, or .*sequential"):
        run(*decaying(limit * 1.01))


def test_decays_that_cannot_be():
    with pytest.raises(ValueError, match="logarithm of a decay, at most 0, got 0.1: pass log"):
        wkv7(*decaying(0.1))
    with pytest.raises(ValueError, match="at most 0, got 0.1"):
        jax.jit(lambda r: wkv7(r, *decaying(0.1)[1:]))(decaying(0.1)[0])  # a constant of a program
    wkv7(*decaying(0.0, time=4))
    y, _ = wkv7(*decaying(-7.0, time=8), chunk_size=32)  # fits the few tokens there are
    assert np.isfinite(y).all()
    one = decaying(-0.5)
    one[1][:, 7] = -70.0  # a reset of the state
    wkv7(*one)
    compare_strong(COMPILED["chunked"], one)

"""The generalized delta rule: every form against a loop in float64, for any decay.

Values, final state and all gradients to 1e-5 of the largest entry, 2e-5 where log decays reach -20.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rwkvx_jax import generalized_delta_rule
from rwkvx_jax.ops import dispatch
from rwkvx_jax.ops.delta_rule import affine
from rwkvx_jax.ops.delta_rule_chunked import chunked, leaf_of
from rwkvx_jax.ops.segments import Form, Plan
from rwkvx_jax.ops.wkv4 import wkv4
from tests.helpers import assert_close

DECAYS = {
    "weak": (-1e-4,),
    "rwkv7": (-0.6065,),
    "kda": (-5.0, -1e-3),
    "strong": (-20.0, -0.1),
    "reset": (-1e4, -1e-3),
    "exact-reset": (-np.inf, -1e-3),
    "random": (),
}
FORMS = {
    "sequential": {"implementation": "sequential"},
    "chunked": {"implementation": "chunked"},
    "chunked-128": {"implementation": "chunked", "chunk_size": 128},
    "chunked-4": {"implementation": "chunked", "chunk_size": 4},
    "associative": {"implementation": "associative", "chunk_size": 32},
}
QUICK = ("chunked", "associative")
CHOSEN = [f if f in QUICK else pytest.param(f, marks=pytest.mark.thorough) for f in FORMS]


def make_inputs(decay, *, scalar, delta, time=83, keys=12, values=20, heads=3, groups=1, seed=0):
    rng = np.random.default_rng([seed, time, scalar, delta])
    normal = lambda *shape: rng.standard_normal((2, time, *shape)).astype(np.float32)
    inputs = {
        "r": normal(heads, keys),
        "k": normal(heads, keys),
        "v": normal(heads * groups, values),
    }
    shape = (2, time, heads * groups, 1 if scalar else keys)
    log_w = np.full(shape, decay[0] if decay else 0, np.float32)
    if len(decay) > 1:  # now and then, beside decays that must keep their precision
        log_w = np.where(rng.random(shape) < 0.1, log_w, np.float32(decay[1]) * rng.random(shape))
    if not decay:
        log_w = -np.exp(rng.uniform(np.log(1e-3), np.log(20), shape))
    inputs["log_w"] = log_w.astype(np.float32)
    if delta:
        key = normal(heads * groups, keys)
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        share = 1 / (1 + np.exp(-normal(heads * groups, 1)))
        # As gated delta rules do: what is removed is what is left.
        inputs |= {"a": -key * np.exp(inputs["log_w"]), "b": (key * share).astype(np.float32)}
    inputs["state"] = rng.standard_normal((2, heads * groups, values, keys)).astype(np.float32)
    return inputs


def loop(inputs, reads_before=False):
    """The definition."""
    heads = inputs["v"].shape[2]
    spread = lambda x: x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], 2)
    tokens = {name: spread(x).swapaxes(0, 1) for name, x in inputs.items() if name != "state"}

    def step(before, x):
        state = before * jnp.exp(x["log_w"])[:, :, None]
        state += x["v"][..., None] * x["k"][:, :, None]
        if "a" in x:
            state += jnp.einsum("bhvk,bhk->bhv", before, x["a"])[..., None] * x["b"][:, :, None]
        return state, jnp.einsum("bhvk,bhk->bhv", before if reads_before else state, x["r"])

    state, y = jax.lax.scan(step, inputs["state"], tokens)
    return y.swapaxes(0, 1), state


@functools.cache  # one compilation a form and shape serves all decays
def with_gradients(run):
    """jit of inputs -> (y, state) and the gradients of all, for cotangents that never change."""

    @jax.jit
    def both(inputs):
        (y, state), pull_back = jax.vjp(run, inputs)
        rng = np.random.default_rng(1)
        cotangents = (rng.standard_normal(y.shape), rng.standard_normal(state.shape))
        return (y, state), pull_back(
            tuple(
                jnp.asarray(x, like.dtype) for x, like in zip(cotangents, (y, state), strict=True)
            )
        )[0]

    return lambda inputs: jax.tree.map(np.asarray, both(inputs))


@functools.cache
def ours(form, reads_before=False, **options):
    options |= {"read": "before" if reads_before else "after"}
    return with_gradients(lambda inputs: generalized_delta_rule(**inputs, **FORMS[form], **options))


LOOPS = {before: with_gradients(functools.partial(loop, reads_before=before)) for before in (0, 1)}


@functools.cache
def expected(decay, scalar, delta, reads_before=False, **shape):
    inputs = make_inputs(DECAYS[decay], scalar=scalar, delta=delta, **shape)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(x, jnp.float64) for name, x in inputs.items()}
        return inputs, LOOPS[reads_before](exact)


def compare(run, inputs, exact, rel):
    found = run({name: jnp.asarray(x) for name, x in inputs.items()})
    for name, x, y in zip(("y", "state"), found[0], exact[0], strict=True):
        assert_close(x, y, rel=rel, name=name)
    for name, y in exact[1].items():
        assert_close(found[1][name], y, rel=rel, name=f"gradient of {name}")


@pytest.mark.parametrize("form", CHOSEN)
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "vector"])
@pytest.mark.parametrize("decay", DECAYS)
def test_any_decay(decay, scalar, delta, form):
    inputs, exact = expected(decay, scalar, delta)
    compare(ours(form), inputs, exact, 2e-5 if decay in ("strong", "random") else 1e-5)


@pytest.mark.parametrize("form", CHOSEN)
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "vector"])
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
def test_reads_before_writing_with_grouped_values(delta, scalar, form):
    inputs, exact = expected("random", scalar, delta, True, time=37, groups=2)
    compare(ours(form, reads_before=True), inputs, exact, 2e-5)


@pytest.mark.parametrize(
    "bound, leaf", [(-0.5, 128), (-5.0, 32), (-20.0, 8), (None, 1), (-81.0, 1)]
)
def test_a_bound_allows_leaves_of_so_many_tokens(bound, leaf):
    assert leaf_of(bound) == leaf


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
@pytest.mark.parametrize("form", ["chunked-128", "associative"])
def test_a_bound_changes_nothing_but_the_way(form, delta):
    inputs, exact = expected("kda", False, delta)
    compare(ours(form, decay_bound=-5.0), inputs, exact, 1e-5)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "vector"])
def test_several_chunks_at_once(scalar, delta):
    """As accelerators cut the work: segments of chunks."""
    inputs, exact = expected("random", scalar, delta)
    plan = Plan(16, 2, False, jax.lax.Precision.HIGHEST)

    def run(inputs):
        tokens = {name: x for name, x in inputs.items() if name != "state"}
        return chunked(tokens, inputs["state"], plan=plan, form=Form(False, 1))

    compare(with_gradients(run), inputs, exact, 2e-5)


STRENGTHS = {  # the most that 16 tokens of 32 may decay, 8 of 16, and the token itself
    "whole chunks": (-4.9, -1.0),
    "leaves": (-9.9, -1.0),
    "levels": (-30.0, -1.0),
    "all three": (-30.0, -9.9, -1e-3),
}


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_chunks_of_every_strength(strength, delta):
    """What is seen while running chooses how a chunk is scaled: every way, and all in one text."""
    inputs, _ = expected("weak", False, delta, time=96)
    of_chunks = np.repeat(np.resize(STRENGTHS[strength], 3), 32).astype(np.float32)
    log_w = np.broadcast_to(of_chunks[None, :, None, None], inputs["log_w"].shape).copy()
    log_w[:, ::5] *= 0.01
    inputs = inputs | {"log_w": log_w}
    with jax.enable_x64(True):
        exact = LOOPS[0]({name: jnp.asarray(x, jnp.float64) for name, x in inputs.items()})
    compare(ours("chunked"), inputs, exact, 2e-5)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
def test_vmap_over_texts_of_different_strength(delta):
    """vmap computes every way and selects: what overflows in one row must reach no other."""
    inputs, _ = expected("weak", False, delta, time=96)
    strengths = np.asarray([-1.0, -9.9, -1e4, -np.inf], np.float32)
    several = {name: jnp.stack([x] * 4) for name, x in inputs.items()}
    several["log_w"] = jnp.asarray(
        np.where(np.arange(96)[:, None, None] % 7 < 6, strengths[:, None, None, None, None], -1e-3)
        * np.ones_like(several["log_w"])
    )

    def both(inputs):
        outputs, pull_back = jax.vjp(lambda x: generalized_delta_rule(**x), inputs)
        return outputs, pull_back(outputs)[0]

    found = jax.jit(jax.vmap(both))(several)
    one = jax.jit(both)
    for row in range(len(strengths)):
        expected_row = one({name: x[row] for name, x in several.items()})
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected_row), strict=True):
            assert_close(x[row], y, rel=2e-5)


@pytest.mark.parametrize("time", [1, 2, 7, 64])
def test_short_texts(time):
    inputs, exact = expected("random", False, True, time=time)
    compare(ours("chunked"), inputs, exact, 2e-5)


def test_pieces_give_what_the_whole_gives():
    inputs = make_inputs(DECAYS["random"], scalar=True, delta=True)
    state = inputs.pop("state")
    whole, end = generalized_delta_rule(**inputs, state=state)
    pieces = []
    for piece in (slice(0, 31), slice(31, 32), slice(32, None)):
        y, state = generalized_delta_rule(
            **{n: x[:, piece] for n, x in inputs.items()}, state=state
        )
        pieces.append(y)
    assert_close(np.concatenate(pieces, axis=1), whole, rel=1e-5)
    assert_close(state, end, rel=1e-5)


def test_bfloat16_inputs_are_read_as_they_are():
    inputs = {n: jnp.asarray(x) for n, x in make_inputs((), scalar=True, delta=True).items()}
    state, log_w = inputs.pop("state"), inputs.pop("log_w")
    inputs = {name: x.astype(jnp.bfloat16) for name, x in inputs.items()}
    as_read = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    y, end = generalized_delta_rule(**inputs, log_w=log_w, state=state)
    exact, exact_end = generalized_delta_rule(**as_read, log_w=log_w, state=state)
    assert y.dtype == jnp.bfloat16 and end.dtype == jnp.float32
    assert_close(y.astype(jnp.float32), exact, rel=2**-8)
    assert_close(end, exact_end, rel=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"log_w": 0.5}, "log_w is the logarithm of a decay, at most 0, got 0.5"),
        ({"log_w": np.nan}, "at most 0, got nan"),
        (
            {"decay_bound": -1.0},
            "goes down to -.*, below decay_bound -1: pass a lower bound, or No",
        ),
        ({"decay_bound": 1.0}, "decay_bound must be finite and at most 0, got 1"),
        ({"a": None}, "b is given and a is not: pass both, or neither for linear attention"),
        ({"v": (2, 83, 4, 20)}, "v has 4 heads and r has 3: those of v must be a multiple"),
        ({"k": (2, 83, 3, 13)}, r"k must be \[2, 83, 3, 12\] .* got \(2, 83, 3, 13\)"),
        ({"a": (2, 83, 2, 12)}, r"a must be \[2, 83, 3, 12\]"),
        ({"state": (2, 3, 12, 20)}, r"state must be \[B, HV, V, K\] = \(2, 3, 20, 12\)"),
        ({"read": "later"}, "read must be 'after' or 'before', got 'later'"),
        ({"chunk_size": 48}, "chunk_size must be a power of two from 1 to 128, got 48"),
        ({"implementation": "fast"}, "unknown implementation 'fast'"),
        ({"implementation": "pallas"}, "'pallas' cannot run here"),
    ],
)
def test_bad_input(change, message):
    arguments = make_inputs(DECAYS["kda"], scalar=False, delta=True)
    for name, value in change.items():
        if isinstance(value, tuple):
            value = np.zeros(value, np.float32)
        elif name == "log_w":
            value = np.full_like(arguments["log_w"], value)
        arguments[name] = value
    with pytest.raises(ValueError, match=message):
        generalized_delta_rule(**arguments)


# ------------------------------------------------------------------------------------- TPU kernel


@pytest.fixture
def on_a_tpu(monkeypatch, caplog):
    """Runs with shapes alone, as on a TPU; gives what is logged of the choice."""
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    dispatch.forget_choices()
    caplog.set_level(logging.INFO, "rwkvx_jax.ops")

    def run(op, keys, values, *, scalar, delta, dtype=jnp.bfloat16, bound=None, **options):
        caplog.clear()
        inputs = make_inputs((-1.0,), scalar=scalar, delta=delta, time=5, keys=keys, values=values)
        log_w, _ = inputs.pop("log_w"), inputs.pop("state")
        inputs = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
        op = functools.partial(op, decay_bound=bound, **options)
        jax.eval_shape(op, **inputs, log_w=log_w)
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    yield run
    dispatch.forget_choices()


CHOSEN = [("INFO", "generalized_delta_rule: using 'pallas' on tpu")]
REFUSED = "{} size {} is not a multiple of 32 from 32 to 256"


def fall_back(reason):
    message = "generalized_delta_rule: falling back to 'chunked' on tpu: 'pallas' cannot run: {}"
    return [("WARNING", message.format(reason))]


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
@pytest.mark.parametrize("decays", ["scalar", "bounded", "unbounded"])
@pytest.mark.parametrize(
    "keys, values, dtype",
    [(32, 64, jnp.float32), (128, 64, jnp.bfloat16), (256, 256, jnp.bfloat16)],
)
def test_a_tpu_takes_the_kernel(keys, values, dtype, decays, delta, on_a_tpu):
    bound = -5.0 if decays == "bounded" else None
    kind = {"scalar": decays == "scalar", "delta": delta, "dtype": dtype, "bound": bound}
    assert on_a_tpu(generalized_delta_rule, keys, values, **kind) == CHOSEN


@pytest.mark.parametrize(
    "keys, values, dtype, reason",
    [
        (16, 64, jnp.bfloat16, REFUSED.format("key", 16)),
        (64, 48, jnp.bfloat16, REFUSED.format("value", 48)),
        (288, 64, jnp.float32, REFUSED.format("key", 288)),
        (64, 64, jnp.float16, "dtype float16 is not bfloat16 or float32"),
    ],
)
def test_other_shapes_fall_back_with_one_warning(keys, values, dtype, reason, on_a_tpu):
    run = functools.partial(on_a_tpu, generalized_delta_rule, keys, values, scalar=True, delta=True)
    assert run(dtype=dtype) == fall_back(reason)
    assert run(dtype=dtype) == []
    with pytest.raises(ValueError, match=f"'pallas' cannot run here: {reason}; use 'chunked'"):
        run(dtype=dtype, implementation="pallas")


@pytest.mark.parametrize("keys, values", [(64, 64), (128, 64), (128, 128)])
def test_the_affine_form_takes_the_kernel_for_up_to_256_rows(keys, values, on_a_tpu):
    assert on_a_tpu(affine, keys, values, scalar=True, delta=True) == CHOSEN


@pytest.mark.parametrize("keys, values", [(256, 128), (256, 256)])
def test_the_affine_form_of_more_rows_falls_back(keys, values, on_a_tpu):
    reason = REFUSED.format("value", keys + values)
    run = functools.partial(on_a_tpu, affine, keys, values, scalar=True, delta=True)
    assert run() == fall_back(reason)
    with pytest.raises(ValueError, match=reason):
        run(implementation="pallas")


@pytest.mark.parametrize(
    "scalar, delta",
    [
        pytest.param(True, False, id="scalar-linear"),
        pytest.param(True, True, id="scalar-delta", marks=pytest.mark.thorough),
        pytest.param(False, False, id="vector-linear", marks=pytest.mark.thorough),
        pytest.param(False, True, id="vector-delta", marks=pytest.mark.thorough),
    ],
)
def test_the_interpreted_kernel_through_the_op(scalar, delta, monkeypatch):
    """Grouped values, a state, reads before writing."""
    shape = {"time": 20, "keys": 32, "values": 32, "heads": 1, "groups": 2}
    inputs = make_inputs((-5.0, -1e-3), scalar=scalar, delta=delta, **shape)
    options = {"read": "before", "decay_bound": None if scalar else -5.0}

    def run(form):
        op = functools.partial(generalized_delta_rule, implementation=form, **options)
        return jax.tree.leaves(with_gradients(lambda inputs: op(**inputs))(inputs))

    expected = run("chunked")
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode():
        found = run("pallas")
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, rel=1e-5)


# ------------------------------------------------------------------------------------- RWKV-4


def wkv4_loop(inputs):
    log_w, u = -jnp.exp(inputs["time_decay"][None]), inputs["time_first"][None]
    num, den, top = (inputs["state"][:, i] for i in range(3))

    def step(sums, token):
        (num, den), (k, v) = sums, token
        y = (num + jnp.exp(u + k) * v) / (den + jnp.exp(u + k))
        return (jnp.exp(log_w) * num + jnp.exp(k) * v, jnp.exp(log_w) * den + jnp.exp(k)), y

    by_time = (inputs["k"].swapaxes(0, 1), inputs["v"].swapaxes(0, 1))
    sums, y = jax.lax.scan(step, (num * jnp.exp(top), den * jnp.exp(top)), by_time)
    return y.swapaxes(0, 1), jnp.stack(sums, axis=1)


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
@pytest.mark.parametrize("time", [1, 70, 300])
def test_wkv4(implementation, time):
    rng = np.random.default_rng(time)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    inputs = {
        "time_decay": normal(24), "time_first": normal(24),
        "k": 4 * normal(2, time, 24), "v": normal(2, time, 24),
        "state": np.abs(normal(2, 3, 24)),
    }  # fmt: skip
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(x, jnp.float64) for name, x in inputs.items()}
        exact = with_gradients(wkv4_loop)(exact)

    def run(inputs):
        y, state = wkv4(**inputs, implementation=implementation)
        return y, state[:, :2] * jnp.exp(state[:, 2:])

    compare(with_gradients(run), inputs, exact, 1e-4 if time > 100 else 2e-5)


def test_wkv4_begins_with_nothing_and_bears_large_keys():
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((1, 9, 8)), jnp.float32) for _ in range(2))
    run = lambda k: wkv4(jnp.zeros(8), jnp.zeros(8), k, v)[0]
    np.testing.assert_allclose(run(k)[:, 0], v[:, 0], rtol=1e-6)
    assert_close(run(k + 300), run(k), rel=2e-5)
    assert jnp.isfinite(jax.grad(lambda k: run(k).sum())(k + 300)).all()
    with pytest.raises(ValueError, match=r"wkv4: v must be \(1, 9, 8\)"):
        wkv4(jnp.zeros(8), jnp.zeros(8), k, v[:, :4])


# ------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("heads", [1, 2], ids=["one for all", "one for two"])
def test_grouped_values_over_devices(heads):
    """Heads of v over devices; those of r and k are fewer."""
    inputs = make_inputs((), scalar=True, delta=False, time=9, heads=heads, groups=4 // heads)
    state = inputs.pop("state")
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    run = jax.jit(lambda inputs, state: generalized_delta_rule(**inputs, state=state))
    expected = run(inputs, state)
    place = lambda x: P("data", None, "tensor" if x.shape[2] == 4 else None)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(x, NamedSharding(mesh, place(x))) for n, x in inputs.items()}
        found = run(placed, jax.device_put(state, NamedSharding(mesh, P("data", "tensor"))))
    assert jax.typeof(found[0]).sharding.spec == P("data", None, "tensor", None)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, rel=1e-5)

"""Sequences cut over 8 simulated devices: each operation equals the one on a whole sequence."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.config import LongCEConfig, MeshConfig
from rwkvx_jax.modules import context, token_shift
from rwkvx_jax.ops.block_sparse import sparse_attention
from rwkvx_jax.ops.full_attention import full_attention
from rwkvx_jax.ops.recurrence import wkv7, wkv7_affine
from rwkvx_jax.perf.context_traffic import block_traffic
from rwkvx_jax.sharding import make_mesh, sequence_parts, whole_sequences
from rwkvx_jax.training.losses import longce_weights
from tests.helpers import assert_close
from tests.ops.attention_cases import compare, random_qkv, value_and_gradients
from tests.ops.test_recurrence import NAMES, assert_same, cotangents_for, make_inputs


def mesh_of(**sizes):
    """A mesh over as many of the devices as the sizes ask for."""
    return make_mesh(
        MeshConfig(**{"data": 1, **sizes}), jax.devices()[: int(np.prod([*sizes.values()]))]
    )


# ------------------------------------------------------------------------------------ recurrence


def over_parts(implementation, *arrays_and_state):
    """`context.recurrence` of RWKV-7."""
    *arrays, state = arrays_and_state
    affine = functools.partial(wkv7_affine, implementation=implementation)
    return context.recurrence(affine, tuple(arrays), state)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "sizes, implementation",
    [
        ({"context": 2}, "sequential"),
        ({"context": 5}, "chunked"),
        ({"data": 2, "tensor": 2, "context": 2}, "chunked"),
        pytest.param({"context": 3}, "associative", marks=pytest.mark.slow),
        pytest.param({"context": 8}, "chunked", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_recurrence_over_parts_is_the_recurrence(sizes, implementation):
    """Values, final state and gradients; stretches that fill no chunk, all kinds of decay."""
    inputs = make_inputs("mixed", 23 * sizes["context"], batch=2, heads=2, values=12)
    cotangents = cotangents_for(inputs)

    def run(form, *inputs):
        outputs, pull_back = jax.vjp(form, *inputs)
        return outputs, pull_back(cotangents)

    expected = jax.jit(functools.partial(run, functools.partial(wkv7, implementation="sequential")))
    form = functools.partial(over_parts, implementation)
    with jax.set_mesh(mesh_of(**sizes)):
        actual = jax.jit(functools.partial(run, form))(*inputs)
    expected = expected(*inputs)
    for name, x, y in zip(("y", "final state"), actual[0], expected[0], strict=True):
        assert_close(x, y, rel=1e-5, name=name)
    for name, x, y in zip(NAMES, actual[1], expected[1], strict=True):
        assert_close(x, y, rel=1e-4, name=f"gradient of {name}")


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", ["sequential", "chunked", "associative"])
def test_the_affine_form_is_the_recurrence(implementation):
    *inputs, state = make_inputs("random", 50, batch=2, values=24)

    def form(*inputs):
        *inputs, state = inputs
        y, z, m, g = wkv7_affine(*inputs, implementation=implementation)
        return y + jnp.einsum("bhvk,bthk->bthv", state, z), state @ m + g

    def run(form):
        outputs, pull_back = jax.vjp(form, *inputs, state)
        return outputs, pull_back(cotangents_for([*inputs, state]))

    expected = jax.jit(run, static_argnums=0)(functools.partial(wkv7, implementation="sequential"))
    assert_same(jax.jit(run, static_argnums=0)(form), expected)


@pytest.mark.thorough
def test_bfloat16_over_parts():
    """No worse than twice the rounding of the recurrence on one device."""
    *inputs, state = make_inputs("random", 160, batch=1, heads=2)
    exact, _ = wkv7(*inputs, implementation="sequential")
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    one, _ = wkv7(*rounded, implementation="chunked")
    with jax.set_mesh(mesh_of(context=4)):
        cut, _ = jax.jit(functools.partial(over_parts, "chunked"))(*rounded, jnp.zeros_like(state))
    assert cut.dtype == jnp.bfloat16
    errors = [float(jnp.abs(y.astype(jnp.float32) - exact).max()) for y in (one, cut)]
    assert errors[1] <= 2 * errors[0], errors


@pytest.mark.thorough
def test_what_a_block_sends_does_not_depend_on_the_length():
    """Token shifts, recurrence and their gradients on 8 devices, from the compiled program."""
    mesh = mesh_of(context=8)
    short, long = (block_traffic(mesh, length, width=64) for length in (16384, 65536))
    assert short == long
    assert set(short) == {"collective-permute"}
    # Forward and backward: three doublings of (M, G) and the last G; two token shifts.
    assert sum(short.values()) < 2 * 4 * 2 * 64 * 64 * 4 + 2 * 2 * 64 * 4


# ------------------------------------------------------------------------------------- attention


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind, heads, sizes, way",
    [
        ("sparse", 4, {"context": 4}, "4 heads over 4 devices, 1 on each"),
        ("sparse", 1, {"context": 3}, "3 devices collect"),
        ("full", 5, {"context": 3}, "5 heads over 3 devices, 2 on each"),
        ("full", 3, {"context": 2}, "2 devices collect"),
        pytest.param(
            "sparse",
            6,
            {"data": 2, "tensor": 2, "context": 2},
            "2 devices collect",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_attention_over_parts_is_attention(kind, heads, sizes, way, caplog):
    """Heads shared out evenly, filled up with zeros, and too few to share out."""
    op = full_attention
    if kind == "sparse":
        op = functools.partial(sparse_attention, chunk_size=6, top_k=3, implementation="xla")
    q, k, v = random_qkv(3, 2, 72, heads=heads, values=24)
    expected = value_and_gradients(op)(q, k, v)
    context._log_choice.cache_clear()
    with jax.set_mesh(mesh_of(**sizes)), caplog.at_level(logging.INFO):
        run = value_and_gradients(functools.partial(context.attention, op))
        compare(run(q, k, v), expected)
    assert way in caplog.text


# ----------------------------------------------------------------------- token shift and windows


def test_token_shift_over_parts():
    h = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 6)), jnp.float32)
    weight = jnp.arange(h.size, dtype=jnp.float32).reshape(h.shape)
    run = lambda h: jax.value_and_grad(
        lambda h: (weight * token_shift.previous_token(h, None)).sum()
    )(h)
    expected = run(h)
    with jax.set_mesh(mesh_of(data=2, context=4)):
        actual = jax.jit(run)(h)
        assert sequence_parts(24) == 4
        assert sequence_parts(23) == 1  # stays whole
        uneven = jax.jit(lambda h: token_shift.previous_token(h, None))(h[:, :23])
    np.testing.assert_array_equal(uneven[:, 1:], h[:, :22])
    np.testing.assert_array_equal(actual[1], expected[1])
    assert_close(actual[0], expected[0], rel=1e-6)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("stride", [6, 16])
def test_windows_side_by_side_give_the_weights_of_windows_in_turn(stride, at_once):
    """6: nine windows on four devices, some twice; 16: three windows, fewer than devices."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 9, (2, 65)), jnp.int32)
    # Depends on everything since the start of a window, and on nothing before.
    short = lambda part: jnp.cumsum(jnp.sin(part[:, :-1] + 2.0 * part[:, 1:]), axis=1)[:, 7:]
    full = jnp.cos(tokens[:, 1:].astype(jnp.float32))
    config = LongCEConfig(window=7, stride=stride, cap=1e9, at_once=at_once)
    weigh = lambda tokens, full: longce_weights(short, tokens, full, config)
    expected = longce_weights(short, tokens, full, dataclasses.replace(config, at_once=1))
    assert_close(weigh(tokens, full), expected, rel=1e-6)
    with jax.set_mesh(mesh_of(context=4)):
        assert_close(jax.jit(weigh)(tokens, full), expected, rel=1e-6)
        with whole_sequences():
            assert sequence_parts(64) == 1
        assert sequence_parts(64) == 4

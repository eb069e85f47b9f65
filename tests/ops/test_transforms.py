"""The public ops inside other programs: every transformation of JAX, on every kind of mesh axis.

Values and gradients equal those of the oracle, unsharded; outputs and gradients are sharded as the
inputs are. docs/research.md has the table that these tests fill in. Quick ones are the gradient off
a mesh, on Explicit and on Auto axes, and some of what raises; the others run with `-m slow`.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rwkvx_jax import (
    full_attention,
    generalized_delta_rule,
    select_chunks,
    sparse_attention,
    wkv7,
)
from tests.helpers import assert_close

ROWS, TIME, HEADS, KEYS = 4, 8, 2, 4
RECURRENCES = (wkv7, generalized_delta_rule)
CHUNKS = {"chunk_size": 2, "top_k": 2}
AXES = ("none", "explicit", "auto", "manual", "manual, unchecked")
FEW_AXES = [
    a if a in ("none", "explicit") else pytest.param(a, marks=pytest.mark.slow) for a in AXES
]


class Form(NamedTuple):
    """An implementation of an op, and the one that says what is right."""

    op: functools.partial
    oracle: functools.partial


def forms(op, oracle, names, **options):
    given = functools.partial(op, **options)
    return {
        f"{op.__name__} {name}": Form(
            functools.partial(given, implementation=name),
            functools.partial(given, implementation=oracle),
        )
        for name in names
    }


FORMS = (
    forms(wkv7, "sequential", ("sequential", "chunked", "associative"))
    | forms(generalized_delta_rule, "sequential", ("sequential", "chunked", "associative"))
    | forms(sparse_attention, "reference", ("reference", "xla", "masked"), **CHUNKS)
    | forms(full_attention, "reference", ("reference", "blocked"))
)
ORACLES = (
    "wkv7 sequential",
    "generalized_delta_rule sequential",
    "sparse_attention reference",
    "full_attention reference",
)


@functools.cache
def arguments(op, copies=()):
    """Arrays of an op, different in each of `copies`."""
    rng = np.random.default_rng(len(copies))
    normal = lambda *shape: rng.standard_normal((*copies, *shape)).astype(np.float32)
    tokens = ROWS, TIME, HEADS, KEYS
    if op not in RECURRENCES:
        return tuple(normal(*tokens) for _ in range(2 if op is select_chunks else 3))
    kk = normal(*tokens)
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    log_w = -0.6 / (1 + np.exp(normal(*tokens)))
    state = normal(ROWS, HEADS, KEYS, KEYS)
    return normal(*tokens), log_w, normal(*tokens), normal(*tokens), -kk, 0.5 * kk, state


def place(x):
    """Rows over one mesh axis, heads over the other; copies whole."""
    front = (None,) * (x.ndim - 4)
    return P(*front, "data", *((None, "tensor") if x.shape[-2] == HEADS else ("tensor",)))


def scalar(outputs):
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(outputs))


def gradient(op):
    """Values and gradients with respect to all arguments."""

    def run(*args):
        outputs, pull_back = jax.vjp(op, *args)
        return outputs, pull_back(jax.tree.map(jnp.cos, outputs))

    return run


def vmap_of_gradient(op):
    return jax.vmap(gradient(op))


def through_a_program(op):
    """The gradient of a scan over a checkpoint of a vmap, as layers of a model are."""
    layer = jax.checkpoint(lambda *args: scalar(jax.vmap(op)(*args)))

    def run(*args):
        pairs = jax.tree.map(lambda x: x[:, None], args)
        body = lambda total, args: (total + layer(*args), None)
        return jax.lax.scan(body, jnp.zeros(()), pairs)[0]

    return lambda *args: jax.value_and_grad(run, argnums=tuple(range(len(args))))(*args)


def hessian(op):
    """Rows of the Hessian as `jax.hessian` computes them: many tangents of the gradient."""

    def run(*args):
        first = jax.grad(lambda *args: scalar(op(*args)), argnums=tuple(range(len(args))))
        once = jax.tree.map(lambda x: x[0], args)
        return jax.vmap(lambda *tangents: jax.jvp(first, once, tangents)[1])(*args)

    return run


COPIES = {gradient: (), vmap_of_gradient: (2,), through_a_program: (2,), hessian: (2,)}


@functools.cache
def right(oracle, transform):
    return jax.jit(transform(oracle))(*arguments(oracle.func, COPIES[transform]))


def on_axes(op, axes, args):
    """(op, arguments, mesh or None) on a mesh with axes of that kind."""
    if axes == "none":
        return op, args, None
    kind = AxisType.Explicit if axes == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    if axes in ("explicit", "auto"):
        args = [jax.device_put(x, NamedSharding(mesh, place(x))) for x in args]
        return op, args, mesh
    outputs = P("data", None, "tensor")
    if op.func in RECURRENCES:
        outputs = outputs, P("data", "tensor")
    specs = tuple(place(x) for x in arguments(op.func))
    check = axes == "manual"
    shards = jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=outputs, check_vma=check)
    return shards, args, None


def in_force(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def cells():
    for name in FORMS:
        for transform in COPIES:
            for axes in AXES:
                often = transform is gradient and axes in ("none", "explicit", "auto")
                quick = often and name not in (
                    *ORACLES,
                    "wkv7 associative",
                    "generalized_delta_rule associative",
                )
                marks = () if quick else (pytest.mark.slow,)
                yield pytest.param(
                    name, transform, axes, id=f"{name}-{transform.__name__}-{axes}", marks=marks
                )


@pytest.mark.parametrize("name, transform, axes", list(cells()))
def test_cell(name, transform, axes):
    op, oracle = FORMS[name]
    wanted = right(oracle, transform)
    run, args, mesh = on_axes(op, axes, arguments(op.func, COPIES[transform]))
    with in_force(mesh):
        compiled = jax.jit(transform(run)).lower(*args).compile()
        found = compiled(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(x, y, rel=1e-4)
    if transform is gradient and axes != "none":
        for x in jax.tree.leaves(found):
            expected = NamedSharding(x.sharding.mesh, place(x))
            assert x.sharding.is_equivalent_to(expected, x.ndim), x.sharding
        text = compiled.as_text()
        assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.parametrize("axes", AXES)
def test_selection(axes):
    """No gradient, but one may be asked for: it is zero."""
    op = functools.partial(select_chunks, **CHUNKS)
    q, k = arguments(select_chunks)
    run, args, mesh = on_axes(op, axes, (q, k))
    with in_force(mesh):
        found = jax.jit(run)(*args)
    np.testing.assert_array_equal(found, op(q, k))
    if axes in ("explicit", "auto"):
        assert found.sharding.is_equivalent_to(NamedSharding(found.sharding.mesh, place(found)), 4)
    if axes == "none":
        tangent = jax.jvp(op, (q, k), (q, k))[1]
        assert tangent.dtype == jax.dtypes.float0


# ----------------------------------------------------- what raises, and arrays placed in other ways


@pytest.mark.parametrize("axes", FEW_AXES)
@pytest.mark.parametrize("name", FORMS)
def test_forward_mode(name, axes):
    """The oracles have it; of the others the message says who does."""
    op = FORMS[name].op
    run, args, mesh = on_axes(op, axes, arguments(op.func))
    tangents = jax.tree.map(jnp.ones_like, args)
    program = jax.jit(lambda args, tangents: jax.jvp(jax.jit(run), args, tangents)[1])
    if name in ORACLES:
        with in_force(mesh):
            assert np.isfinite(jax.tree.leaves(program(tuple(args), tuple(tangents)))[0]).all()
        return
    best = "sequential" if op.func in RECURRENCES else "reference"
    message = f"{op.func.__name__}: only implementation='{best}' .* forward mode"
    with in_force(mesh), pytest.raises(ValueError, match=message):
        program.lower(tuple(args), tuple(tangents))


@pytest.mark.parametrize("name", ["wkv7 chunked", "full_attention blocked"])
def test_forward_mode_outside_a_program(name):
    op, args = FORMS[name].op, arguments(FORMS[name].op.func)
    with pytest.raises(ValueError, match="forward mode"):
        jax.jvp(op, args, args)
    with pytest.raises(ValueError, match="forward mode"):
        jax.jacfwd(op)(*args)
    with pytest.raises(ValueError, match="forward mode"):
        jax.linearize(op, *args)[1](*args)


@pytest.mark.parametrize("axes", FEW_AXES)
@pytest.mark.parametrize("name", FORMS)
def test_reverse_over_reverse(name, axes):
    op = FORMS[name].op
    run, args, mesh = on_axes(op, axes, arguments(op.func))
    once = jax.grad(lambda *args: scalar(run(*args)))
    twice = jax.jit(jax.grad(lambda *args: scalar(once(*args))))
    loops = op.func not in RECURRENCES and name not in ORACLES
    refused = pytest.raises(ValueError, match="have one reverse mode.*jax.hessian")
    with in_force(mesh), refused if loops else contextlib.nullcontext():
        twice.trace(*args)


@pytest.mark.parametrize("axes", ["explicit", "auto"])
@pytest.mark.parametrize("name", ["wkv7 chunked", "full_attention blocked"])
def test_arrays_placed_differently(name, axes):
    """Only the first array is sharded, over rows and time; no mesh is set."""
    op, oracle = FORMS[name]
    _, (first, *_), _ = on_axes(op, axes, arguments(op.func))
    args = list(arguments(op.func))
    args[0] = jax.device_put(first, NamedSharding(first.sharding.mesh, P("data", "tensor")))
    found = jax.jit(gradient(op))(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(right(oracle, gradient)), strict=True):
        assert_close(x, y, rel=1e-4)


@pytest.mark.parametrize("name", ["wkv7 chunked", "sparse_attention xla"])
def test_one_array_for_all_devices(name):
    """In shard_map, what all devices share gets the sum of their gradients."""
    op, oracle = FORMS[name]
    args = list(arguments(op.func))
    args[2] = args[2][:1]  # one row of v (of k in the recurrence), the same for all
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = [P("data")] * 2 + [P()] + [P("data")] * (len(args) - 3)
    shared = jax.shard_map(
        lambda *args: jax.tree.leaves(op(*args))[0],
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=P("data"),
    )

    def alone(*args):
        repeated = jnp.repeat(args[2], ROWS, axis=0)
        return jax.tree.leaves(oracle(*args[:2], repeated, *args[3:]))[0]

    found = jax.jit(gradient(shared))(*args)
    wanted = jax.jit(gradient(alone))(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(x, y, rel=1e-4)


@pytest.mark.parametrize("name", ["wkv7 chunked", "sparse_attention xla"])
def test_with_64_bit_types(name):
    """Counting in 64 bits changes nothing; 64-bit arrays are refused or give their dtype back."""
    op, oracle = FORMS[name]
    args, wanted = arguments(op.func), right(oracle, gradient)
    with jax.enable_x64(True):
        found = jax.jit(gradient(op))(*args)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert x.dtype == np.float32
            assert_close(x, y, rel=1e-4)
        wide = [x.astype(np.float64) for x in args]
        if op.func in RECURRENCES:
            with pytest.raises(ValueError, match="r must be one of float32.* got float64"):
                op(*wide)
        else:
            assert jax.eval_shape(op, *wide).dtype == np.float64


@pytest.mark.parametrize("name", ["wkv7 chunked", "sparse_attention xla"])
def test_donated_arguments(name):
    op, oracle = FORMS[name]
    args = [jnp.array(x) for x in arguments(op.func)]
    shapes = jax.eval_shape(op, *args)
    found = jax.jit(op, donate_argnums=(0,))(*args)
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, shapes)
    for x, y in zip(
        jax.tree.leaves(found), jax.tree.leaves(right(oracle, gradient)[0]), strict=True
    ):
        assert_close(x, y, rel=1e-4)

"""Packed documents in recurrences: as if each were run alone, in every form, no gradient across.

Every form on a packed row against the oracle on each document by itself: outputs, final state and
all gradients to 1e-5 of the largest entry; and what one document's outputs owe to another is 0.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from rwkvx_jax import generalized_delta_rule, wkv7
from rwkvx_jax.ops import dispatch, recurrence, recurrences
from rwkvx_jax.ops.chunk_mass import selection_loss
from rwkvx_jax.ops.delta_rule import affine
from rwkvx_jax.ops.documents import beginnings, check_segment_ids
from rwkvx_jax.ops.recurrence import wkv7_affine
from rwkvx_jax.ops.selectors import Selector
from rwkvx_jax.ops.wkv4 import wkv4
from tests.helpers import assert_close

FORMS = {
    "sequential": {"implementation": "sequential"},
    "chunked": {"implementation": "chunked", "chunk_size": 32},
    "chunked-4": {"implementation": "chunked", "chunk_size": 4},
    "associative": {"implementation": "associative", "chunk_size": 16},
}
KINDS = {  # decay a channel or a head, with or without removal, bound, read
    "rwkv7": (wkv7, "vector", True, {}),
    "vector-delta": (generalized_delta_rule, "vector", True, {}),
    "bounded-delta": (generalized_delta_rule, "vector", True, {"decay_bound": -5.0}),
    "scalar-delta": (generalized_delta_rule, "scalar", True, {}),
    "vector-linear": (generalized_delta_rule, "vector", False, {"read": "before"}),
    "scalar-linear": (generalized_delta_rule, "scalar", False, {}),
}
HEADS, KEYS, VALUES = 2, 8, 12
LENGTHS = (1, 31, 32, 1, 1, 33, 51)  # borders at 1, 32, 64, 65, 66, 99


def make_inputs(kind, lengths=LENGTHS, strength=1.0):
    _, decay, delta, options = KINDS[kind]
    time = sum(lengths)
    rng = np.random.default_rng([time, delta])
    normal = lambda *shape: rng.standard_normal((1, time, HEADS, *shape)).astype(np.float32)
    inputs = {"r": normal(KEYS), "k": normal(KEYS), "v": normal(VALUES)}
    width = 1 if decay == "scalar" else KEYS
    strongest = 0.6 if kind == "rwkv7" else -options.get("decay_bound", -20.0)
    inputs["log_w"] = -(strongest ** rng.uniform(-1, 1, (1, time, HEADS, width))).astype("f4")
    inputs["log_w"] = np.maximum(inputs["log_w"], -strongest)
    if delta:
        key = normal(KEYS)
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        inputs |= {"a": -key * np.exp(inputs["log_w"]), "b": key * np.float32(0.7)}
    inputs["state"] = rng.standard_normal((1, HEADS, VALUES, KEYS)).astype(np.float32)
    return inputs


def ids_of(lengths):
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)


@functools.cache
def packed(kind, form):
    op, *_, options = KINDS[kind]

    @jax.jit
    def run(inputs, ids, cotangents):
        run = lambda inputs: op(**inputs, segment_ids=ids, **options, **FORMS[form])
        outputs, pull_back = jax.vjp(run, inputs)
        return outputs, pull_back(cotangents)[0]

    return run


def one_by_one(kind, inputs, lengths, cotangents):
    """The documents by themselves: the first from the state, others from zeros."""
    op, *_, options = KINDS[kind]

    def run(inputs):
        ys, start, state = [], 0, inputs["state"]
        for length in lengths:
            part = {n: x[:, start : start + length] for n, x in inputs.items() if n != "state"}
            y, end = op(**part, state=state, implementation="sequential", **options)
            ys.append(y)
            start, state = start + length, jnp.zeros_like(state)
        return jnp.concatenate(ys, axis=1), end

    outputs, pull_back = jax.vjp(run, {n: jnp.asarray(x) for n, x in inputs.items()})
    return outputs, pull_back(cotangents)[0]


def cotangents_of(lengths):
    rng = np.random.default_rng(5)
    y = rng.standard_normal((1, sum(lengths), HEADS, VALUES)).astype(np.float32)
    return y, rng.standard_normal((1, HEADS, VALUES, KEYS)).astype(np.float32)


def assert_same(kind, form, lengths):
    inputs, cotangents = make_inputs(kind, lengths), cotangents_of(lengths)
    found = packed(kind, form)(inputs, ids_of(lengths), cotangents)
    exact = one_by_one(kind, inputs, lengths, cotangents)
    for name, x, y in zip(("y", "state"), found[0], exact[0], strict=True):
        assert_close(x, y, rel=1e-5, name=name)
    for name, y in exact[1].items():
        assert_close(found[1][name], y, rel=2e-5, name=f"gradient of {name}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_equals_its_documents(kind, form):
    assert_same(kind, form, LENGTHS)


@pytest.mark.thorough
@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["rwkv7", "vector-delta", "scalar-linear"]),
    st.lists(st.sampled_from([1, 2, 15, 16, 17, 30]), min_size=1, max_size=6),
)
def test_any_borders(kind, lengths):
    room = 60 - sum(lengths) if sum(lengths) < 60 else 0
    assert_same(kind, "chunked", tuple(lengths) + ((room,) if room else ()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_crosses_a_border(kind, form):
    """Outputs of document 6 on: their gradients in everything before, and the reverse, are 0."""
    inputs, ids = make_inputs(kind), ids_of(LENGTHS)
    y, end = cotangents_of(LENGTHS)
    border = int(np.flatnonzero(ids[0] == 6)[0])
    behind = np.arange(sum(LENGTHS))[None, :, None, None] >= border
    _, gradients = packed(kind, form)(inputs, ids, (np.where(behind, y, 0), end))
    assert border % 4 and not np.asarray(gradients["state"]).any()
    for name in inputs.keys() - {"state"}:
        gradient = np.asarray(gradients[name])
        assert not gradient[:, :border].any(), name
        assert gradient[:, border:].any(), name
    _, gradients = packed(kind, form)(inputs, ids, (np.where(behind, 0, y), np.zeros_like(end)))
    for name in inputs.keys() - {"state"}:
        assert not np.asarray(gradients[name])[:, border:].any(), name


@pytest.mark.parametrize(
    "kind",
    [
        "rwkv7",
        pytest.param("vector-linear", marks=pytest.mark.thorough),  # reads before it writes
        pytest.param("scalar-delta", marks=pytest.mark.thorough),
        pytest.param("bounded-delta", marks=pytest.mark.thorough),
    ],
)
def test_the_interpreted_tpu_kernel(kind, monkeypatch):
    """Values and all gradients through the op."""
    size = 64 if kind == "rwkv7" else 32  # its kernel takes no other
    monkeypatch.setattr(sys.modules[__name__], "KEYS", size)
    monkeypatch.setattr(sys.modules[__name__], "VALUES", size)
    op, *_, options = KINDS[kind]
    lengths = (1, 15, 16, 1, 1, 30, 1, 21)  # one begins with the kernel's second chunk
    inputs, cotangents = make_inputs(kind, lengths), cotangents_of(lengths)

    def run(form):
        run = lambda inputs: op(
            **inputs, segment_ids=ids_of(lengths), implementation=form, **options
        )
        outputs, pull_back = jax.vjp(run, {n: jnp.asarray(x) for n, x in inputs.items()})
        return outputs, pull_back(cotangents)[0]

    expected = jax.jit(run, static_argnums=0)("sequential")
    for module in (dispatch, recurrence):
        monkeypatch.setattr(module, "current_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(run, static_argnums=0)("pallas")
    for name, x, y in zip(("y", "state"), found[0], expected[0], strict=True):
        assert_close(x, y, rel=1e-5, name=name)
    for name, y in expected[1].items():
        assert_close(found[1][name], y, rel=2e-5, name=f"gradient of {name}")


def test_no_ids_cost_nothing():
    """Where there are no ids they leave no trace in the program."""
    inputs = make_inputs("rwkv7")
    text = lambda **flags: str(
        jax.make_jaxpr(lambda x: wkv7(**x, implementation="chunked", **flags))(inputs)
    )
    assert text() == text(segment_ids=None)
    one = np.ones((1, sum(LENGTHS)), np.int32)
    assert text() != text(segment_ids=one)
    y, state = wkv7(**inputs, implementation="chunked", segment_ids=one)
    expected = wkv7(**inputs, implementation="chunked")
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(state, expected[1])


@pytest.mark.parametrize("kind", ["rwkv7", "scalar-delta", "vector-linear"])
def test_stretches_compose_across_borders(kind):
    """What devices exchange that hold parts of one row: behind a border, S_0 has no part."""
    op, *_, options = KINDS[kind]
    inputs, ids = make_inputs(kind), ids_of(LENGTHS)
    state = inputs.pop("state")
    run = wkv7_affine if op is wkv7 else affine
    y0, z, m, g = run(**inputs, segment_ids=ids, **options)
    y, end = op(**inputs, state=state, segment_ids=ids, **options)
    assert_close(y0 + jnp.einsum("bhvk,bthk->bthv", state, z), y, rel=1e-5)
    assert_close(jnp.einsum("bhvk,bhkj->bhvj", state, m) + g, end, rel=1e-5)
    assert not np.asarray(m).any() and not np.asarray(z)[:, 1:].any() and np.asarray(z[:, 0]).any()


def named_arguments(name, start, stop):
    """Arguments of a named recurrence for the tokens of a stretch."""
    rng = np.random.default_rng(3)
    time = sum(LENGTHS)
    normal = lambda n, *shape: rng.standard_normal((1, n * time, HEADS, *shape)).astype(np.float32)
    several = 2 if name == "gated_delta_product" else 1
    cut = lambda x, n=1: x[:, n * start : n * stop]
    q, k, v = normal(1, KEYS), normal(several, KEYS), normal(several, VALUES)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, gk = -np.exp(normal(1)), -np.exp(normal(1, KEYS))
    beta = 1 / (1 + np.exp(-normal(several)))
    u = rng.standard_normal((HEADS, KEYS)).astype(np.float32)
    rest = {
        "gated_delta_rule": (cut(g), cut(beta)),
        "kda": (cut(gk), cut(beta)),
        "rwkv6": (cut(gk), u),
        "gated_delta_product": (cut(g), cut(beta, 2)),
        "simple_gla": (cut(g),),
    }[name]
    return cut(q), cut(k, several), cut(v, several), *rest


@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "kda", "simple_gla", "rwkv6", "gated_delta_product"]
)
def test_named_recurrences(name):
    """Those that do something of their own with tokens: each document as if alone."""
    run = getattr(recurrences, name)
    y, end = run(*named_arguments(name, 0, sum(LENGTHS)), segment_ids=ids_of(LENGTHS))
    borders = np.cumsum((0, *LENGTHS))
    parts = [run(*named_arguments(name, a, b)) for a, b in zip(borders, borders[1:], strict=False)]
    assert_close(y, jnp.concatenate([own for own, _ in parts], axis=1), rel=1e-5)
    assert_close(end, parts[-1][1], rel=1e-5)


@pytest.mark.parametrize("form", ["sequential", "associative"])
def test_wkv4(form):
    rng = np.random.default_rng(0)
    time, width = sum(LENGTHS) + 300, 6  # more than a segment of its scan
    lengths = (*LENGTHS, 300)
    decay, bonus = rng.standard_normal((2, width)).astype(np.float32)
    k, v, ct = (3 * rng.standard_normal((3, 1, time, width))).astype(np.float32)
    start = np.stack([np.ones((1, width)), np.full((1, width), 2.0), np.zeros((1, width))], 1)
    start = start.astype(np.float32)

    def packed(decay, bonus, k, v, start):
        return wkv4(decay, bonus, k, v, start, segment_ids=ids_of(lengths), implementation=form)

    def alone(decay, bonus, k, v, start):
        ys, at = [], 0
        for length in lengths:
            part = slice(at, at + length)
            y, end = wkv4(decay, bonus, k[:, part], v[:, part], start, implementation="sequential")
            ys.append(y)
            at, start = at + length, None
        return jnp.concatenate(ys, axis=1), end

    arrays = tuple(map(jnp.asarray, (decay, bonus, k, v, start)))
    found, pull_back = jax.vjp(packed, *arrays)
    exact, pull_back_exact = jax.vjp(alone, *arrays)
    cotangents = (jnp.asarray(ct), jnp.zeros_like(found[1]))
    for x, y in zip(found, exact, strict=True):
        assert_close(x, y, rel=1e-5)
    for name, x, y in zip("wukvs", pull_back(cotangents), pull_back_exact(cotangents), strict=True):
        assert_close(x, y, rel=2e-5, name=name)
    first = jnp.asarray(np.where(np.arange(time)[None, :, None] < 64, ct, 0))
    gradients = pull_back((first, jnp.zeros_like(found[1])))
    assert not np.asarray(gradients[2])[:, 64:].any() and not np.asarray(gradients[3])[:, 64:].any()


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[1, 1, 2, 1]], "from 2 to 1 at token 3 of row 0"),
        ([[1, 1, 3, 3]], "from 1 to 3 at token 2"),
        ([[1, 0, 1, 1]], "from 0 to 1 at token 2"),
        ([[1, 2, 0, -1]], "from 0 to -1 at token 3"),
        ([[1, 1, 2]], r"must be int32 \[1, 4\]"),
        ([[1.0, 1, 2, 2]], "got float32"),
        ([1, 1, 2, 2], r"must be int32 \[1, 4\], got int32\[4\]"),
        ([[True, True, False, False]], "got bool"),
    ],
)
def test_ids_that_number_no_documents(ids, message):
    with pytest.raises(ValueError, match=message):
        check_segment_ids("op", jnp.asarray(ids), 1, 4)


def test_ids_are_an_array():
    with pytest.raises(ValueError, match="segment_ids must be .* got a list: use jnp.asarray"):
        check_segment_ids("op", [[1, 1, 2, 2]], 1, 4)


def every_op():
    """Every operation that takes segment_ids, on 4 tokens; attention's in test_packed_attention."""
    rows = {name: make_inputs(name, (4,)) for name in ("rwkv7", "scalar-delta")}
    x = jnp.ones((1, 4, HEADS, KEYS))
    named = {
        name: functools.partial(getattr(recurrences, name), *named_arguments(name, 0, 4))
        for name in ("gated_delta_rule", "kda", "simple_gla", "rwkv6", "gated_delta_product")
    }
    without = {n: y for n, y in rows["rwkv7"].items() if n != "state"}
    return named | {
        "wkv7": functools.partial(wkv7, **rows["rwkv7"]),
        "wkv7_affine": functools.partial(wkv7_affine, **without),
        "generalized_delta_rule": functools.partial(generalized_delta_rule, **rows["scalar-delta"]),
        "wkv4": functools.partial(wkv4, *jnp.ones((2, 6)), *jnp.ones((2, 1, 4, 6))),
        "selection_loss": functools.partial(
            selection_loss, x, x, x, x, chunk_size=2, selector=Selector("mean")
        ),
    }


def test_every_op_refuses_ids_that_number_no_documents():
    wrong = (
        (jnp.asarray([[1, 2, 1, 1]]), "from 2 to 1 at token"),
        (jnp.asarray([[1, 1, 3, 3]]), "from 1 to 3 at token"),
        (jnp.asarray([1, 1, 2, 2]), r"must be int32 \[1, 4\], got int32\[4\]"),
        (jnp.ones((1, 5), jnp.int32), r"must be int32 \[1, 4\], got int32\[1, 5\]"),
        (jnp.ones((1, 4)), "got float32"),
    )
    for name, op in every_op().items():
        for ids, message in wrong:
            with pytest.raises(ValueError, match=message) as error:
                op(segment_ids=ids)
            assert "segment_ids" in str(error.value), name


def test_where_documents_begin():
    ids = jnp.asarray([[1, 1, 2, 0, 0, 3], [0, 0, 0, 0, 0, 0], [7, 8, 8, 8, 9, 0]])
    check_segment_ids("op", ids, 3, 6)
    expected = [[0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1]]
    assert beginnings(ids)[..., 0, 0].astype(int).tolist() == expected

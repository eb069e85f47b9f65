"""Inputs, selections and inspection that the tests of the attention ops share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from tests.helpers import assert_close


def random_qkv(seed, batch, length, keys=None, heads=2, size=16, values=None, dtype=jnp.float32):
    """Normal q [B, Tq, H, K], k [B, Tk, H, K], v [B, Tk, H, V]."""
    keys = length if keys is None else keys
    shapes = (length, size), (keys, size), (keys, values or size)
    rngs = jax.random.split(jax.random.key(seed), 3)
    return [
        jax.random.normal(rng, (batch, time, heads, width)).astype(dtype)
        for rng, (time, width) in zip(rngs, shapes, strict=True)
    ]


def queries_for(selector, q):
    """q with as many vectors of the size of a key as the selector asks with."""
    vectors = [q, q[..., ::-1], -jnp.roll(q, 1, -1)]
    return jnp.concatenate(vectors[: selector.query_vectors], axis=-1)


def random_selection(seed, batch, length, heads, chunk_size, top_k, offsets=0, skip=()):
    """Distinct past chunks in random order, without those in `skip`; some slots left empty."""
    rng = np.random.default_rng(seed)
    offsets = np.broadcast_to(offsets, batch)
    chosen = np.full((batch, length, heads, top_k - 1), -1, np.int32)
    for b, t, h in np.ndindex(batch, length, heads):
        past = np.setdiff1d(np.arange((offsets[b] + t) // chunk_size), skip)
        picked = rng.permutation(past)[: top_k - 1]
        chosen[b, t, h, : len(picked)] = picked
        if rng.random() < 0.1:
            chosen[b, t, h, :1] = -1
    return jnp.asarray(chosen)


def value_and_gradients(attend):
    """(q, k, v, *more) -> (out, dq, dk, dv) under one random cotangent; compiled."""

    @jax.jit
    def run(q, k, v, *more):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, *more), q, k, v)
        cotangent = jax.random.normal(jax.random.key(99), out.shape).astype(out.dtype)
        return out, *pullback(cotangent)

    return run


def compare(actual, expected, *, forward=1e-5, gradient=1e-4):
    """Asserts that two results of `value_and_gradients` agree, relative to the largest entries."""
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        if np.abs(e).max() > 1e-6:
            assert_close(a, e, rel=forward if name == "out" else gradient, name=name)
        else:  # one key: its weight is 1 whatever q and k are, and nothing flows but rounding
            assert np.abs(a).max() <= 1e-6, name


def jaxpr_shapes(function, *args):
    """Shapes of every array that the traced function makes, inner loops included."""
    seen = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            seen.extend(v.aval.shape for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return seen

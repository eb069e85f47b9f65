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


def with_resets(reset, decay=constant(-1e-3)):
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


def oracle(inputs, cotangents, *, before):
    """(y, end), gradients in float64."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (inputs, cotangents))
        inputs, cotangents = exact
        run = functools.partial(sequential, before=before)
        outputs, pull = jax.vjp(run, *inputs)
        return jax.tree.map(np.asarray, (outputs, pull(cotangents)))


def kernel(inputs, cotangents, **options):
    @jax.jit
    def run(inputs, cotangents):
        outputs, pull = jax.vjp(functools.partial(generalized_delta_rule, **options), *inputs)
        return outputs, pull(cotangents)

    return run(inputs, cotangents)


def errors(inputs, cotangents, *, read="after", tile=SMALL, interpret=None, **options):
    """Of y, end and each gradient: name -> (found, expected)."""
    interpret = pltpu.InterpretParams() if interpret is None else interpret
    (y, end), grads = kernel(
        inputs, cotangents, read=read, tile=tile, interpret=interpret, **options
    )
    assert y.dtype == inputs[3].dtype and end.dtype == jnp.float32
    (y0, end0), grads0 = oracle(inputs, cotangents, before=read == "before")
    found = {"y": (y, y0), "end": (end, end0)}
    for name, x, grad, grad0 in zip(NAMES, inputs, grads, grads0, strict=True):
        if x is not None:
            assert grad.dtype == x.dtype, name
            found[f"gradient of {name}"] = (grad, grad0)
    return found


def check(decay, rel=1e-5, *, read="after", tile=SMALL, decay_bound=None, interpret=None, **sizes):
    inputs, cotangents = make_inputs(decay, **sizes)
    found = errors(
        inputs, cotangents, read=read, tile=tile, decay_bound=decay_bound, interpret=interpret
    )
    for name, (x, x0) in found.items():
        assert_close(x, x0, rel=rel, name=name)

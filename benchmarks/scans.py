"""The rivals of recurrence.py: RWKV-7 as scans over tokens, differentiated by JAX or by hand."""

import functools

import jax
import jax.numpy as jnp


def outer(v, k):
    return v[..., :, None] * k[..., None, :]


def einsum_step(state, token):
    """The recurrence as it is written."""
    r, w, k, v, a, b = token
    removed = jnp.einsum("bhvk,bhk->bhv", state, a)
    state = state * w[..., None, :] + outer(removed, b) + outer(v, k)
    return state, jnp.einsum("bhvk,bhk->bhv", state, r)


def sum_step(state, token):
    """No matrix products: elementwise multiplication and sums."""
    r, w, k, v, a, b = token
    removed = (state * a[..., None, :]).sum(-1)
    state = state * w[..., None, :] + outer(removed, b) + outer(v, k)
    return state, (state * r[..., None, :]).sum(-1)


def product_step(state, token):
    """Matrix products only, the outer products too: so are their derivatives, then."""
    r, w, k, v, a, b = token
    removed = jnp.einsum("bhvk,bhk->bhv", state, a)
    written = jnp.einsum("bhnv,bhnk->bhvk", jnp.stack([removed, v], 2), jnp.stack([b, k], 2))
    state = decay(state, w) + written
    return state, jnp.einsum("bhvk,bhk->bhv", state, r)


@jax.custom_vjp
def decay(state, w):
    return state * w[..., None, :]


def decay_backward(saved, d_state):
    state, w = saved
    return d_state * w[..., None, :], jnp.einsum("bhvk,bhvk->bhk", d_state, state)


decay.defvjp(lambda state, w: (decay(state, w), (state, w)), decay_backward)


@jax.custom_vjp
def hand_written_step(state, token):
    """`einsum_step` with a gradient written by hand: sums are products, outer products are not."""
    return einsum_step(state, token)


def hand_written_forward(before, token):
    removed = jnp.einsum("bhvk,bhk->bhv", before, token[4])
    state, y = einsum_step(before, token)
    return (state, y), (before, state, removed, token)


def hand_written_backward(saved, cotangents):
    before, state, removed, (r, w, k, v, a, b) = saved
    d_state, d_y = cotangents
    rows = functools.partial(jnp.einsum, "bhv,bhvk->bhk")
    columns = functools.partial(jnp.einsum, "bhvk,bhk->bhv")
    d_r = rows(d_y, state)
    d_state += outer(d_y, r)
    d_removed = columns(d_state, b)
    d_w = jnp.einsum("bhvk,bhvk->bhk", d_state, before)
    d_token = (
        d_r,
        d_w,
        rows(v, d_state),
        columns(d_state, k),
        rows(d_removed, before),
        rows(removed, d_state),
    )
    return d_state * w[..., None, :] + outer(d_removed, a), d_token


hand_written_step.defvjp(hand_written_forward, hand_written_backward)


def scan(step, keep_every=None):
    """A scan of `step` over tokens; `keep_every` n: states are kept every n tokens only (remat)."""

    def run(r, log_w, k, v, a, b, state):
        tokens = tuple(x.swapaxes(0, 1) for x in (r, jnp.exp(log_w), k, v, a, b))
        if keep_every is None:
            state, y = jax.lax.scan(step, state, tokens)
        else:
            pieces = tuple(x.reshape(-1, keep_every, *x.shape[1:]) for x in tokens)
            piece = jax.checkpoint(lambda s, x: jax.lax.scan(step, s, x), prevent_cse=False)
            state, y = jax.lax.scan(piece, state, pieces)
            y = y.reshape(-1, *y.shape[2:])
        return y.swapaxes(0, 1), state

    return run


SCANS = {
    "einsum scan": scan(einsum_step),
    "einsum scan, keep every 16th": scan(einsum_step, 16),
    "multiply-and-sum scan": scan(sum_step),
    "multiply-and-sum scan, keep every 16th": scan(sum_step, 16),
    "products-only scan": scan(product_step),
    "products-only scan, keep every 16th": scan(product_step, 16),
    "products-only scan, keep every 32nd": scan(product_step, 32),
    "hand-written gradient, scan": scan(hand_written_step),
    "hand-written gradient, scan, keep every 16th": scan(hand_written_step, 16),
    "hand-written gradient, scan, keep every 32nd": scan(hand_written_step, 32),
}

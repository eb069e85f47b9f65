"""The matrix-state recurrence as it is written, a token at a time in float32: the oracle."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="reads_before")
def sequential(
    tokens: dict[str, jax.Array], state: jax.Array, *, reads_before: bool = False
) -> tuple[jax.Array, jax.Array]:
    """S_t = S_{t-1} diag(exp(log_w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T.

    Its gradient is automatic differentiation, which keeps several states a token: a reference, not
    a way to train.

    Args:
      tokens: r, k [B, T, H, K], v [B, T, H, V], log_w [B, T, H, K or 1] and, if anything is
        removed, a and b [B, T, H, K]; fresh [B, T, 1, 1], not 0 where the state before the token
        is forgotten.
      state: S_0 [B, H, V, K], float32.
      reads_before: y_t = S_{t-1} r_t instead of S_t r_t.

    Returns:
      y [B, T, H, V] in v's dtype and the final state.
    """

    def dot(equation, x, y):
        return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)

    def step(state, token):
        token = {name: x.astype(jnp.float32) for name, x in token.items()}  # [B, H, K]
        if "fresh" in token:
            state = jnp.where(token["fresh"][..., None] > 0, 0, state)
        before = state
        state = state * jnp.exp(token["log_w"])[:, :, None, :]
        if "a" in token:
            removed = dot("bhvk,bhk->bhv", before, token["a"])
            state += removed[..., None] * token["b"][:, :, None, :]
        state += token["v"][..., None] * token["k"][:, :, None, :]
        return state, dot("bhvk,bhk->bhv", before if reads_before else state, token["r"])

    by_time = {name: x.swapaxes(0, 1) for name, x in tokens.items()}
    state, y = jax.lax.scan(step, state, by_time)
    return y.swapaxes(0, 1).astype(tokens["v"].dtype), state

"""The linear recurrences of the field by their names, as settings of `generalized_delta_rule`.

Arguments are named and laid out as in fla (flash-linear-attention), time before heads; states are
[B, H, V, K], the transpose of fla's. `g` is the logarithm of a decay. Where a `scale` multiplies
the reads, None means K**-0.5. Other keyword arguments are those of `generalized_delta_rule`:
`segment_ids`, `implementation` and `chunk_size`. Every function returns (output, final state),
takes any number of tokens, and is differentiable in all its arrays. Equations and costs:
docs/recurrences.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from rwkvx_jax.ops.delta_rule import generalized_delta_rule
from rwkvx_jax.ops.documents import check_segment_ids

Output = tuple[Float[Array, "B T HV V"], Float32[Array, "B HV V K"]]


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    state: Float32[Array, "B HV V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """Gated DeltaNet (arXiv 2412.06464): S_t = e^g (S - beta (S k) k^T) + beta v k^T, y_t = S_t q.

    One decay a head. k should have unit length, and beta lie in (0, 1), or (0, 2).
    """
    removed, decay, beta = _to_heads(k, v), jnp.exp(_column(g)), _column(beta)
    return generalized_delta_rule(
        _scaled(q, scale), _column(g), k, _times(v, beta),
        -removed, _times(removed, beta * decay), state,
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "B T HV"],
    state: Float32[Array, "B HV V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """DeltaNet (arXiv 2406.06484): `gated_delta_rule` without decay."""
    g = jnp.zeros(beta.shape, jnp.float32)
    return gated_delta_rule(
        q, k, v, g, beta, state,
        scale=scale, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def gated_delta_product(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B nT H K"],
    v: Float[Array, "B nT H V"],
    g: Float[Array, "B T H"],
    beta: Float[Array, "B nT H"],
    state: Float32[Array, "B H V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H V K"]]:
    """Gated DeltaProduct (arXiv 2502.10297): n updates a token, the token's decay before the first.

    Update j of token t is row n t + j of k, v and beta. Costs what n T tokens cost.
    """
    updates = k.shape[1] // q.shape[1]
    if updates * q.shape[1] != k.shape[1]:
        raise ValueError(
            f"gated_delta_product: k has {k.shape[1]} rows, no multiple of the {q.shape[1]} of q"
        )
    # Only the last update of a token is read, and only its first decays.
    spread = lambda x, at: (
        jnp.zeros((*k.shape[:2], *x.shape[2:]), x.dtype).at[:, at::updates].set(x)
    )
    ids = None
    if segment_ids is not None:
        check_segment_ids("gated_delta_product", segment_ids, *q.shape[:2])
        ids = jnp.repeat(segment_ids, updates, axis=1)
    y, state = gated_delta_rule(
        spread(q, updates - 1), k, v, spread(g, 0), beta, state,
        scale=scale, segment_ids=ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip
    return y[:, updates - 1 :: updates], state


def kda(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    state: Float32[Array, "B HV V K"] | None = None,
    *,
    scale: float | None = None,
    decay_bound: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay a key channel.

    With S' = S diag(e^g): S_t = S' + beta (v - S' k) k^T, y_t = S_t q. `decay_bound`, -5.0 for the
    bounded gate of Kimi Linear, makes it cheaper.
    """
    removed, beta = _to_heads(k, v), _column(beta)
    return generalized_delta_rule(
        _scaled(q, scale), g, k, _times(v, beta),
        -_times(removed, jnp.exp(g)), _times(removed, beta), state,
        decay_bound=decay_bound, segment_ids=segment_ids, implementation=implementation,
        chunk_size=chunk_size,
    )  # fmt: skip


def comba(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    p: Float[Array, "B T H K"],
    g: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    state: Float32[Array, "B HV V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """Comba (arXiv 2506.02475): S_t = e^g S - beta e^g (S p) k^T + beta v k^T, y_t = S_t q.

    `gated_delta_rule` with a key p of its own for what is removed.
    """
    decay, beta = jnp.exp(_column(g)), _column(beta)
    return generalized_delta_rule(
        _scaled(q, scale), _column(g), k, _times(v, beta),
        -_times(_to_heads(p, v), decay), _times(_to_heads(k, v), beta), state,
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def gla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H K"],
    state: Float32[Array, "B H V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """Gated linear attention (arXiv 2312.06635): S_t = S diag(e^g) + v k^T, y_t = S_t q."""
    return generalized_delta_rule(
        _scaled(q, scale), g, k, v, state=state,
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def simple_gla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"],
    state: Float32[Array, "B HV V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """Linear attention with one decay a head and token: S_t = e^g S + v k^T, y_t = S_t q."""
    return generalized_delta_rule(
        _scaled(q, scale), _column(g), k, v, state=state,
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def retention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float32[Array, "B H V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """Retention of RetNet (arXiv 2307.08621): head h decays by 1 - 2**(-5 - h) at every token."""
    g = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(q.shape[2]))))
    return simple_gla(
        q, k, v, _constant(g, q), state,
        scale=scale, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    slope: Float[Array, " H"],
    state: Float32[Array, "B H V K"] | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """Lightning attention (arXiv 2401.04658, MiniMax-01): head h decays by exp(-slope_h)."""
    return simple_gla(
        q, k, v, _constant(-slope, q), state,
        scale=scale, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def mamba2(
    x: Float[Array, "B T HV V"],
    dt: Float[Array, "B T HV"],
    a: Float[Array, " HV"],
    b: Float[Array, "B T H K"],
    c: Float[Array, "B T H K"],
    state: Float32[Array, "B HV V K"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """State-space duality of Mamba-2 (arXiv 2405.21060): S_t = e^(a dt) S + dt x b^T, y_t = S_t c.

    a is negative, dt positive; H is the number of groups that share b and c. The skip D x is the
    caller's.
    """
    g = dt.astype(jnp.float32) * a.astype(jnp.float32)
    return generalized_delta_rule(
        c, _column(g), b, _times(x, _column(dt)), state=state,
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def rwkv6(
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "B T H K"],
    u: Float[Array, "H K"],
    state: Float32[Array, "B H V K"] | None = None,
    *,
    scale: float | None = 1.0,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """RWKV-6 (arXiv 2404.05892): y_t = (S_{t-1} + v (u k)^T) r, then S_t = S diag(e^w) + v k^T.

    w is the logarithm of the decay; u weighs the token's own value.
    """
    r = _scaled(r, scale)
    y, state = generalized_delta_rule(
        r, w, k, v, state=state, read="before",
        segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip
    bonus = jnp.einsum("bthk,hk,bthk->bth", *(x.astype(jnp.float32) for x in (r, u, k)))
    return (y + bonus[..., None] * v.astype(jnp.float32)).astype(v.dtype), state


def rwkv5(
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    w: Float[Array, "H K"],
    u: Float[Array, "H K"],
    state: Float32[Array, "B H V K"] | None = None,
    *,
    scale: float | None = 1.0,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Output:
    """RWKV-5 (arXiv 2404.05892): `rwkv6` with decays that do not depend on the token."""
    return rwkv6(
        r, k, v, jnp.broadcast_to(w.astype(jnp.float32), r.shape), u, state,
        scale=scale, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip


def _scaled(q: jax.Array, scale: float | None) -> jax.Array:
    return q * (q.shape[-1] ** -0.5 if scale is None else scale)


def _column(x: jax.Array) -> jax.Array:
    """[B, T, H] -> float32 [B, T, H, 1]."""
    return x.astype(jnp.float32)[..., None]


def _times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The float32 product in the dtype of x."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _to_heads(k: jax.Array, v: jax.Array) -> jax.Array:
    """k with the heads of v: those in a row share one of k's."""
    groups = v.shape[2] // k.shape[2] if k.shape[2] else 0
    return k if groups <= 1 else jnp.repeat(k, groups, axis=2)


def _constant(g: jax.Array, q: jax.Array) -> jax.Array:
    """Decays [H] for every token of q [B, T, H, K]: [B, T, H]."""
    return jnp.broadcast_to(g.astype(jnp.float32), q.shape[:3])

"""The recurrence of RWKV-4: per channel, an average of values weighted by keys that fade.

    y_t = (A_{t-1} + e^{u + k_t} v_t) / (D_{t-1} + e^{u + k_t})
    A_t = w A_{t-1} + e^{k_t} v_t     D_t = w D_{t-1} + e^{k_t}     w = exp(-exp(time_decay))

RWKV-4 (arXiv 2305.13048), equations 16 to 18. The state is scalar, so this is no setting of
`generalized_delta_rule`. A and D are kept as multiples of e^m, with m the largest exponent in them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from rwkvx_jax.ops.dispatch import Candidate, resolve
from rwkvx_jax.ops.documents import beginnings, check_segment_ids

SEGMENT = 256  # tokens whose weights are scanned at once; the backward pass recomputes them


def wkv4(
    time_decay: Float[Array, " D"],
    time_first: Float[Array, " D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    state: Float32[Array, "B 3 D"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float32[Array, "B 3 D"]]:
    """Runs the recurrence of RWKV-4 over a sequence; differentiable in all arrays.

    Args:
      time_decay: w is exp(-exp(time_decay)).
      time_first: u, the bonus of the token itself.
      k, v: keys and values.
      state: rows A e^-m, D e^-m and m before the first token; None, or zeros: nothing was read.
      valid: tokens that count; others leave the state alone, and their outputs mean nothing.
      segment_ids: numbers of packed documents (`documents`): nothing was read where one begins. The
        start state is of the document of the first token. None: all tokens are of one.
      implementation: "sequential" (oracle), "associative" (a scan in parallel), or None for the
        latter.

    Returns:
      y [B, T, D] in v's dtype, and the state after the last token.

    Raises:
      ValueError: shapes do not agree, segment_ids number no documents, or the implementation is
        unknown.
    """
    batch, time, width = k.shape
    wanted = {"time_decay": (width,), "time_first": (width,), "v": k.shape}
    found = {"time_decay": time_decay, "time_first": time_first, "v": v}
    if state is not None:
        wanted["state"], found["state"] = (batch, 3, width), state
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"wkv4: {name} must be {shape} for k {k.shape}, got {found[name].shape}"
            )
    chosen = resolve("wkv4", implementation, (Candidate("associative"), Candidate("sequential")))
    if state is None:
        state = jnp.zeros((batch, 3, width), jnp.float32)
    u, k, log_w = (x.astype(jnp.float32) for x in (time_first, k, -jnp.exp(time_decay)))
    log_w = jnp.broadcast_to(log_w, k.shape)
    if valid is not None:
        k, log_w = jnp.where(valid[..., None], k, -jnp.inf), jnp.where(valid[..., None], log_w, 0)
    fresh = jnp.zeros_like(k[..., :1], bool)
    if segment_ids is not None:
        check_segment_ids("wkv4", segment_ids, batch, time)
        fresh = beginnings(segment_ids)[..., 0] > 0
    run = _sequential if chosen == "sequential" else _associative
    # Inside, sums of nothing have the exponent -inf; outside, states are finite.
    num, den, top = (state[:, i] for i in range(3))
    start = (num, den, jnp.where(den == 0, -jnp.inf, top))
    y, (num, den, top) = run(u, log_w, k, v.astype(jnp.float32), fresh, start)
    end = jnp.stack([num, den, jnp.where(den == 0, 0, top)], axis=1)
    return y.astype(v.dtype), end


def _added(first, second):
    """Two weighted sums (A, D, m), each times e^m, as one."""
    (a1, d1, m1), (a2, d2, m2) = first, second
    m = jax.lax.stop_gradient(jnp.maximum(m1, m2))
    # Nothing and nothing are 0 at m = -inf; a finite factor has a gradient there.
    factor = jnp.where(jnp.isneginf(m), 0.0, m)
    e1, e2 = jnp.exp(m1 - factor), jnp.exp(m2 - factor)
    return a1 * e1 + a2 * e2, d1 * e1 + d2 * e2, m


def _begun(sums, fresh):
    """Sums of nothing where a document begins."""
    a, d, m = sums
    nothing = lambda x, empty: jnp.where(fresh, empty, x)
    return nothing(a, 0), nothing(d, 0), nothing(m, -jnp.inf)


def _output(before, u, k, v):
    """y of tokens, given the sums before each."""
    a, d, _ = _added(before, (v, jnp.ones_like(v), u + k))
    return a / jnp.where(d == 0, 1, d)  # of tokens that do not count, there may be nothing


def _sequential(u, log_w, k, v, fresh, start):
    def step(before, token):
        log_w, k, v, fresh = token
        before = a, d, m = _begun(before, fresh)
        after = _added((a, d, m + log_w), (v, jnp.ones_like(v), k))
        return after, _output(before, u[None], k, v)

    end, y = jax.lax.scan(step, start, tuple(x.swapaxes(0, 1) for x in (log_w, k, v, fresh)))
    return y.swapaxes(0, 1), end


def _associative(u, log_w, k, v, fresh, start):
    """Segments one after the other, the tokens of each by a scan in parallel."""
    time = k.shape[1]
    length = min(SEGMENT, time)

    def cut(x, filling):  # tokens of weight e^-inf add nothing
        x = jnp.pad(x, ((0, 0), (0, -time % length), (0, 0)), constant_values=filling)
        return x.reshape(x.shape[0], -1, length, x.shape[2]).swapaxes(0, 1)

    def combine(first, second):
        (a1, d1, m1, w1, _), (a2, d2, m2, w2, fresh) = first, second
        a1, d1, m1 = _begun((a1, d1, m1), fresh)
        return (*_added((a1, d1, m1 + w2), (a2, d2, m2)), w1 + w2, first[-1] | fresh)

    @jax.checkpoint
    def segment(start, xs):
        log_w, k, v, fresh = xs
        begin = (*(x[:, None] for x in start), jnp.zeros_like(k[:, :1]), fresh[:, :1] & False)
        tokens = (v, jnp.ones_like(v), k, log_w, fresh)
        together = tuple(
            jnp.concatenate([x, y], axis=1) for x, y in zip(begin, tokens, strict=True)
        )
        sums = jax.lax.associative_scan(combine, together, axis=1)[:3]
        before = _begun(tuple(x[:, :-1] for x in sums), fresh)
        y = _output(before, u[None, None], k, v)
        return tuple(x[:, -1] for x in sums), y

    xs = cut(log_w, 0), cut(k, -jnp.inf), cut(v, 0), cut(fresh, False)
    end, y = jax.lax.scan(segment, start, xs)
    return y.swapaxes(0, 1).reshape(k.shape[0], -1, k.shape[2])[:, :time], end

"""Chunk-parallel WKV-7 in plain JAX: matrix products in chunks, a short recurrence between them.

The sequence is cut into chunks of C tokens. Inside a chunk the recurrence is solved exactly by
matrix products (with a unit lower triangular inverse, C x C); between chunks only the state is
passed, one chunk after the other ("chunked") or by an associative scan over the chunks' affine maps
("associative"). N chunks, a segment, are processed at once, so that intermediate values stay small.
The backward pass is written by hand: it keeps the inputs and the state at the start of every
segment, and recomputes the rest.

Inside this file the state is P = S^T, [.., K, V], as the formulas are written for row vectors, and
arrays of a segment are [N, B, H, C, K]. For a chunk that starts from P, with g the running sum of
log_w within it (gi including the own token, ge excluding it, gl at the end, g* in the middle):

    L = [a e^(ge-g*) ; r e^(gi-g*)]     R = [b e^(g*-gi) ; k e^(g*-gi)]             2C rows each
    A = L R^T where s < t, and s = t for the rows of r, = [[ab, ak], [rb, rk]]      2C x 2C
    X = (I - ab)^-1     W = X (a e^ge)     U0 = X ak v     U = W P + U0
    y = (r e^gi) P + [rb rk] [U ; v]
    P' = e^gl P + [b e^(gl-gi) ; k e^(gl-gi)]^T [U ; v]        affine in P: P' = M P + G

U holds what the removal keys read, one row a token. Taken from the middle of the chunk, exponents
stay within +-0.6065 C / 2, and scaling by them costs no precision: products keep relative errors.
With one decay a head, log_w [.., C, 1], L and R are not scaled. A is multiplied by e^(ge_t - gi_s)
or e^(gi_t - gi_s), which are sums between tokens and need no bound (`decays`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from rwkvx_jax.ops.decays import Decays, decays_of_channels, decays_of_heads, running_sum

# Entries of L R^T above the diagonal reach e^(0.6065 C): e^78 fits float32 at 128, e^155 does not.
MAX_CHUNK_SIZE = 128

# Forms that solve several tokens at once scale by e to the decays summed over half of them: e^80
# leaves float32 a factor of 6000 for the inputs, and e^-80 one of 1500 before precision is lost.
MAX_EXPONENT = 80

# CPU: half the stored states of chunks of 16, and what a chunk of a few heads needs stays in the
# second-level cache. Elsewhere, not measured: matrices large enough for a matrix unit, and
# independent chunks to fill it between two steps of the state.
CHUNK_SIZE = {"cpu": 32, "gpu": 64, "tpu": 64}
SEGMENT = {"cpu": 1, "gpu": 8, "tpu": 8}

_SMALL = 16  # below it, products over halves of the blocks cost more than they save


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut; hashable, fixed before tracing.

    Attributes:
      chunk_size: C, a power of two up to MAX_CHUNK_SIZE.
      segment: N, chunks processed at once; None for all of them.
      associative: pass the state between the chunks of a segment by an associative scan.
      precision: precision of the matrix products.
    """

    chunk_size: int
    segment: int | None
    associative: bool
    precision: jax.lax.Precision

    def fit(self, tokens: int) -> tuple["Plan", int]:
        """Shrinks chunk and segment to what `tokens` need; returns the padded length as well."""
        size = min(self.chunk_size, 1 << (tokens - 1).bit_length())
        chunks = -(-tokens // size)
        segments = -(-chunks // (self.segment or chunks))
        segment = -(-chunks // segments)  # equal segments waste the fewest tokens
        return dataclasses.replace(
            self, chunk_size=size, segment=segment
        ), segments * segment * size


@functools.partial(jax.jit, static_argnames="plan")
def wkv7_chunked(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T H _"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float32[Array, "B H V K"],
    *,
    plan: Plan,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H V K"]]:
    """`recurrence.wkv7` by chunks, arguments already validated; returns y and the final state.

    With one decay a head, log_w [B, T, H, 1], that may have any strength.
    """
    tokens = r.shape[1]
    plan, padded = plan.fit(tokens)
    inputs: tuple[jax.Array, ...] = (r, log_w, k, v, a, b)
    if padded > tokens:
        # A token of zeros leaves the state alone: no decay (log_w = 0), nothing read or written.
        inputs = tuple(jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))) for x in inputs)
    y, end = _wkv7(plan, inputs, _transpose(state))
    return y[:, :tokens], _transpose(end)


# ------------------------------------------------------------ all segments, with their own gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv7(plan, inputs, start):
    return _forward(plan, inputs, start)[0]


def _forward(plan, inputs, start):
    """Segments in order. Returns (y, end state) and the residuals of `_backward`."""
    tokens = plan.segment * plan.chunk_size

    def step(carry, i):
        start, y = carry
        end, y_segment = _segment_forward(plan, cut(plan, inputs, i), start)
        return (end, put(y, y_segment, i)), start

    carry = (start, jnp.zeros_like(inputs[3]))
    (end, y), starts = jax.lax.scan(step, carry, jnp.arange(inputs[3].shape[1] // tokens))
    return (y, end), (inputs, starts, end)


def _backward(plan, residuals, cotangents):
    """Segments in reverse order, each recomputed from the state at its start."""
    inputs, starts, end = residuals
    dy, d_end = cotangents

    def step(carry, xs):
        d_end, end, gradients = carry
        i, start = xs
        segment, (dy_segment,) = cut(plan, inputs, i), cut(plan, (dy,), i)
        d_start, pieces = _segment_backward(plan, segment, start, end, dy_segment, d_end)
        gradients = tuple(put(g, d, i) for g, d in zip(gradients, pieces, strict=True))
        return (d_start, start, gradients), None

    carry = (d_end, end, tuple(map(jnp.zeros_like, inputs)))
    xs = (jnp.arange(starts.shape[0]), starts)
    (d_start, _, gradients), _ = jax.lax.scan(step, carry, xs, reverse=True)
    return gradients, d_start


_wkv7.defvjp(_forward, _backward)


def cut(plan, arrays, i):
    """Segment `i` of arrays [B, T, H, K], by chunks: float32 [N, B, H, C, K]."""
    tokens = plan.segment * plan.chunk_size

    def cut(x):
        x = jax.lax.dynamic_slice_in_dim(x, i * tokens, tokens, axis=1).astype(jnp.float32)
        x = x.reshape(x.shape[0], plan.segment, plan.chunk_size, *x.shape[2:])
        return x.transpose(1, 0, 3, 2, 4)

    return tuple(map(cut, arrays))


def put(array, piece, i):
    """Writes a segment [N, B, H, C, K] into its place in [B, T, H, K], in the array's dtype."""
    n, batch, heads, size, width = piece.shape
    piece = piece.transpose(1, 0, 3, 2, 4).reshape(batch, n * size, heads, width)
    piece = piece.astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, piece, i * n * size, axis=1)


# ---------------------------------------------------------------------------------- one segment


class _Chunks(NamedTuple):
    """The chunks of a segment, as far as they do not depend on the state."""

    decays: Decays
    left: jax.Array  # [N, B, H, 2C, K] L
    right: jax.Array  # [N, B, H, 2C, K] R
    scores: jax.Array  # [N, B, H, 2C, 2C] A
    inverse: jax.Array  # [N, B, H, C, C] X
    read: jax.Array  # [N, B, H, 2C, K] [W ; r e^gi]: reads the state at the start
    write: jax.Array  # [N, B, H, 2C, K] R e^(gl-g*): writes to the state at the end
    u0: jax.Array  # [N, B, H, C, V]
    v: jax.Array  # [N, B, H, C, V]


def _prepare(plan, segment) -> _Chunks:
    r, log_w, k, v, a, b = segment
    size = plan.chunk_size
    decays = (decays_of_heads if log_w.shape[-1] == 1 else decays_of_channels)(log_w)
    left = _stack(a * decays.scale_a, r * decays.scale_r)
    right = _stack(b * decays.scale_bk, k * decays.scale_bk)
    scores = _causal(_dot(plan, "...ik,...jk->...ij", left, right)) * decays.scores
    inverse = unit_inverse(plan, scores[..., :size, :size])
    read = left * decays.from_start
    w = _dot(plan, "...ij,...jk->...ik", inverse, read[..., :size, :])
    u0 = _dot(plan, "...ij,...jv->...iv", scores[..., :size, size:], v)
    return _Chunks(
        decays=decays,
        left=left,
        right=right,
        scores=scores,
        inverse=inverse,
        read=_stack(w, read[..., size:, :]),
        write=right * decays.to_end,
        u0=_dot(plan, "...ij,...jv->...iv", inverse, u0),
        v=v,
    )


def _segment_forward(plan, segment, start):
    """Returns the state after the segment, and y [N, B, H, C, V]."""
    size = plan.chunk_size
    chunks = _prepare(plan, segment)
    states, u, end = _pass_states(plan, chunks, start)
    y = _dot(plan, "...ik,...kv->...iv", chunks.read[..., size:, :], states)
    y += _dot(plan, "...ij,...jv->...iv", chunks.scores[..., size:, :], _stack(u, chunks.v))
    return end, y


def _segment_backward(plan, segment, start, end, dy, d_end):
    """Returns the gradients of the start state and of the six inputs [N, B, H, C, K].

    `end` is the state after the segment, known from the forward pass.
    """
    r, log_w, k, v, a, b = segment
    size = plan.chunk_size
    chunks = _prepare(plan, segment)
    decays = chunks.decays
    states, u, _ = _pass_states(plan, chunks, start)
    d_uv = _dot(plan, "...ji,...jv->...iv", chunks.scores[..., size:, :], dy)  # what y adds
    d_ends, d_u, d_start = _pass_cotangents(plan, chunks, dy, d_uv[..., :size, :], d_end)

    d_z = _dot(plan, "...ji,...jv->...iv", chunks.inverse, d_u)  # U = X Z, Z = (a e^ge) P + ak v
    d_v = d_uv[..., size:, :]
    d_v += _dot(plan, "...ik,...kv->...iv", chunks.write[..., size:, :], d_ends)
    d_v += _dot(plan, "...ji,...jv->...iv", chunks.scores[..., :size, size:], d_z)

    d_zy, uv = _stack(d_z, dy), _stack(u, v)
    d_scores = _causal(_dot(plan, "...iv,...jv->...ij", d_zy, uv)) * decays.scores
    d_left = _dot(plan, "...ij,...jk->...ik", d_scores, chunks.right)
    d_left += decays.from_start * _dot(plan, "...iv,...kv->...ik", d_zy, states)
    d_right = _dot(plan, "...ij,...ik->...jk", d_scores, chunks.left)
    d_right += decays.to_end * _dot(plan, "...iv,...kv->...ik", uv, d_ends)
    d_a, d_r = d_left[..., :size, :] * decays.scale_a, d_left[..., size:, :] * decays.scale_r
    d_b, d_k = d_right[..., :size, :] * decays.scale_bk, d_right[..., size:, :] * decays.scale_bk

    # The decay enters through gi: L grows with it, R falls; the rows of a belong to the token
    # before. All that flows through the end of the chunk adds sum_v P' dP' to each of its tokens.
    a_da = a * d_a
    d_total = r * d_r + a_da - b * d_b - k * d_k
    ends = jnp.concatenate([states[1:], end[None]])
    # A product with ones, as XLA's fused sums are many times slower on a CPU.
    d_last = _dot(plan, "...kv,v->...k", ends * d_ends, np.ones(end.shape[-1], np.float32))
    d_log_w = running_sum(d_total, reverse=True) - a_da + d_last[..., None, :]
    if log_w.shape[-1] == 1:
        d_log_w = _dot(plan, "...k,k->...", d_log_w, np.ones(d_log_w.shape[-1], np.float32))
        d_log_w = jnp.where(jnp.isneginf(log_w), 0, d_log_w[..., None])  # of a reset exactly 0
    return d_start, (d_r, d_log_w, d_k, d_v, d_a, d_b)


# --------------------------------------------------------------------- the state between chunks


def _pass_states(plan, chunks, start):
    """From the start state [B, H, K, V]: the state before every chunk, U, and the end state."""
    size = plan.chunk_size
    w = chunks.read[..., :size, :]
    if plan.associative:
        m, g = chunk_maps(plan, chunks)
        m, g = jax.lax.associative_scan(functools.partial(compose, plan), (m, g))
        ends = _dot(plan, "n...ij,...jv->n...iv", m, start) + g
        states = jnp.concatenate([start[None], ends[:-1]])
        return states, _dot(plan, "...ik,...kv->...iv", w, states) + chunks.u0, ends[-1]

    def step(state, xs):
        w, u0, v, write, keep = xs
        u = _dot(plan, "...ik,...kv->...iv", w, state) + u0
        end = keep * state + _dot(plan, "...ik,...iv->...kv", write, _stack(u, v))
        return end, (state, u)

    xs = (w, chunks.u0, chunks.v, chunks.write, chunks.decays.keep)
    end, (states, u) = jax.lax.scan(step, start, xs)
    return states, u, end


def _pass_cotangents(plan, chunks, dy, d_u, d_end):
    """The same backwards: gradients of the state after every chunk, of U, and of the start state.

    `d_u` [N, B, H, C, V] holds what reaches U through y; the part through the end state is added.
    """
    write_b = chunks.write[..., : plan.chunk_size, :]
    if plan.associative:
        m, _ = chunk_maps(plan, chunks)
        through_y = _dot(plan, "...ik,...iv->...kv", chunks.read, _stack(d_u, dy))
        m, through_y = jax.lax.associative_scan(
            functools.partial(compose, plan), (_transpose(m), through_y), reverse=True
        )
        d_states = _dot(plan, "n...ij,...jv->n...iv", m, d_end) + through_y
        d_ends = jnp.concatenate([d_states[1:], d_end[None]])
        d_u += _dot(plan, "...ik,...kv->...iv", write_b, d_ends)
        return d_ends, d_u, d_states[0]

    def step(d_end, xs):
        write_b, read, keep, d_u, dy = xs
        d_u += _dot(plan, "...ik,...kv->...iv", write_b, d_end)
        d_state = keep * d_end + _dot(plan, "...ik,...iv->...kv", read, _stack(d_u, dy))
        return d_state, (d_end, d_u)

    xs = (write_b, chunks.read, chunks.decays.keep, d_u, dy)
    d_start, (d_ends, d_u) = jax.lax.scan(step, d_end, xs, reverse=True)
    return d_ends, d_u, d_start


def chunk_maps(plan: Plan, chunks: _Chunks) -> tuple[jax.Array, jax.Array]:
    """The affine maps P' = M P + G of the chunks: M [N, B, H, K, K] and G [N, B, H, K, V]."""
    size = plan.chunk_size
    w, write_b = chunks.read[..., :size, :], chunks.write[..., :size, :]
    m = chunks.decays.keep * jnp.eye(w.shape[-1], dtype=jnp.float32).reshape(
        1, 1, 1, *w.shape[-1:] * 2
    )
    m += _dot(plan, "...ik,...ij->...kj", write_b, w)
    g = _dot(plan, "...ik,...iv->...kv", chunks.write, _stack(chunks.u0, chunks.v))
    return m, g


def compose(plan, first, second):
    """The map that applies `first` and then `second`; both (M, G)."""
    (m1, g1), (m2, g2) = first, second
    return (
        _dot(plan, "...ij,...jk->...ik", m2, m1),
        _dot(plan, "...ij,...jv->...iv", m2, g1) + g2,
    )


# ------------------------------------------------------------------------------------ arithmetic


def _dot(plan, equation, x, y):
    return jnp.einsum(equation, x, y, precision=plan.precision, preferred_element_type=jnp.float32)


def unit_inverse(plan, n):
    """(I - n)^-1 for strictly lower triangular n [.., C, C], by merging the inverses of blocks.

    Two neighbours give the block twice as large exactly. No power of n is ever formed: with
    repeated keys those grow like binomials.
    """
    size = n.shape[-1]
    if size > _SMALL:
        half = size // 2
        first, second = unit_inverse(plan, jnp.stack([n[..., :half, :half], n[..., half:, half:]]))
        corner = _dot(plan, "...ij,...jk->...ik", second, n[..., half:, :half])
        corner = _dot(plan, "...ij,...jk->...ik", corner, first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        return _stack(upper, jnp.concatenate([corner, second], axis=-1))
    # Blocks this small are merged in place, all at once: X + (X M) X, M their lower left halves.
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    x = jnp.broadcast_to(jnp.eye(size, dtype=n.dtype), n.shape)
    for half in (1 << i for i in range(size.bit_length() - 1)):
        block = (row // (2 * half) == column // (2 * half)) & (row // half > column // half)
        m = _where(block, n)
        xm = m if half == 1 else _dot(plan, "...ij,...jk->...ik", x, m)
        x += xm if half == 1 else _dot(plan, "...ij,...jk->...ik", xm, x)
    return x


def _causal(x):
    """Masks [.., 2C, 2C] to s < t in the rows of a, s <= t in the rows of r.

    By selection, never by multiplication: what is masked may be as large as e^78.
    """
    t = np.arange(x.shape[-1] // 2)
    before, upto = t[:, None] > t[None, :], t[:, None] >= t[None, :]
    return _where(np.block([[before, before], [upto, upto]]), x)


def _where(mask, x):
    return jnp.where(mask.reshape((1,) * (x.ndim - 2) + mask.shape), x, 0)


def _stack(upper, lower):
    return jnp.concatenate([upper, lower], axis=-2)


def _transpose(x):
    return x.swapaxes(-1, -2)

"""Chunk-parallel form of the generalized delta rule, for any decay, in plain JAX.

As `recurrence_chunked` for RWKV-7: chunks of C tokens are solved by matrix products, the state
passes between chunks, N chunks (a segment) are processed at once, and the backward pass recomputes
each segment from the state at its start. What differs is how decays enter. There a chunk's rows and
columns are scaled from its middle, which overflows unless decays are bounded. Here D(i, j), what
the tokens after j up to i leave of a channel, is a product of two factors of at most 1.

By levels: for every pair j < i there is one h of 1, 2, 4, .. C/2 such that i lies in the second and
j in the first half of the same 2h tokens. With m the border between the halves,

    D(i, j) = exp(E_h[i]) exp(S_h[j])       E_h[i]: sum of log_w from m to i      at most 0
                                            S_h[j]: sum of log_w after j up to m  at most 0

A sum over more tokens is a sum of sums over fewer. Nothing is ever subtracted, so nothing cancels
beside a decay of -1e4, and a reset (log_w = -inf) is exact.

One decay a head (the last axis of log_w is 1) multiplies the scores, so the C x C matrix of D is
made by itself. Decays of single channels scale rows and columns, level by level; where a bound is
known, leaves of as many tokens as it allows are scaled from their middle in one product.

State and arrays are as in `recurrence_chunked`, P = S^T, with lists of left factors, [a, r], and
of right factors, [b, k]; linear attention has r and k alone, and no inverse.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.ops.recurrence_chunked import (
    MAX_EXPONENT,
    Plan,
    cut,
    put,
    unit_inverse,
    wkv7_chunked,
)

_LEAF = 16  # tokens whose scores are made by masked products, one a level


@dataclasses.dataclass(frozen=True)
class Form:
    """What of the recurrence is used; hashable, fixed before tracing.

    Attributes:
      reads_before: y_t reads the state before token t's update, not after it.
      leaf: tokens that a bound on the decays allows to be scaled from their middle; 1 without one.
    """

    reads_before: bool
    leaf: int


def leaf_of(decay_bound: float | None) -> int:
    """`Form.leaf` for decays of at least `decay_bound`: half of it reaches -MAX_EXPONENT."""
    if decay_bound is None:
        return 1
    half = MAX_EXPONENT / max(-decay_bound, MAX_EXPONENT / 64)
    return 2 << int(half).bit_length() - 1 if half >= 1 else 1


@functools.partial(jax.jit, static_argnames=("plan", "form"))
def chunked(tokens: dict[str, jax.Array], state: jax.Array, *, plan: Plan, form: Form):
    """`delta_rule.generalized_delta_rule` by chunks, arguments already validated.

    Args:
      tokens: r, log_w, k, v and, with the delta term, a, b; all of the value's heads.
      state: [B, H, V, K], float32.

    Returns:
      y [B, T, H, V] in v's dtype and the final state.
    """
    length = tokens["v"].shape[1]
    bounded = plan.fit(length)[0].chunk_size <= form.leaf
    if bounded and "a" in tokens and tokens["log_w"].shape[-1] > 1 and not form.reads_before:
        # What RWKV-7 asks for, whose gradient is written by hand.
        return wkv7_chunked(**tokens, state=state, plan=plan)
    plan, padded = plan.fit(length)
    if padded > length:  # tokens of zeros leave the state alone
        pad = ((0, 0), (0, padded - length), (0, 0), (0, 0))
        tokens = {name: jnp.pad(x, pad) for name, x in tokens.items()}
    y, end = _segments(plan, form, tokens, state.swapaxes(-1, -2))
    return y[:, :length], end.swapaxes(-1, -2)


# ------------------------------------------------------------ all segments, with their own gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _segments(plan, form, tokens, start):
    return _forward(plan, form, tokens, start)[0]


def _forward(plan, form, tokens, start):
    """Segments in order. Returns (y, end state) and the residuals of `_backward`."""

    def step(carry, i):
        start, y = carry
        end, y_segment = _segment(plan, form, _cut(plan, tokens, i), start)
        return (end, put(y, y_segment, i)), start

    carry = (start, jnp.zeros_like(tokens["v"]))
    (end, y), starts = jax.lax.scan(step, carry, jnp.arange(_count(plan, tokens)))
    return (y, end), (tokens, starts)


def _backward(plan, form, residuals, cotangents):
    """Segments in reverse order, each recomputed from the state at its start."""
    tokens, starts = residuals
    dy, d_end = cotangents

    def step(carry, xs):
        d_end, gradients = carry
        i, start = xs
        segment = _cut(plan, tokens, i)
        _, pull_back = jax.vjp(functools.partial(_segment, plan, form), segment, start)
        pieces, d_start = pull_back((d_end, _cut(plan, {"y": dy}, i)["y"]))
        gradients = {name: put(gradients[name], piece, i) for name, piece in pieces.items()}
        return (d_start, gradients), None

    carry = (d_end, jax.tree.map(jnp.zeros_like, tokens))
    xs = (jnp.arange(starts.shape[0]), starts)
    (d_start, gradients), _ = jax.lax.scan(step, carry, xs, reverse=True)
    return gradients, d_start


_segments.defvjp(_forward, _backward)


def _count(plan, tokens):
    return tokens["v"].shape[1] // (plan.segment * plan.chunk_size)


def _cut(plan, tokens, i):
    """Segment `i` by chunks: float32 [N, B, H, C, K] each."""
    return dict(zip(tokens, cut(plan, tokens.values(), i), strict=True))


# ---------------------------------------------------------------------------------- one segment


class _Chunks(NamedTuple):
    """The chunks of a segment, as far as they do not depend on the state; no U without a and b."""

    read: jax.Array  # [N, B, H, C, K] r, decayed from the start of the chunk
    write: jax.Array  # [N, B, H, C or 2C, K] k or [b ; k], decayed to its end
    keep: jax.Array  # [N, B, H, K or 1, 1] what the chunk leaves of the state
    scores: jax.Array  # [N, B, H, C, C or 2C] how y reads v, or [u ; v]
    v: jax.Array  # [N, B, H, C, V]
    w: jax.Array | None  # [N, B, H, C, K] U = W P + U0
    u0: jax.Array | None  # [N, B, H, C, V]


def _segment(plan, form, segment, start):
    """Returns the state after the segment, and y [N, B, H, C, V]."""
    chunks = _prepare(plan, form, segment)
    states, end = (_scan_maps if plan.associative else _pass_states)(plan, chunks, start)
    y = _dot(plan, "...ik,...kv->...iv", chunks.read, states)
    y += _dot(plan, "...ij,...jv->...iv", chunks.scores, _written(plan, chunks, states))
    return end, y


def _prepare(plan, form, segment) -> _Chunks:
    r, log_w, k, v = (segment[name] for name in ("r", "log_w", "k", "v"))
    delta = "a" in segment
    levels = _levels(log_w)
    before, after, total = levels[-1]  # of the whole chunk
    to_token = jnp.exp(before if form.reads_before else before + log_w)
    to_end = jnp.exp(after)

    left = [segment["a"], r] if delta else [r]
    right = [segment["b"], k] if delta else [k]
    inclusive = [False] * delta + [not form.reads_before]
    make = _scores_of_heads if log_w.shape[-1] == 1 else _scores_of_channels
    scores = make(plan, form, left, right, log_w, levels, inclusive)
    w = u0 = None
    if delta:
        (ab, ak), _ = scores
        read = segment["a"] * jnp.exp(before)
        removed = _dot(plan, "...ij,...jv->...iv", ak, v)
        solved = _solve(plan, ab, jnp.concatenate([read, removed], axis=-1))
        w, u0 = solved[..., : read.shape[-1]], solved[..., read.shape[-1] :]
    return _Chunks(
        read=r * to_token,
        write=jnp.concatenate([x * to_end for x in right], axis=-2),
        keep=jnp.exp(total).swapaxes(-1, -2),
        scores=jnp.concatenate(scores[-1], axis=-1),
        v=v,
        w=w,
        u0=u0,
    )


def _written(plan, chunks, states):
    """What a chunk writes: v, or [u ; v] where something is removed, given the states before."""
    if chunks.w is None:
        return chunks.v
    u = _dot(plan, "...ik,...kv->...iv", chunks.w, states) + chunks.u0
    return jnp.concatenate([u, chunks.v], axis=-2)


def _pass_states(plan, chunks, start):
    """From the start state [B, H, K, V]: the state before every chunk, and the end state."""

    def step(state, chunk):
        written = _written(plan, chunk, state)
        end = chunk.keep * state + _dot(plan, "...ik,...iv->...kv", chunk.write, written)
        return end, state

    end, states = jax.lax.scan(step, start, chunks)
    return states, end


def _scan_maps(plan, chunks, start):
    """The same by an associative scan over the chunks' affine maps P' = M P + G.

    Without a and b the maps are diagonal: M [N, B, H, K or 1, 1].
    """
    diagonal = chunks.w is None
    if diagonal:
        m, written = chunks.keep, chunks.v
        apply = jnp.multiply
    else:
        size = chunks.w.shape[-1]
        m = chunks.keep * jnp.eye(size, dtype=jnp.float32).reshape(1, 1, 1, size, size)
        m += _dot(plan, "...ik,...ij->...kj", chunks.write[..., : plan.chunk_size, :], chunks.w)
        written = jnp.concatenate([chunks.u0, chunks.v], axis=-2)
        apply = functools.partial(_dot, plan, "...ij,...jv->...iv")
    g = _dot(plan, "...ik,...iv->...kv", chunks.write, written)

    def compose(first, second):
        (m1, g1), (m2, g2) = first, second
        return apply(m2, m1), apply(m2, g1) + g2

    m, g = jax.lax.associative_scan(compose, (m, g))
    ends = (m * start[None] if diagonal else _dot(plan, "n...ij,...jv->n...iv", m, start)) + g
    return jnp.concatenate([start[None], ends[:-1]]), ends[-1]


# ------------------------------------------------------------------------------------ the decays


def _levels(log_w):
    """For h = 1, 2, 4, .. C: (before, after, total) of log_w [.., C, n] within blocks of h tokens.

    before [.., C, n] sums the block's tokens before each, after [.., C, n] those after each, total
    [.., C / h, n] all of them.
    """
    size = log_w.shape[-2]
    before = after = jnp.zeros_like(log_w)
    total = log_w
    levels = [(before, after, total)]
    for half in (1 << i for i in range(size.bit_length() - 1)):
        first, second = (_halves(total, 1)[..., i, :, :] for i in (0, 1))  # [.., C / 2h, 1, n]
        zero = jnp.zeros_like(first)
        before = _halves(before, half) + jnp.stack([zero, first], axis=-3)
        after = _halves(after, half) + jnp.stack([second, zero], axis=-3)
        before, after = before.reshape(log_w.shape), after.reshape(log_w.shape)
        total = (first + second)[..., 0, :]
        levels.append((before, after, total))
    return levels


def _halves(x, half):
    """Rows [.., C, n] as pairs of neighbouring blocks: [.., C / 2 half, 2, half, n]."""
    return x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])


def _level_of(size):
    """[C, C]: for i > j the h of their level; 0 on the diagonal, -1 above it."""
    i, j = np.arange(size)[:, None], np.arange(size)[None, :]
    highest = 1 << np.maximum(0, np.frexp((i ^ j).astype(np.float64))[1] - 1)
    return np.where(i > j, highest, np.where(i == j, 0, -1))


def _scores_of_heads(plan, form, left, right, log_w, levels, inclusive):
    """Scores where one decay a head multiplies them, log_w [.., C, 1].

    Args:
      left, right: [a, r] and [b, k], or [r] and [k], [.., C, K] each.
      levels: of log_w.
      inclusive: for each of left, whether its rows see their own token and decay.

    Returns:
      For each of left a list of [.., C, C], one for each of right: rows are targets.
    """
    size = plan.chunk_size
    level = _as_mask(_level_of(size), log_w)
    strict = jnp.full((*log_w.shape[:-1], size), -jnp.inf)
    for n, (before, after, _) in enumerate(levels[:-1]):
        strict = jnp.where(level == 1 << n, before + after.swapaxes(-1, -2), strict)
    decays = []
    for includes in inclusive:
        decay = jnp.exp(strict + log_w) if includes else jnp.exp(strict)
        decays.append(jnp.where(level == 0, 1.0, decay) if includes else decay)
    decay = jnp.concatenate(decays, axis=-2)
    return _products(plan, left, right, jnp.concatenate([decay] * len(right), axis=-1))


def _scores_of_channels(plan, form, left, right, log_w, levels, inclusive):
    """The same where every channel has its own decay, log_w [.., C, K]."""
    size = plan.chunk_size
    leaf = min(size, max(form.leaf, _LEAF))
    make = _bounded_leaves if leaf <= form.leaf else _leaves
    scores = make(plan, left, right, log_w, levels, leaf, inclusive)
    for n in range(leaf.bit_length() - 1, size.bit_length() - 1):
        rows, columns = _decayed(left, right, log_w, levels[n], inclusive)
        lower = [_halves(x, 1 << n)[..., 1, :, :] for x in rows]
        upper = [_halves(x, 1 << n)[..., 0, :, :] for x in columns]
        scores = _each(_merged, scores, _products(plan, lower, upper))
    return [[x[..., 0, :, :] for x in row] for row in scores]


def _decayed(left, right, log_w, level, inclusive):
    """Left factors decayed from the border of their halves, right factors decayed to it."""
    before, after, _ = level
    rows = [
        x * jnp.exp(before + log_w if i else before) for x, i in zip(left, inclusive, strict=True)
    ]
    return rows, [x * jnp.exp(after) for x in right]


def _merged(scores, corner):
    """Scores of blocks [.., p, h, h] as those of pairs of blocks, given what lies below."""
    first, second = scores[..., 0::2, :, :], scores[..., 1::2, :, :]
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _leaves(plan, left, right, log_w, levels, leaf, inclusive):
    """Scores within blocks of `leaf` tokens, [.., p, leaf, leaf] each: a masked product a level."""
    level = _level_of(leaf)
    blocks = lambda xs: [x.reshape(*x.shape[:-2], -1, leaf, x.shape[-1]) for x in xs]
    products = _products(plan, blocks(left), blocks(right))
    keep = lambda x, chosen: jnp.where(_as_mask(chosen, x), x, 0)
    scores = [
        [keep(x, (level == 0) & includes) for x in row]
        for includes, row in zip(inclusive, products, strict=True)
    ]
    for n in range(leaf.bit_length() - 1):
        rows, columns = _decayed(left, right, log_w, levels[n], inclusive)
        products = _products(plan, blocks(rows), blocks(columns))
        scores = _each(lambda x, y, h=1 << n: x + keep(y, level == h), scores, products)
    return scores


def _bounded_leaves(plan, left, right, log_w, levels, leaf, inclusive):
    """The same in one product, scaled from the middle of each block."""
    before, _, total = levels[leaf.bit_length() - 1]
    blocks = lambda x: x.reshape(*x.shape[:-2], total.shape[-2], leaf, x.shape[-1])
    before, log_w = blocks(before), blocks(log_w)
    middle = before[..., leaf // 2 : leaf // 2 + 1, :]
    to_row, from_column = before - middle, middle - (before + log_w)
    rows = [
        blocks(x) * jnp.exp(to_row + log_w if includes else to_row)
        for x, includes in zip(left, inclusive, strict=True)
    ]
    products = _products(plan, rows, [blocks(x) * jnp.exp(from_column) for x in right])
    level = _level_of(leaf)
    return [
        [jnp.where(_as_mask(level >= (0 if includes else 1), x), x, 0) for x in row]
        for includes, row in zip(inclusive, products, strict=True)
    ]


def _products(plan, left, right, scale=1.0):
    """Every left factor times every right one, [.., i, j] each, as one product, times `scale`.

    Lists of arrays, and not arrays with one more axis: XLA's CPU runtime (jax 0.10.2) crashes in
    sums over a middle axis of seven, which their gradients would have.
    """
    both = _dot(plan, "...ik,...jk->...ij", jnp.concatenate(left, -2), jnp.concatenate(right, -2))
    rows = jnp.split(both * scale, len(left), axis=-2)
    return [jnp.split(row, len(right), axis=-1) for row in rows]


def _each(fn, scores, others):
    """`fn` of the corresponding arrays of two lists of lists."""
    return [list(map(fn, *rows)) for rows in zip(scores, others, strict=True)]


def _as_mask(mask, like):
    """A constant [i, j] in front of which axes of 1 stand, as many as `like` has."""
    return mask.reshape((1,) * (like.ndim - 2) + mask.shape)


# ------------------------------------------------------------------------------------ arithmetic


def _dot(plan, equation, x, y):
    return jnp.einsum(equation, x, y, precision=plan.precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(plan, n, z):
    """(I - n)^-1 z for strictly lower triangular n."""
    return _solve_forward(plan, n, z)[0]


def _solve_forward(plan, n, z):
    x = unit_inverse(plan, n)
    solved = _dot(plan, "...ij,...jv->...iv", x, z)
    return solved, (x, solved)


def _solve_backward(plan, residuals, d_solved):
    x, solved = residuals
    d_z = _dot(plan, "...ji,...jv->...iv", x, d_solved)
    size = x.shape[-1]
    below = _as_mask(np.tri(size, k=-1, dtype=bool), x)
    return jnp.where(below, _dot(plan, "...iv,...jv->...ij", d_z, solved), 0), d_z


_solve.defvjp(_solve_forward, _solve_backward)

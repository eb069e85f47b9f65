"""Chunk-parallel form of the generalized delta rule, for any decay, in plain JAX.

`recurrence_chunked` has the recurrence and its gradient. With decays of single channels it scales a
chunk's rows and columns from the middle of the chunk, which overflows where they are too strong.
Here such chunks get entries in which D(i, j), what the tokens after j up to i leave of a channel,
is a product of two factors of at most 1 (`decays`): they scale rows and columns level by level.
Where a bound is known, leaves of as many tokens as it allows are scaled from their middle in one
product. Which entries a segment needs is decided by its decays, while it runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.ops.decays import as_mask, halves, level_of, levels_of
from rwkvx_jax.ops.recurrence_chunked import (
    MAX_EXPONENT,
    ONE_PRODUCT,
    Entries,
    Made,
    body_of,
    names_of,
    sees_itself,
)
from rwkvx_jax.ops.segments import Body, Form, Plan, Segment, by_segments

_LEAF = 16  # tokens whose scores are made by masked products, one a level


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
      tokens: r, log_w, k, v and, with the delta term, a, b; all of the value's heads; where
        documents are packed, fresh [B, T, 1, 1].
      state: [B, H, V, K], float32.

    Returns:
      y [B, T, H, V] in v's dtype and the final state.
    """
    size = plan.fit(tokens["v"].shape[1])[0].chunk_size
    bounded = tokens["log_w"].shape[-1] == 1 or size <= form.leaf
    body = ONE_PRODUCT if bounded else ANY_DECAY if form.looks else LEVELS
    return by_segments(plan, form, body, tokens, state)


def _levels(plan: Plan, form: Form, segment: Segment) -> Made:
    """Entries for decays of channels that may have any strength; their gradient is JAX's."""
    lefts, rights = names_of(segment)
    if "fresh" in segment:
        # From the middle of a leaf, gradients of its decays cancel but for rounding where they are
        # of another document; level by level they are 0.
        form = dataclasses.replace(form, leaf=1)

    def entries(segment):
        log_w = segment["log_w"]
        levels = levels_of(log_w)
        before, after, total = levels[-1]  # of the whole chunk
        inclusive = [sees_itself(form, name) for name in lefts]
        left, right = ([segment[name] for name in names] for names in (lefts, rights))
        rows, columns = _decayed(left, right, log_w, levels[-1], inclusive)
        scores = _scores(plan, form, left, right, log_w, levels, inclusive)
        return Entries(
            scores=jnp.concatenate([jnp.concatenate(row, axis=-1) for row in scores], axis=-2),
            read=jnp.concatenate(rows, axis=-2),
            write=jnp.concatenate(columns, axis=-2),
            keep=jnp.exp(total).swapaxes(-1, -2),
        )

    differentiated = {n: x for n, x in segment.items() if n not in ("v", "fresh")}
    made, pull_back = jax.vjp(entries, differentiated)
    return made, lambda d: pull_back(d)[0]


def _by_strength(whole, leaves):
    """A function of a segment: `whole` where the decays allow to scale whole chunks from their
    middle, else `leaves`, with leaves as long as they allow."""

    def run(plan, form, segment, *rest):
        way = lambda run, leaf: functools.partial(
            run, plan, dataclasses.replace(form, leaf=max(form.leaf, leaf))
        )
        ways = {plan.chunk_size: way(whole, 1)}
        if form.leaf < _LEAF < plan.chunk_size and "fresh" not in segment:
            ways[_LEAF] = way(leaves, _LEAF)
        too_strong = [~_fits(plan, segment["log_w"], size) for size in ways]
        branches = (*ways.values(), way(leaves, 1))
        return jax.lax.switch(
            sum(x.astype(jnp.int32) for x in too_strong), branches, segment, *rest
        )

    return run


def _fits(plan, log_w, size):
    """Whether the decays of all half blocks of `size` tokens sum to at least -MAX_EXPONENT."""
    block = 2 * np.arange(plan.chunk_size) // size if size > 1 else np.zeros(1)
    sums = plan.dot(
        "hc,...ck->...hk", np.float32(block == np.arange(block[-1] + 1)[:, None]), log_w
    )
    return jnp.all(sums >= -MAX_EXPONENT)  # False for a reset: 0 times it is no number


LEVELS = body_of(_levels)
ANY_DECAY = Body(*map(_by_strength, ONE_PRODUCT, LEVELS))


# ------------------------------------------------------------------------------------ the scores


def _scores(plan, form, left, right, log_w, levels, inclusive):
    """Scores where every channel has its own decay, log_w [.., C, K].

    Args:
      left, right: [a, r] and [b, k], or [r] and [k], [.., C, K] each.
      levels: of log_w.
      inclusive: for each of left, whether its rows see their own token and decay.

    Returns:
      For each of left a list of [.., C, C], one for each of right: rows are targets.
    """
    size = plan.chunk_size
    leaf = min(size, max(form.leaf, _LEAF))
    make = _bounded_leaves if leaf <= form.leaf else _leaves
    scores = make(plan, left, right, log_w, levels, leaf, inclusive)
    for n in range(leaf.bit_length() - 1, size.bit_length() - 1):
        rows, columns = _decayed(left, right, log_w, levels[n], inclusive)
        lower = [halves(x, 1 << n)[..., 1, :, :] for x in rows]
        upper = [halves(x, 1 << n)[..., 0, :, :] for x in columns]
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
    level = level_of(leaf)
    blocks = lambda xs: [x.reshape(*x.shape[:-2], -1, leaf, x.shape[-1]) for x in xs]
    products = _products(plan, blocks(left), blocks(right))
    keep = lambda x, chosen: jnp.where(as_mask(chosen, x), x, 0)
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
    level = level_of(leaf)
    return [
        [jnp.where(as_mask(level >= (0 if includes else 1), x), x, 0) for x in row]
        for includes, row in zip(inclusive, products, strict=True)
    ]


def _products(plan, left, right):
    """Every left factor times every right one, [.., i, j] each, as one product.

    Lists of arrays, and not arrays with one more axis: XLA's CPU runtime (jax 0.10.2) crashes in
    sums over a middle axis of seven, which their gradients would have.
    """
    both = plan.dot("...ik,...jk->...ij", jnp.concatenate(left, -2), jnp.concatenate(right, -2))
    rows = jnp.split(both, len(left), axis=-2)
    return [jnp.split(row, len(right), axis=-1) for row in rows]


def _each(fn, scores, others):
    """`fn` of the corresponding arrays of two lists of lists."""
    return [list(map(fn, *rows)) for rows in zip(scores, others, strict=True)]

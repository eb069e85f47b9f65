"""Chunk-parallel linear recurrences in plain JAX: matrix products in chunks, a state between them.

The sequence is cut into chunks of C tokens. Inside a chunk the recurrence is solved exactly by
matrix products (with a unit lower triangular inverse, C x C); between chunks only the state is
passed, one chunk after the other ("chunked") or by an associative scan over the chunks' affine maps
("associative"). N chunks, a segment, are processed at once (`segments`). The backward pass is
written by hand.

For a chunk that starts from P = S^T, with g the running sum of log_w within it (gi including the
own token, ge excluding it, gl at the end, g* in the middle):

    L = [a e^(ge-g*) ; r e^(gi-g*)]     R = [b e^(g*-gi) ; k e^(g*-gi)]             2C rows each
    A = L R^T where s < t, and s = t for the rows of r, = [[ab, ak], [rb, rk]]      2C x 2C
    X = (I - ab)^-1     W = X (a e^ge)     U0 = X ak v     U = W P + U0
    y = (r e^gi) P + [rb rk] [U ; v]
    P' = e^gl P + [b e^(gl-gi) ; k e^(gl-gi)]^T [U ; v]        affine in P: P' = M P + G

U holds what the removal keys read, one row a token. Where y reads the state before the token's own
update, rows of r are as those of a. Linear attention has neither a nor b, nor X, W and U.

What depends on the decays is in `Entries`: A, [a e^ge ; r e^gi], [b e^(gl-gi) ; k e^(gl-gi)] and
e^gl. Everything else, and its gradient, is the same for all decays. `one_product` makes the entries
for decays that are bounded or of whole heads, and their gradient; `delta_rule_chunked` for others.
Where documents are packed, entries from one to another are 0 (`_within_documents`).

Taken from the middle of the chunk, exponents stay within +-0.6065 C / 2 for RWKV-7, and scaling by
them costs no precision: products keep relative errors. With one decay a head, log_w [.., C, 1],
L and R are not scaled. A is multiplied by e^(ge_t - gi_s) or e^(gi_t - gi_s), which are sums
between tokens and need no bound (`decays`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from rwkvx_jax.ops.decays import (
    as_mask,
    decays_of_channels,
    decays_of_heads,
    gradient_of_decays,
    running_sum,
)
from rwkvx_jax.ops.segments import Body, Form, Plan, Segment, by_segments

# Entries of L R^T above the diagonal reach e^(0.6065 C): e^78 fits float32 at 128, e^155 does not.
MAX_CHUNK_SIZE = 128

# Forms that solve several tokens at once scale by e to the decays summed over half of them: e^80
# leaves float32 a factor of 6000 for the inputs, and e^-80 one of 1500 before precision is lost.
MAX_EXPONENT = 80

_SMALL = 16  # below it, products over halves of the blocks cost more than they save


@functools.partial(jax.jit, static_argnames="plan")
def wkv7_chunked(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    state: Float32[Array, "B H V K"],
    fresh: Float32[Array, "B T 1 1"] | None = None,
    *,
    plan: Plan,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H V K"]]:
    """`recurrence.wkv7` by chunks, arguments already validated; returns y and the final state."""
    tokens = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
    if fresh is not None:
        tokens["fresh"] = fresh
    return by_segments(plan, Form(), ONE_PRODUCT, tokens, state)


# ---------------------------------------------------------------------------------- the entries


class Entries(NamedTuple):
    """Where the decays of a chunk enter; m is 2, and for linear attention 1."""

    scores: jax.Array  # [N, B, H, mC, mC] A
    read: jax.Array  # [N, B, H, mC, K] [a e^ge ; r e^gi]: reads the state at the start
    write: jax.Array  # [N, B, H, mC, K] [b ; k] e^(gl-gi): writes to the state at the end
    keep: jax.Array  # [N, B, H, K or 1, 1] e^gl


Made = tuple[Entries, Callable[[Entries], Segment]]
"""Entries and their pull-back, which gives gradients by name; that of `keep` comes as [.., K, 1]
and that of what A leaves out is ignored."""


def names_of(segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The left and the right factors."""
    return (("a", "r"), ("b", "k")) if "a" in segment else (("r",), ("k",))


def sees_itself(form: Form, name: str) -> bool:
    """Whether rows of this left factor see their own token and its decay."""
    return name == "r" and not form.reads_before


def one_product(plan: Plan, form: Form, segment: Segment) -> Made:
    """All entries from one product L R^T."""
    lefts, rights = names_of(segment)
    inclusive = tuple(sees_itself(form, name) for name in lefts)
    make = decays_of_heads if segment["log_w"].shape[-1] == 1 else decays_of_channels
    decays = make(segment["log_w"], inclusive)
    scales = dict(zip(lefts, decays.left, strict=True)) | dict.fromkeys(rights, decays.right)
    left = _stack(*(segment[name] * scales[name] for name in lefts))
    right = _stack(*(segment[name] * scales[name] for name in rights))
    causal = functools.partial(_where, _causal(plan.chunk_size, inclusive))
    entries = Entries(
        scores=causal(plan.dot("...ik,...jk->...ij", left, right)) * decays.scores,
        read=left * decays.from_start,
        write=right * decays.to_end,
        keep=decays.keep,
    )

    def pull_back(d: Entries) -> Segment:
        parts = lambda x, names: {
            name: piece * scales[name]
            for name, piece in zip(names, jnp.split(x, len(names), axis=-2), strict=True)
        }
        d_scores = causal(d.scores) * decays.scores
        through_left = plan.dot("...ij,...jk->...ik", d_scores, right)
        d_left = parts(through_left + decays.from_start * d.read, lefts)
        d_right = parts(plan.dot("...ij,...ik->...jk", d_scores, left), rights)
        d_write = parts(decays.to_end * d.write, rights)
        # A decay enters wherever a later token reads what an earlier one wrote.
        product = lambda d, names: sum(segment[name] * d[name] for name in names)
        own = [name for name in lefts if not sees_itself(form, name)]
        d_log_w = gradient_of_decays(
            segment["log_w"],
            pairs=product(d_left, lefts) - product(d_right, rights),
            own=product(d_left, own) if own else None,
            written=product(d_write, rights),
            kept=(decays.keep * d.keep).swapaxes(-1, -2),
            document=_document_of(segment),
        )
        d_right = {name: d_right[name] + d_write[name] for name in rights}
        return {"log_w": d_log_w, **d_left, **d_right}

    return entries, pull_back


def _document_of(segment: Segment) -> jax.Array | None:
    """[N, B, 1, C, 1]: how many documents have begun in the chunk up to each token; None where
    none are packed."""
    return running_sum(segment["fresh"]) if "fresh" in segment else None


def _within_documents(make, plan: Plan, form: Form, segment: Segment) -> Made:
    """Entries as `make` makes them, without those that lead from one document to another."""
    entries, pull_back = make(plan, form, segment)
    if (document := _document_of(segment)) is None:
        return entries, pull_back
    factors = entries.scores.shape[-1] // plan.chunk_size
    rows = _stack(*[document] * factors)
    last = document[..., -1:, :]
    masks = Entries(rows == rows.swapaxes(-1, -2), rows == 0, rows == last, last == 0)
    only = lambda d: Entries(*(jnp.where(m, x, 0) for m, x in zip(masks, d, strict=True)))
    return only(entries), lambda d: pull_back(only(d))


# ---------------------------------------------------------------------------------- one segment


class _Chunks(NamedTuple):
    """The chunks of a segment, as far as they do not depend on the state; no U without a and b."""

    entries: Entries
    v: jax.Array  # [N, B, H, C, V]
    inverse: jax.Array | None  # [N, B, H, C, C] X
    w: jax.Array | None  # [N, B, H, C, K]
    u0: jax.Array | None  # [N, B, H, C, V]


def _solved(plan, entries, v) -> _Chunks:
    size = plan.chunk_size
    if entries.scores.shape[-1] == size:
        return _Chunks(entries, v, None, None, None)
    inverse = unit_inverse(plan, entries.scores[..., :size, :size])
    u0 = plan.dot("...ij,...jv->...iv", entries.scores[..., :size, size:], v)
    return _Chunks(
        entries=entries,
        v=v,
        inverse=inverse,
        w=plan.dot("...ij,...jk->...ik", inverse, entries.read[..., :size, :]),
        u0=plan.dot("...ij,...jv->...iv", inverse, u0),
    )


def _segment_forward(make, plan, form, segment, start):
    """Returns the state after the segment, and y [N, B, H, C, V]."""
    entries, _ = _within_documents(make, plan, form, segment)
    states, written, end = _pass_states(plan, _solved(plan, entries, segment["v"]), start)
    own = -plan.chunk_size  # rows of r from here on
    y = plan.dot("...ik,...kv->...iv", entries.read[..., own:, :], states)
    y += plan.dot("...ij,...jv->...iv", entries.scores[..., own:, :], written)
    return end, y


def _segment_backward(make, plan, form, segment, start, dy, d_end):
    """Returns the gradients of the start state and, by name, of the segment."""
    size = plan.chunk_size
    entries, pull_back = _within_documents(make, plan, form, segment)
    chunks = _solved(plan, entries, segment["v"])
    states, written, _ = _pass_states(plan, chunks, start)
    d_written = plan.dot("...ji,...jv->...iv", entries.scores[..., -size:, :], dy)  # what y adds
    d_u = None if chunks.w is None else d_written[..., :size, :]
    d_ends, d_u, d_start = _pass_cotangents(plan, chunks, dy, d_u, d_end)

    d_v = d_written[..., -size:, :]
    d_v += plan.dot("...ik,...kv->...iv", entries.write[..., -size:, :], d_ends)
    d_rows = dy
    if d_u is not None:  # U = X Z, Z = (a e^ge) P + ak v
        d_z = plan.dot("...ji,...jv->...iv", chunks.inverse, d_u)
        d_v += plan.dot("...ji,...jv->...iv", entries.scores[..., :size, size:], d_z)
        d_rows = _stack(d_z, dy)
    # A product with ones, as XLA's fused sums are many times slower on a CPU.
    ones = np.ones(states.shape[-1], np.float32)
    gradients = pull_back(
        Entries(
            scores=plan.dot("...iv,...jv->...ij", d_rows, written),
            read=plan.dot("...iv,...kv->...ik", d_rows, states),
            write=plan.dot("...iv,...kv->...ik", written, d_ends),
            keep=plan.dot("...kv,v->...k", states * d_ends, ones)[..., None],
        )
    )
    return d_start, gradients | {"v": d_v}


def body_of(make: Callable[[Plan, Form, Segment], Made]) -> Body:
    """The recurrence with entries as `make` makes them."""
    return Body(
        forward=functools.partial(_segment_forward, make),
        backward=functools.partial(_segment_backward, make),
    )


ONE_PRODUCT = body_of(one_product)


# --------------------------------------------------------------------- the state between chunks


def _pass_states(plan, chunks, start):
    """From the start state [B, H, K, V]: the state before every chunk, what it writes, [U ; v] or
    v, and the end state."""

    def written(chunks, state):
        if chunks.w is None:
            return chunks.v
        return _stack(plan.dot("...ik,...kv->...iv", chunks.w, state) + chunks.u0, chunks.v)

    if plan.associative:
        m, g = jax.lax.associative_scan(functools.partial(_compose, plan), _maps(plan, chunks))
        ends = _apply(plan, m, start[None]) + g
        states = jnp.concatenate([start[None], ends[:-1]])
        return states, written(chunks, states), ends[-1]

    def step(state, chunk):
        rows = written(chunk, state)
        end = chunk.entries.keep * state
        end += plan.dot("...ik,...iv->...kv", chunk.entries.write, rows)
        return end, (state, rows)

    end, (states, rows) = jax.lax.scan(step, start, chunks)
    return states, rows, end


def _pass_cotangents(plan, chunks, dy, d_u, d_end):
    """The same backwards: gradients of the state after every chunk, of U, and of the start state.

    `d_u` [N, B, H, C, V] holds what reaches U through y; the part through the end state is added.
    None for linear attention.
    """
    size = plan.chunk_size
    read, write, keep = chunks.entries.read, chunks.entries.write, chunks.entries.keep
    if d_u is not None:
        read, write = _stack(chunks.w, read[..., size:, :]), write[..., :size, :]

    def through_u(write, d_u, d_end):
        return None if d_u is None else d_u + plan.dot("...ik,...kv->...iv", write, d_end)

    def through_y(read, d_u, dy):
        return plan.dot("...ik,...iv->...kv", read, dy if d_u is None else _stack(d_u, dy))

    if plan.associative:
        m, _ = _maps(plan, chunks)
        m = m if d_u is None else m.swapaxes(-1, -2)
        m, g = jax.lax.associative_scan(
            functools.partial(_compose, plan), (m, through_y(read, d_u, dy)), reverse=True
        )
        d_states = _apply(plan, m, d_end[None]) + g
        d_ends = jnp.concatenate([d_states[1:], d_end[None]])
        return d_ends, through_u(write, d_u, d_ends), d_states[0]

    def step(d_end, xs):
        write, read, keep, d_u, dy = xs
        d_u = through_u(write, d_u, d_end)
        return keep * d_end + through_y(read, d_u, dy), (d_end, d_u)

    d_start, (d_ends, d_u) = jax.lax.scan(step, d_end, (write, read, keep, d_u, dy), reverse=True)
    return d_ends, d_u, d_start


def _maps(plan, chunks) -> tuple[jax.Array, jax.Array]:
    """The affine maps P' = M P + G of the chunks, G [N, B, H, K, V]; M [N, B, H, K, K], or where
    nothing is removed its diagonal [N, B, H, K or 1, 1]."""
    size, (_, _, write, keep) = plan.chunk_size, chunks.entries
    if chunks.w is None:
        return keep, plan.dot("...ik,...iv->...kv", write, chunks.v)
    m = keep * as_mask(np.eye(chunks.w.shape[-1], dtype=np.float32), keep)
    m += plan.dot("...ik,...ij->...kj", write[..., :size, :], chunks.w)
    return m, plan.dot("...ik,...iv->...kv", write, _stack(chunks.u0, chunks.v))


def _compose(plan, first, second):
    """The map that applies `first` and then `second`; both (M, G)."""
    (m1, g1), (m2, g2) = first, second
    return _apply(plan, m2, m1), _apply(plan, m2, g1) + g2


def _apply(plan, m, x):
    """M x, for the diagonal of M as well."""
    return m * x if m.shape[-1] == 1 else plan.dot("...ij,...jv->...iv", m, x)


# ------------------------------------------------------------------------------------ arithmetic


def unit_inverse(plan, n):
    """(I - n)^-1 for strictly lower triangular n [.., C, C], by merging the inverses of blocks.

    Two neighbours give the block twice as large exactly. No power of n is ever formed: with
    repeated keys those grow like binomials.
    """
    size = n.shape[-1]
    if size > _SMALL:
        half = size // 2
        first, second = unit_inverse(plan, jnp.stack([n[..., :half, :half], n[..., half:, half:]]))
        corner = plan.dot("...ij,...jk->...ik", second, n[..., half:, :half])
        corner = plan.dot("...ij,...jk->...ik", corner, first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        return _stack(upper, jnp.concatenate([corner, second], axis=-1))
    # Blocks this small are merged in place, all at once: X + (X M) X, M their lower left halves.
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    x = jnp.broadcast_to(jnp.eye(size, dtype=n.dtype), n.shape)
    for half in (1 << i for i in range(size.bit_length() - 1)):
        block = (row // (2 * half) == column // (2 * half)) & (row // half > column // half)
        m = _where(block, n)
        xm = m if half == 1 else plan.dot("...ij,...jk->...ik", x, m)
        x += xm if half == 1 else plan.dot("...ij,...jk->...ik", xm, x)
    return x


def _causal(size, inclusive):
    """Masks [mC, mC]: s <= t in the rows of left factors that see their own token, s < t in others.

    For selection, never for multiplication: what is masked may be as large as e^78.
    """
    t = np.arange(size)
    rows = [t[:, None] >= t if includes else t[:, None] > t for includes in inclusive]
    return np.block([[row] * len(inclusive) for row in rows])


def _where(mask, x):
    return jnp.where(as_mask(mask, x), x, 0)


def _stack(*rows):
    return jnp.concatenate(rows, axis=-2)

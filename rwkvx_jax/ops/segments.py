"""How chunked recurrences go through a sequence: in segments, with one gradient for all forms.

A segment is N chunks of C tokens, processed at once so that intermediate values stay small. Its
forward and backward passes are functions of a `Body`. The backward pass over the sequence keeps the
inputs and the state at the start of every segment; everything else is computed again.

In here the state is P = S^T, [.., K, V], as formulas are written for row vectors, and arrays of a
segment are [N, B, H, C, K] in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Segment = dict[str, jax.Array]
"""r, log_w, k, v and, where something is removed, a, b: [N, B, H, C, .] in float32; where documents
are packed, fresh [N, B, 1, C, 1]: 1 where one begins (`documents.beginnings`)."""

# CPU: half the stored states of chunks of 16, and what a chunk of a few heads needs stays in the
# second-level cache. Elsewhere, not measured: matrices large enough for a matrix unit, and
# independent chunks to fill it between two steps of the state.
CHUNK_SIZE = {"cpu": 32, "gpu": 64, "tpu": 64}
SEGMENT = {"cpu": 1, "gpu": 8, "tpu": 8}


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

    def dot(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`jnp.einsum` in float32."""
        return jnp.einsum(
            equation, x, y, precision=self.precision, preferred_element_type=jnp.float32
        )


@dataclasses.dataclass(frozen=True)
class Form:
    """What of the recurrence is used; hashable, fixed before tracing.

    Attributes:
      reads_before: y_t reads the state before token t's update, not after it.
      leaf: tokens that a bound on the decays allows to be scaled from their middle; 1 without one.
      looks: a segment's decays are looked at while it runs, so that weak ones take a faster way.
    """

    reads_before: bool = False
    leaf: int = 1
    looks: bool = True


class Body(NamedTuple):
    """A form of the recurrence over one segment; its functions are part of what is compiled."""

    forward: Callable
    """(plan, form, segment, start) -> (state after the segment, y [N, B, H, C, V])."""
    backward: Callable
    """(plan, form, segment, start, dy, d_end) -> (d_start, gradients of the segment by name)."""


def by_segments(
    plan: Plan, form: Form, body: Body, tokens: dict[str, jax.Array], state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence over a sequence, arguments already validated.

    Args:
      plan, form, body: how; not differentiated.
      tokens: r, log_w, k, v and, where something is removed, a, b: [B, T, H, .] each; where
        documents are packed, fresh [B, T, 1, 1].
      state: [B, H, V, K], float32.

    Returns:
      y [B, T, H, V] in v's dtype and the final state.
    """
    length = tokens["v"].shape[1]
    plan, padded = plan.fit(length)
    if padded > length:
        # A token of zeros leaves the state alone: no decay (log_w = 0), nothing read or written.
        pad = ((0, 0), (0, padded - length), (0, 0), (0, 0))
        tokens = {name: jnp.pad(x, pad) for name, x in tokens.items()}
    y, end = _run(plan, form, body, tokens, state.swapaxes(-1, -2))
    return y[:, :length], end.swapaxes(-1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(plan, form, body, tokens, start):
    return _forward(plan, form, body, tokens, start)[0]


def _forward(plan, form, body, tokens, start):
    """Segments in order. Returns (y, end state) and the residuals of `_backward`."""
    length = plan.segment * plan.chunk_size

    def step(carry, i):
        start, y = carry
        end, y_segment = body.forward(plan, form, _cut(plan, tokens, i), start)
        return (end, _put(y, y_segment, i)), start

    carry = (start, jnp.zeros_like(tokens["v"]))
    (end, y), starts = jax.lax.scan(step, carry, jnp.arange(tokens["v"].shape[1] // length))
    return (y, end), (tokens, starts)


def _backward(plan, form, body, residuals, cotangents):
    """Segments in reverse order, each recomputed from the state at its start."""
    tokens, starts = residuals
    dy, d_end = cotangents

    def step(carry, xs):
        d_end, gradients = carry
        i, start = xs
        segment, dy_segment = _cut(plan, tokens, i), _cut(plan, {"y": dy}, i)["y"]
        d_start, pieces = body.backward(plan, form, segment, start, dy_segment, d_end)
        pieces = {name: _put(gradients[name], piece, i) for name, piece in pieces.items()}
        return (d_start, gradients | pieces), None

    carry = (d_end, jax.tree.map(jnp.zeros_like, tokens))
    xs = (jnp.arange(starts.shape[0]), starts)
    (d_start, gradients), _ = jax.lax.scan(step, carry, xs, reverse=True)
    return gradients, d_start


_run.defvjp(_forward, _backward)


def _cut(plan, tokens, i):
    """Segment `i` of arrays [B, T, H, K], by chunks: float32 [N, B, H, C, K]."""
    length = plan.segment * plan.chunk_size

    def cut(x):
        x = jax.lax.dynamic_slice_in_dim(x, i * length, length, axis=1).astype(jnp.float32)
        x = x.reshape(x.shape[0], plan.segment, plan.chunk_size, *x.shape[2:])
        return x.transpose(1, 0, 3, 2, 4)

    return {name: cut(x) for name, x in tokens.items()}


def _put(array, piece, i):
    """Writes a segment [N, B, H, C, K] into its place in [B, T, H, K], in the array's dtype."""
    n, batch, heads, size, width = piece.shape
    piece = piece.transpose(1, 0, 3, 2, 4).reshape(batch, n * size, heads, width)
    piece = piece.astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, piece, i * n * size, axis=1)

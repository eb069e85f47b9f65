"""Sparse attention in plain XLA by masking: every earlier key is scored, block by block.

While the keys are few beside those a query reads, gathering queries chunk by chunk
(`block_sparse_xla`) costs more than it saves. Here blocks of queries meet all blocks of keys before
them, as in full attention, and what lies in chunks a query did not choose is masked. Quadratic in
time, with one boolean a query and chunk in memory. Values of masked keys are multiplied by zero, so
they must be finite.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from rwkvx_jax.ops import blocked_attention as blocked
from rwkvx_jax.ops.attention_inputs import Offset, rows_of
from rwkvx_jax.ops.block_sparse_xla import attend_heads
from rwkvx_jax.ops.documents import first_keys

# The time to gather and scatter a query's rows for one chunk, in that of so many scores: about what
# separates the faster from the slower form in the table of docs/attention.md (CPU).
GATHER_SCORES = 64


def masking_obstacle(chunk_size: int) -> str | None:
    """Why a chunk of this size can't be masked, None if it can: a block holds whole chunks."""
    if chunk_size > blocked.MAX_BLOCK:
        return f"a chunk of {chunk_size} keys is larger than a block of {blocked.MAX_BLOCK}"
    return None


def masking_pays(queries: int, keys: int, slots: int, chunk_size: int) -> bool:
    """Whether masking is possible, and expected to take less time than gathering.

    Args:
      queries: number of queries Tq, taken for the last ones.
      keys: number of keys Tk.
      slots: past chunks a query chooses.
      chunk_size: tokens in a chunk.
    """
    if masking_obstacle(chunk_size):
        return False
    past = np.arange(keys - queries, keys) // chunk_size
    gathered = np.minimum(past, slots).sum() * (chunk_size + GATHER_SCORES)
    return bool(past.sum() * chunk_size <= gathered)


def sparse_attention_masked(
    q: Float[Array, "B Tq H K"],
    k: Float[Array, "B Tk G K"],
    v: Float[Array, "B Tk G V"],
    selection: Int32[Array, "B Tq S J"],
    *,
    chunk_size: int,
    scale: float,
    q_offset: Offset = 0,
    starts: Int32[Array, "B Tk"] | None = None,
) -> Float[Array, "B Tq H V"]:
    """Own chunk causally and the selected past chunks; arguments as in `sparse_attention_xla`."""
    rows = rows_of(q_offset, starts, q.shape[0])
    forms = _forward_group, _backward_group
    return attend_heads(q, k, v, selection, rows, forms, chunk_size, scale)


def _visible(selection, keys, offset, starts, chunk_size):
    first = None if starts is None else first_keys(starts, offset, selection.shape[0])
    seen = _seen_chunks(selection, offset, keys, chunk_size)
    return {"chunk_size": chunk_size, "seen": seen, "first": first}


def _forward_group(q, k, v, selection, offset, starts=None, *, chunk_size, scale):
    options = {"scale": scale} | _visible(selection, k.shape[0], offset, starts, chunk_size)
    return blocked.softmax_finish(blocked.causal_forward(q, k, v, offset, **options), scale)


def _backward_group(q, k, v, selection, out, lse, grad, offset, starts=None, *, chunk_size, scale):
    options = {"scale": scale} | _visible(selection, k.shape[0], offset, starts, chunk_size)
    delta = blocked.output_dot(grad, out)
    return blocked.causal_backward(q, k, v, grad, lse, delta, offset, **options)


def _seen_chunks(selection, offset, keys, chunk_size):
    """The chunks each query reads, bool [Tq, P, ceil(Tk / chunk_size)]: its own and those of
    selection [Tq, P, J]; entries that are not past chunks are left out."""
    shape, chunks = selection.shape[:2], -(-keys // chunk_size)
    own = ((offset + jnp.arange(shape[0], dtype=jnp.int32)) // chunk_size)[:, None, None]
    past = jnp.where((selection >= 0) & (selection < own), selection, chunks)
    read = jnp.concatenate([past, jnp.broadcast_to(own, (*shape, 1))], axis=2)
    tokens, choices = jnp.arange(shape[0])[:, None, None], jnp.arange(shape[1])[None, :, None]
    return jnp.zeros((*shape, chunks), bool).at[tokens, choices, read].set(True, mode="drop")

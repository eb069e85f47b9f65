"""Documents packed into one sequence: where they begin, and what that forbids.

`segment_ids` [B, T] number the documents of a row 1, 2, ... in their order; 0 is padding, before,
between or behind them. It is the convention of flax. A token sees nothing of another document.
Padding is treated as a document of its own wherever it lies: it sees itself alone, nobody sees it,
and what it gives is finite and means nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

NO_DOCUMENTS = "it takes no segment_ids yet"
"""Why a kernel does not run where there are some."""


def check_segment_ids(op: str, segment_ids: jax.Array, batch: int, time: int) -> None:
    """Refuses ids that number no documents; values only where they are known, outside `jax.jit`.

    Raises:
      ValueError: no array, another shape or dtype, a negative id, or ids that decrease, skip or
        come again.
    """
    if not hasattr(segment_ids, "dtype"):
        raise ValueError(
            f"{op}: segment_ids must be an int32 array [{batch}, {time}], got a "
            f"{type(segment_ids).__name__}: use jnp.asarray"
        )
    if segment_ids.shape != (batch, time) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"{op}: segment_ids must be int32 [{batch}, {time}], got {segment_ids.dtype}"
            f"{list(segment_ids.shape)}"
        )
    if isinstance(segment_ids, jax.core.Tracer):
        return
    if not getattr(segment_ids, "is_fully_addressable", True):
        return
    ids = np.asarray(segment_ids)
    last = np.maximum.accumulate(ids, axis=1)  # of the newest document, over padding
    steps = np.diff(last, axis=1)
    resumed = (ids[:, 1:] != 0) & (ids[:, :-1] == 0) & (steps == 0)
    wrong = (ids[:, 1:] < last[:, 1:]) & (ids[:, 1:] != 0) | (steps > 1) | resumed
    wrong &= last[:, :-1] > 0  # a row may begin with any document
    wrong |= ids[:, 1:] < 0
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        before, after = ids[row, place : place + 2]
        raise ValueError(
            f"{op}: segment_ids go from {before} to {after} at token {place + 1} of row {row}: "
            "number the documents of a row 1, 2, 3, ... in their order, and padding 0"
        )


def beginnings(segment_ids: Int[Array, "B T"]) -> Float32[Array, "B T 1 1"]:
    """1 where a document begins, else 0. A row's first token goes on with the document that the
    state before it, if there is one, belongs to."""
    fresh = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(fresh, ((0, 0), (1, 0)))[..., None, None].astype(jnp.float32)


def as_decays(tokens: dict[str, jax.Array], *, reads_before: bool = False) -> dict[str, jax.Array]:
    """A recurrence over packed documents as one that knows of none, for decays down to -inf.

    Args:
      tokens: arguments of `recurrence_sequential.sequential`.
      reads_before: as there.

    Returns:
      The same without `fresh`: where it is set, the state before decays to 0, and nothing is
      removed from it or read of it.
    """
    tokens = dict(tokens)
    if (fresh := tokens.pop("fresh", None)) is None:
        return tokens
    empty = {"log_w": -jnp.inf, "a": 0, "r": 0}
    given = {"log_w", "a", "r"} if reads_before else {"log_w", "a"}
    for name in given & tokens.keys():
        tokens[name] = jnp.where(fresh > 0, empty[name], tokens[name])
    return tokens


def document_starts(segment_ids: Int[Array, "B T"]) -> Int32[Array, "B T"]:
    """Position at which the document of each token begins: a token sees nothing before it."""
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    fresh = beginnings(segment_ids)[..., 0, 0] > 0
    return jax.lax.cummax(jnp.where(fresh, positions, 0), axis=1)


def first_keys(
    starts: Int32[Array, " Tk"], offset: Int32[Array, ""], queries: int
) -> Int32[Array, " {queries}"]:
    """The first key that each of some queries sees, those at positions offset, offset + 1, ...

    Args:
      starts: of one row, as `document_starts` returns them.
      offset: position of the first query.
      queries: how many; those beyond the keys are of the last key's document.
    """
    return jnp.take(starts, offset + jnp.arange(queries, dtype=jnp.int32), mode="clip")

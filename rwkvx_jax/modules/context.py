"""One sequence on several devices: what crosses the borders of its parts.

Where the mesh in force has a `context` axis, each device holds a stretch of every sequence, and
the three operations that mix tokens exchange what the others need: the token shift one row, the
recurrence its affine maps (a matrix per head, however long the stretches are), attention its heads
for its tokens. Everything else in the model works token by token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from rwkvx_jax.modules.remat import keep
from rwkvx_jax.ops.documents import beginnings
from rwkvx_jax.sharding import per_device, rule, sequence_parts

_log = logging.getLogger(__name__)

_TOKENS = ("batch", "time", "heads", None)


def previous_token(h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """h moved one step later in time, zeros first, across the parts of the sequence."""
    axis = rule("time")

    def shift(part: jax.Array) -> jax.Array:
        before = _from_earlier(part[:, -1:], axis, 1)
        return jnp.concatenate([before, part[:, :-1]], axis=1)

    spec = PartitionSpec(None, axis, None)
    # The other mesh axes stay with the partitioner.
    return jax.shard_map(shift, in_specs=spec, out_specs=spec, axis_names={axis})(h)


def recurrence(
    affine: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]],
    arrays: tuple[jax.Array, ...],
    state: Float32[Array, "B H V K"] | None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H V K"]]:
    """A recurrence over sequences cut along time, from `state` (None: zeros) at their beginning.

    Every device runs its stretch once, as an affine function of the state at its start; that state
    follows from the maps (M, G) of the stretches before, collected by doubling. What is sent does
    not depend on the length of the sequence. Where a stretch begins a document, M = 0.

    Args:
      affine: y0, z, M and G of the arrays, as `ops.recurrence.wkv7_affine` returns them, and of
        `segment_ids` as a keyword.
      arrays: [B, T, H, ..] each; those of a single head are for all heads.
      state: before the first token.
      segment_ids: numbers of packed documents.

    Returns:
      y [B, T, H, V] in y0's dtype, and the final state [B, H, V, K] in float32.
    """
    axis, parts = rule("time"), sequence_parts(arrays[0].shape[1])
    heads = max(x.shape[2] for x in arrays)

    def stretch(*arguments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        *arrays, state, segment_ids, fresh = arguments
        y, z, m, g = affine(*arrays, segment_ids=segment_ids)
        # The op takes the first token of a stretch for one that goes on with a document.
        begun = lambda x: x if fresh is None else jnp.where(fresh[:, :1] > 0, 0, x)
        m = begun(m)
        start, before = _map_before(m, g, axis, parts)
        if state is not None:  # without one, nobody needs the map `before`
            start += _product(state, before)
        start = begun(start)
        added = jnp.einsum("bhvk,bthk->bthv", start, z.astype(jnp.float32), precision="highest")
        y = (y.astype(jnp.float32) + added).astype(y.dtype)
        return y, (_product(start, m) + g)[None]

    place = lambda x: _TOKENS if x.shape[2] == heads else ("batch", "time", None, None)
    ends = ("time", "batch", "heads", None, None)  # of all stretches: only the last is read
    matrix = ("batch", "heads", None, None)
    fresh = None if segment_ids is None else beginnings(segment_ids)
    documents = ("batch", "time"), ("batch", "time", None, None)
    run = per_device(stretch, (*map(place, arrays), matrix, *documents), (_TOKENS, ends))
    y, states = run(*arrays, state, segment_ids, fresh)
    return y, states[-1]


def attention(
    op: Callable[..., Float[Array, "B T H V"]],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"] | None = None,
    *index: Float[Array, "B T S I"],
) -> Float[Array, "B T H V"]:
    """`op(q, k, v, *index)` over sequences cut along time.

    Devices trade tokens for heads: each gets some heads of whole sequences, and gives their outputs
    back. Each device then sends (2 H + 2 G) / parts heads of its tokens (those of keys are repeated
    where parts does not divide G; heads of zeros fill up where it does not divide H). Where that is
    more than 2 H, as with very few heads, each collects the keys and values of all tokens instead:
    then the last device has the most to do. Index vectors travel as queries and keys do, those of
    a choice to all devices that have a head of it.

    Args:
      op: attention of queries that begin at position `q_offset` (a keyword) to keys from 0 on,
        whose documents `segment_ids` (another) number.
      q: queries.
      k: keys.
      v: values.
      segment_ids: numbers of packed documents; every device has those of all tokens.
      index: index queries, or index queries and keys, of each choice, or nothing; of S and G one
        divides the other.
    """
    axis, parts = rule("time"), sequence_parts(q.shape[1])

    def stretch(
        ids: jax.Array | None, q: jax.Array, k: jax.Array, v: jax.Array, *index: jax.Array
    ) -> jax.Array:
        heads, groups = q.shape[2], k.shape[2]
        each, each_key = (-(-n // parts) for n in (heads, groups * _copies(heads, groups, parts)))
        if each + each_key > heads:
            _log_choice(f"{parts} devices collect the keys and values of all tokens")
            gather = lambda x: keep(jax.lax.all_gather(x, axis, axis=1, tiled=True))
            index = (*index[:1], *map(gather, index[1:]))
            offset = jax.lax.axis_index(axis) * q.shape[1]
            return op(q, gather(k), gather(v), *index, q_offset=offset, segment_ids=ids)
        _log_choice(f"{heads} heads over {parts} devices, {each} on each")
        trade = partial(jax.lax.all_to_all, axis_name=axis, tiled=True)

        def whole(x: jax.Array) -> jax.Array:
            x = jnp.repeat(x, _copies(heads, x.shape[2], parts), axis=2)
            x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % parts), (0, 0)])
            return keep(trade(x, split_axis=2, concat_axis=1))

        out = op(*map(whole, (q, k, v, *index)), segment_ids=ids)
        return keep(trade(out, split_axis=1, concat_axis=2))[:, :, :heads]

    axes = ("batch", None), *[_TOKENS] * (3 + len(index))
    return per_device(stretch, axes, _TOKENS)(segment_ids, q, k, v, *index)


def _copies(heads: int, groups: int, parts: int) -> int:
    """How often each key head is repeated so that `parts` devices, each with as many neighbouring
    query heads, find theirs: the least number, or one for each query head."""
    shared = heads // groups
    return next(
        (n for n in range(1, shared) if shared % n == 0 and groups * n % parts == 0), shared
    )


@cache
def _log_choice(choice: str) -> None:
    """Logs a choice the first time it is made."""
    _log.info("attention to cut sequences: %s", choice)


def _map_before(m: jax.Array, g: jax.Array, axis: str, parts: int) -> tuple[jax.Array, jax.Array]:
    """The map of everything before this device's stretch, from the maps of all stretches.

    After the round that doubles to n, (M, G) is the map of the n stretches before this one.

    Returns:
      G [B, H, V, K], the state that an empty one becomes, and M [B, H, K, K]: a state S becomes
      S M + G.
    """
    m, g = _map_from_earlier(m, g, axis, 1)
    reach = 1
    while reach < parts - 1:
        m1, g1 = _map_from_earlier(m, g, axis, reach)
        m, g = _product(m1, m), _product(g1, m) + g
        reach *= 2
    return g, m


def _map_from_earlier(m, g, axis: str, distance: int) -> tuple[jax.Array, jax.Array]:
    """The map held `distance` devices earlier; the identity where there is no such device."""
    exists = jax.lax.axis_index(axis) >= distance
    identity = jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape)
    m = jnp.where(exists, _from_earlier(m, axis, distance), identity)
    return m, _from_earlier(g, axis, distance)


def _from_earlier(x: jax.Array, axis: str, distance: int) -> jax.Array:
    """x of the device `distance` earlier along the axis; zeros where there is none."""
    parts = jax.lax.axis_size(axis)
    return keep(jax.lax.ppermute(x, axis, [(i, i + distance) for i in range(parts - distance)]))


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")

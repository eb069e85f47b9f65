"""How much of full attention's mass lies in the chunks that a selector chooses.

For queries of one attention block: the softmax of full attention over the model's own queries and
keys gives the mass of each chunk; a selector is judged by what the chunks that it chooses hold of
it, and by how many of them an oracle would choose too, which takes those with the most mass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.ops.chunk_mass import log_mass
from rwkvx_jax.ops.selection import Selector, select_from_rows, selector_of

MEASURES = ("share", "past", "recall")
_QUERIES_AT_ONCE = 64


def selectors(config: ModelConfig, blocks: int) -> dict[str, Selector]:
    """The selectors that are compared, by name; the model's own is "own"."""
    others = [Selector("mean"), Selector("max", blocks), Selector("pooled", blocks)]
    named = {s.kind: s for s in (*others, Selector("bounds"))}
    return {"own": selector_of(config)} | named


def positions_of(config: ModelConfig, length: int, count: int) -> np.ndarray:
    """Positions with more past chunks than can be chosen, evenly spaced, int32 [Q]."""
    first = config.top_k * config.chunk_size
    return np.unique(np.linspace(first, length - 1, count).round().astype(np.int32))


def octaves(config: ModelConfig, length: int) -> int:
    """Number of octaves of distances in chunks: 1, 2-3, 4-7, ..."""
    return max(1, int((length - 1) // config.chunk_size).bit_length())


def measure(
    q: jax.Array,  # [T, H, K]
    k: jax.Array,  # [T, H, K]
    own: tuple[jax.Array, jax.Array],  # what the model's own selector asks with and scores
    positions: jax.Array,  # int32 [Q]
    config: ModelConfig,
    named: dict[str, Selector],
) -> dict[str, Any]:
    """Shares of full attention's mass at some positions of one attention block.

    Returns:
      "mass": [H, D + 1] float32, mean mass in the own chunk and at distances in octaves of chunks;
      for each selector, "recent" and "oracle" a dict of "share", "past" and "recall", each [H, P]
      (sums over the queries whose number of past chunks lies in an octave), and "held" [H, D], mean
      mass held at distances; "queries": [P], how many queries there are in each octave.
    """
    bins = octaves(config, k.shape[0])
    scored = {name: own if name == "own" else (q, k) for name in named}
    rows = {name: s.rows_of(scored[name][1][None], config.chunk_size) for name, s in named.items()}
    pad = -len(positions) % _QUERIES_AT_ONCE
    blocks = jnp.pad(positions, (0, pad), mode="edge").reshape(-1, _QUERIES_AT_ONCE)
    asked = {name: x for name, (x, _) in scored.items()}
    one = lambda at: _measure_queries(q, k, at, config, named, asked, rows)
    found = jax.lax.map(one, blocks)  # leaves [blocks, H, 64, ...]
    join = lambda x: jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[3:])
    found = jax.tree.map(lambda x: join(x)[:, : len(positions)], found)
    groups = jax.nn.one_hot(_octave(positions // config.chunk_size), bins)  # [Q, P]
    grouped = lambda x: jnp.einsum("hq,qp->hp", x, groups)
    return {
        "queries": groups.sum(0),
        "mass": found["mass"].mean(1),
        "selectors": {
            name: {m: grouped(values[m]) for m in MEASURES} | {"held": values["held"].mean(1)}
            for name, values in found["selectors"].items()
        },
    }


def _measure_queries(q, k, at, config: ModelConfig, named: dict[str, Selector], asked, rows):
    """`measure` of a few queries at positions `at` [Q], not summed: leaves [H, Q, ...]."""
    chunk, count = config.chunk_size, config.top_k - 1
    mass = _chunk_mass(q[at].astype(jnp.float32), k, at, chunk)  # [H, Q, N]
    chunks, own = mass.shape[-1], at // chunk
    distance = own[:, None] - jnp.arange(chunks)[None]  # [Q, N]
    past = distance > 0
    past_mass = jnp.where(past[None], mass, 0)
    own_mass = jnp.take_along_axis(mass, own[None, :, None], -1)[..., 0]
    bins = octaves(config, k.shape[0])
    at_distance = jax.nn.one_hot(_octave(distance), bins) * past[..., None]
    spread = lambda chosen: jnp.einsum("hqn,qnd->hqd", chosen, at_distance)
    picks = {
        "oracle": jax.lax.top_k(jnp.where(past[None], mass, -1.0), count)[1],
        "recent": own[None, :, None] - 1 - jnp.arange(count)[None, None],
    }
    for name, selector in named.items():
        options = {"chunk_size": chunk, "count": count, "selector": selector}
        one = asked[name][at].astype(jnp.float32)[None]
        chosen = select_from_rows(one, rows[name], at[None], **options)[0].swapaxes(0, 1)
        picks[name] = jnp.repeat(chosen, q.shape[1] // chosen.shape[0], axis=0)
    masks = {name: _mask(pick, mass.shape) & past[None] for name, pick in picks.items()}
    found = {}
    for name, mask in masks.items():
        held = (past_mass * mask).sum(-1)
        found[name] = {
            "share": own_mass + held,
            "past": held / jnp.maximum(past_mass.sum(-1), 1e-30),
            "recall": (mask & masks["oracle"]).sum(-1) / count,
            "held": spread(past_mass * mask),
        }
    total = jnp.concatenate([own_mass[..., None], spread(past_mass)], axis=-1)
    return {"mass": total, "selectors": found}


def _chunk_mass(q, k, at, chunk: int) -> jax.Array:
    """Mass of full attention in each chunk, [H, Q, N], for queries [Q, H, K] at positions `at`."""
    weights = log_mass(q[None], k[None].astype(jnp.float32), at, chunk_size=chunk)[0]
    return jax.nn.softmax(weights, axis=-1)


def _octave(count: jax.Array) -> jax.Array:
    """0 for counts up to 1, 1 for 2 and 3, 2 for 4 to 7, ..."""
    return jnp.floor(jnp.log2(jnp.maximum(count, 1) + 0.5)).astype(jnp.int32)


def _mask(chosen: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Whether a chunk is among the chosen [H or 1, Q, J]: bool [H, Q, N]."""
    numbers = jnp.arange(shape[-1])
    return jnp.broadcast_to((chosen[..., None] == numbers[None, None, None]).any(-2), shape)

"""Digests of arrays, computed where they lie, and seals of records: what a checkpoint stores.

A digest is a sum over all elements of a mix of its bits and its index. A sum does not depend on
order, so that it is the same however an array is spread over devices and hosts, and nothing has to
be gathered or read back from storage. It finds accidents (any change of a single element, and of
several but for one in 2^64), not forgeries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Odd numbers with well spread bits: one a dimension for the index, three to mix with.
_INDEX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)
_MIX = (0x7FEB352D, 0x846CA68B, 0x2C1B3C6D)
_SEAL, _SHA256 = "seal", "sha256"
_NAMED = 3  # arrays that a message names
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Summary(NamedTuple):
    """What is known of an array without looking at it again."""

    digest: str  # 16 hexadecimal digits
    not_finite: int  # how many of its values


def flat(tree: Any) -> list[tuple[str, Any]]:
    """(dotted name, leaf) of every leaf of a tree of dictionaries, tuples and named tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(".".join(map(_part, path)), leaf) for path, leaf in leaves]


def _part(key: Any) -> str:
    """A key of a path by itself, the same for a named tuple and the dictionary it is stored as."""
    return jax.tree_util.keystr((key,), simple=True)


def summarize(tree: Any) -> dict[str, Summary]:
    """Digest and number of values that are not finite, of every array of a tree by dotted name.

    Args:
      tree: of jax or NumPy arrays with elements of 1, 2 or 4 bytes, spread over devices in any way.
        All hosts that share them have to call this together.
    """
    # One after the other: where several processes have many of them under way on CPUs, one process
    # can wait for ever (seen with two, at the first checkpoint).
    sums = [(name, jax.device_get(_sums(leaf))) for name, leaf in flat(tree)]
    return {
        name: Summary(f"{int(first):08x}{int(second):08x}", int(bad))
        for name, (first, second, bad) in sums
    }


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two sums, modulo 2^32, that make a digest, and the number of values that are not finite."""
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(bits, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for dimension in range(x.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
        index += along * jnp.uint32(_INDEX[dimension])
    # Steps that can be undone, and odd factors: one changed element always changes both sums.
    first = (words ^ (words >> 16)) * jnp.uint32(_MIX[0])
    first ^= first >> 15
    second = first * jnp.uint32(_MIX[1])
    second ^= second >> 16
    terms = (
        first * (index | 1),
        second * (index * jnp.uint32(_MIX[2]) | 1),
        jnp.logical_not(jnp.isfinite(x)).astype(jnp.uint32),
    )
    # All in one pass: as three sums a CPU takes ten times as long.
    zeros = (jnp.uint32(0),) * 3
    add = lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True))
    return jax.lax.reduce(terms, zeros, add, tuple(range(x.ndim)))


def changed(found: Mapping[str, Summary], saved: Mapping[str, str]) -> str:
    """Which arrays are not those whose digests were saved, as a clause; "" for none."""
    wrong = [
        name
        for name in sorted(saved.keys() | found.keys())
        if name not in found or found[name].digest != saved.get(name)
    ]
    if not wrong:
        return ""
    arrays = "array is" if len(wrong) == 1 else "arrays are"
    return f"{len(wrong)} {arrays} not what was saved (by the digest): {_some(wrong)}"


def not_finite(summaries: Mapping[str, Summary]) -> str:
    """Which arrays hold values that are not finite, as a clause; "" for none."""
    bad = {name: s.not_finite for name, s in summaries.items() if s.not_finite}
    if not bad:
        return ""
    return f"{sum(bad.values())} values that are NaN or infinite, in {_some(sorted(bad))}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def seal(record: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """A record with `facts` and a SHA-256 of both beside its own keys; all of it goes into JSON."""
    return {**record, _SEAL: {**facts, _SHA256: _sha256(record, facts)}}


def unseal(record: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What `seal` was given, of what came back from JSON; None for facts that it does not have.

    Raises:
      ValueError: it is not what was sealed.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    facts = record.get(_SEAL)
    if facts is None:
        return record, None
    record = {name: value for name, value in record.items() if name != _SEAL}
    found = facts.pop(_SHA256, None) if isinstance(facts, dict) else None
    if found != _sha256(record, facts):
        raise ValueError("it is not what was saved (by its SHA-256)")
    return record, facts


def _sha256(record: dict[str, Any], facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([record, facts], sort_keys=True).encode()).hexdigest()

"""Trees of parameters, and loops over the layers in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]
"""Parameters as nested dicts of arrays."""


def select(params: Params, chosen: Callable[[str], bool], before: str = "") -> Params:
    """The part of a tree of parameters (or of its axes, shardings, ...) with the chosen names.

    Args:
      params: nested dicts; whatever is no dict counts as one parameter.
      chosen: told the dotted name of each.
      before: prefix of all names.
    """
    kept: Params = {}
    for key, value in params.items():
        if not isinstance(value, dict):
            if chosen(before + key):
                kept[key] = value
        elif part := select(value, chosen, f"{before}{key}."):
            kept[key] = part
    return kept


def joined(first: Params, second: Params) -> Params:
    """Both trees of parameters in one; where both have a parameter, the second's counts."""
    both = dict(first)
    for key, value in second.items():
        nested = isinstance(value, dict) and key in first
        both[key] = joined(first[key], value) if nested else value
    return both


def where_or_zeros(condition: jax.Array | None, make: Callable[[], Any]) -> Any:
    """What `make` returns, or zeros; None: always the former."""
    if condition is None:
        return make()
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
    return jax.lax.cond(condition, make, zeros)


def is_list(x: Any) -> bool:
    """Whether layers are given as a list, see `model.unstack`."""
    return isinstance(x, list | nnx.List)


def scan_layers(body, carry, scanned):
    """`jax.lax.scan`, written out where layers are given as a list (see `model.unstack`)."""
    parts, tree = jax.tree.flatten(scanned, is_leaf=is_list)
    lists = [part for part in parts if is_list(part)]
    if not lists:
        return jax.lax.scan(body, carry, scanned)
    collected = []
    for i in range(len(lists[0])):
        carry, out = body(carry, jax.tree.unflatten(tree, [part[i] for part in parts]))
        collected.append(out)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)

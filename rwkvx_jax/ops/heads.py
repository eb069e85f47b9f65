"""Attention ops as a loop over batch rows and key heads, under every transformation of JAX.

The functions of one head hold loops of data-dependent length, which can't be batched, partitioned
or differentiated in reverse as they are. What each transformation does instead is said here.
"""

import functools

import jax
import jax.numpy as jnp

from rwkvx_jax.ops.derivatives import forward_only
from rwkvx_jax.ops.placement import partitioned

_NO_SECOND_REVERSE = (
    "attention: loops of data-dependent length have one reverse mode, not a second one over it; "
    "use jax.hessian or jax.jvp of jax.grad, or implementation='reference'"
)


def fold_vmapped(function):
    """Makes `jax.vmap` of a function of [B, ...] arrays lengthen axis 0 instead of batching loops.

    A loop of data-dependent length, batched, would run every row for as long as the longest needs
    and copy all it carries at each step.

    Args:
      function: arrays with a common leading axis -> tree of arrays with that leading axis.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(size, batched, *args):
        def fold(x, is_batched):
            if not is_batched:
                x = jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = folded(*map(fold, args, batched))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return folded


def map_heads(function, arrays, rows):
    """Applies a function of one key head to every key head of every batch row, one after the other.

    Differentiable in forward mode only.

    Args:
      function: (*arrays [T, n, ...], *rows [...]) -> tuple of arrays [T, n, ...]. n differs
        between arrays: 1 for those that have a head for each key head, M for those with M.
      arrays: tuple of [B, T, n * G, ...]; G, the number of key heads, is the smallest of all.
      rows: tuple of integers [B] or [B, T] that all heads of a batch row share.

    Returns:
      Tuple of arrays [B, T, n * G, ...].
    """
    groups, count = min(x.shape[2] for x in arrays), len(arrays)
    split = lambda x: x.reshape(*x.shape[:2], groups, x.shape[2] // groups, *x.shape[3:])
    join = lambda x: x.reshape(*x.shape[:2], groups * x.shape[3], *x.shape[4:])

    def all_heads(*arrays_and_rows):
        arrays, rows = arrays_and_rows[:count], arrays_and_rows[count:]
        batch, _, groups = arrays[0].shape[:3]

        def flat(x):
            x = jnp.moveaxis(x, 2, 1)
            return x.reshape(batch * groups, *x.shape[2:])

        def unflat(x):
            return jnp.moveaxis(x.reshape(batch, groups, *x.shape[1:]), 1, 2)

        inputs = (*map(flat, arrays), *(jnp.repeat(x, groups, axis=0) for x in rows))
        return jax.tree.map(unflat, jax.lax.map(lambda x: function(*x), inputs))

    run = fold_vmapped(functools.partial(partitioned, all_heads))
    results = forward_only(_NO_SECOND_REVERSE, run, all_heads)(*map(split, arrays), *rows)
    return jax.tree.map(join, results)

"""Parameters that are not finite: found wherever a model is loaded or converted.

One NaN makes every logit NaN, and a comparison of NaNs still gives an answer: a model that holds
one must not reach any evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.convert.tensors import ConversionError

_BLOCK = 1 << 20  # values looked at in one go, so that the temporary array stays in the cache
_SHOWN = 8


def nonfinite_values(array: np.ndarray) -> int:
    """How many values of an array in host memory are NaN or infinite."""
    values = array.reshape(-1)
    blocks = (values[i : i + _BLOCK] for i in range(0, values.size, _BLOCK))
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)


@jax.jit
def _on_device(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.sum(~jnp.isfinite(array)) for name, array in arrays.items()}


def check_finite(params: Mapping[str, Any], where: str) -> None:
    """Refuses parameters with values that are NaN or infinite.

    Arrays on an accelerator are looked at there, in one program; others by numpy.

    Args:
      params: floating-point arrays by name, of numpy or JAX.
      where: the checkpoint, for the message.

    Raises:
      ConversionError: names the checkpoint and the tensors.
    """
    remote = {name: array for name, array in params.items() if _is_remote(array)}
    counts = {name: int(count) for name, count in jax.device_get(_on_device(remote)).items()}
    for name, array in params.items():
        if name not in remote:
            counts[name] = nonfinite_values(np.asarray(array))
    refuse(counts, where)


def refuse(counts: Mapping[str, int], where: str) -> None:
    """Raises ConversionError for a checkpoint `where` some tensors have values not finite."""
    if problem := describe(counts):
        raise ConversionError(
            f"{where} holds {problem}: no result of it would mean anything. Its training diverged "
            "or the file is damaged; use an earlier checkpoint"
        )


def _is_remote(array: Any) -> bool:
    return isinstance(array, jax.Array) and next(iter(array.devices())).platform != "cpu"


def describe(counts: Mapping[str, int]) -> str:
    """The values that are not finite, from their number by tensor; "" if there are none."""
    found = {name: count for name, count in counts.items() if count}
    if not found:
        return ""
    shown = ", ".join(f"{name} ({count})" for name, count in list(found.items())[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"values that are NaN or infinite, in {len(found)} tensors: {shown}{more}"

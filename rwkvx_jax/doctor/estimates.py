"""What the compiler's schedules say a kernel should take on this chip, to stand beside its time."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re

from pallas_kernels.common import current_chip
from rwkvx_jax.config import ModelConfig

# Kernels of one forward call of an op, and how their time grows with the length.
_KERNELS = {
    "wkv7": (("wkv7_forward",), 1),
    "select_chunks": (("select_chunks",), 2),
    "sparse_attention": (
        (
            "routing_sort",
            "routing_emit",
            "block_sparse_start",
            "block_sparse_past_forward",
            "block_sparse_own_forward",
        ),
        1,
    ),
}


def static_estimate(op: str, model: ModelConfig, length: int) -> float | None:
    """Seconds of a forward call in bfloat16 by `pallas_kernels/static_costs.json`; an estimate.

    Args:
      op: its name.
      model: its width, chunk and top-k.
      length: tokens of one text.

    Returns:
      None where the file has no case of this chip and these sizes.
    """
    chip = current_chip()
    if chip is None or op not in _KERNELS:
        return None
    kernels, power = _KERNELS[op]
    chunking = "" if op == "wkv7" else f"/C{model.chunk_size}/K{model.top_k}"
    total = 0.0
    for kernel in kernels:
        pattern = re.compile(rf"{kernel}/{chip}/D{model.width}/T(\d+){chunking}")
        cases = {
            int(match[1]): case["estimated_seconds"]
            for name, case in _costs().items()
            if (match := pattern.fullmatch(name))
        }
        if not cases:
            return None
        nearest = min(cases, key=lambda tokens: abs(tokens - length))
        total += cases[nearest] * (length / nearest) ** power
    return total


@functools.cache
def _costs() -> dict[str, dict]:
    file = importlib.resources.files("pallas_kernels") / "static_costs.json"
    return json.loads(file.read_text())["cases"]

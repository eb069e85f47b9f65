"""The checked-in table of the TPU kernels' static costs, and what it predicts.

`rwkvx_jax.perf.static_costs` makes the table from the compiler's schedules. The planner scales its
bundles to the kernels of a program; the doctor shows its estimates beside measured times.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pallas_kernels
from pallas_kernels.chips import TPUS
from pallas_kernels.common import current_chip
from rwkvx_jax.config import ModelConfig
from rwkvx_jax.modules.mixers import MIXERS
from rwkvx_jax.perf.static_cases import DELTA_RULES

TABLE = Path(pallas_kernels.__file__).with_name("static_costs.json")

_SPARSE = (
    "routing_sort",
    "routing_emit",
    "block_sparse_start",
    "block_sparse_past_forward",
    "block_sparse_own_forward",
)
_HEAD = 64  # of the table's cases of WKV-7 and sparse attention


def read_costs() -> dict[str, dict]:
    """Cases of the table by name, such as "wkv7_forward/v5e/D768/T4096"; see `static_costs`."""
    return json.loads(TABLE.read_text())["cases"] if TABLE.exists() else {}


class KernelCosts:
    """Bundles of Pallas kernels, from the checked-in table of the compiler's schedules."""

    def __init__(
        self, generation: str, cases: Mapping[str, Mapping], variant: tuple[str, ...] = ()
    ):
        """
        Args:
          generation: of the TPU.
          cases: by name "kernel/generation/...", as `read_costs` gives them.
          variant: parts of names such as "C2048" (chunk size) and "K3" (top-k); cases that name
            another chunk size or top-k are another kernel's.
        """
        self._cores = TPUS[generation].cores if generation in TPUS else 1
        self._cases: dict[str, list[Mapping]] = {}
        for name, case in cases.items():
            kernel, chip, *parts = name.split("/")
            own = {part for part in parts if part[0] in "CK"}
            if chip == generation and own <= set(variant):
                self._cases.setdefault(kernel, []).append(case)

    def bundles(self, kernel: str, size: float, parallel_steps: int | None = None) -> float | None:
        """Bundles that the busiest core issues in one call.

        Those of the case nearest in size and in the steps that cores may share, scaled by the bytes
        and by the share of the grid that a core gets.

        Args:
          kernel: its name.
          size: bytes of its arguments and results.
          parallel_steps: see `Work`.

        Returns:
          None where the table has no case.
        """
        cases = self._cases.get(kernel)
        if not cases or not size:
            return None
        near = min(cases, key=lambda case: _distance(case, size, parallel_steps))
        share = self._share(parallel_steps) / self._share(near.get("parallel_steps"))
        return near["bundles"] * size / near["hbm_bytes"] * share

    def _share(self, steps: int | None) -> float:
        """Part of a grid that the busiest core runs; an equal one where the steps are not known."""
        return 1 / self._cores if steps is None else -(-steps // self._cores) / steps


def _distance(case: Mapping, size: float, parallel_steps: int | None) -> float:
    """How far a case is from a call: both ratios, as logarithms."""
    ratios = [case["hbm_bytes"] / size]
    if parallel_steps and case.get("parallel_steps"):
        ratios.append(case["parallel_steps"] / parallel_steps)
    return sum(abs(math.log(ratio)) for ratio in ratios)


class _Call(NamedTuple):
    """A forward call of an op, as the table names it.

    Attributes:
      kernels: that it runs.
      width: channels of its values.
      sizes: end of the cases' names: chunk and top-k.
      power: how its time grows with the length.
    """

    kernels: tuple[str, ...]
    width: int
    sizes: str = ""
    power: int = 1


def static_estimate(op: str, model: ModelConfig, length: int) -> float | None:
    """Seconds of a forward call in bfloat16 by `pallas_kernels/static_costs.json`; an estimate.

    It is that of the case nearest in width and length, scaled: packs of heads take turns, so that
    time is proportional to their number.

    Args:
      op: its name.
      model: its mixer, width, head size, chunk and top-k.
      length: tokens of one text.

    Returns:
      None where the file has no case of this chip and these sizes.
    """
    chip, call = current_chip(), _call(op, model)
    if chip is None or call is None:
        return None
    total, costs = 0.0, read_costs()
    for kernel in call.kernels:
        pattern = re.compile(rf"{kernel}/{chip}/D(\d+)/T(\d+){call.sizes}")
        cases = {
            (_packs(call.width) / _packs(int(match[1])), length / int(match[2])): case[
                "estimated_seconds"
            ]
            for name, case in costs.items()
            if (match := pattern.fullmatch(name))
        }
        if not cases:
            return None
        wider, longer = min(cases, key=lambda ratios: sum(abs(math.log(x)) for x in ratios))
        total += cases[wider, longer] * wider * longer**call.power
    return total


def _packs(width: int) -> int:
    """Packs of 128 channels that so many take."""
    return -(-width // 128)


def _call(op: str, model: ModelConfig) -> _Call | None:
    """None where the table has no case of the op with heads like the model's."""
    if op == "generalized_delta_rule":
        sizes, bound = model.mixer_sizes, MIXERS[model.mixer].decay_bound
        wanted = sizes.keys, sizes.values, sizes.delta, bound
        kind = "scalar" if sizes.scalar else "vector"
        for kernel, heads in DELTA_RULES.items():
            if kernel.startswith(kind) and kernel.endswith("forward") and heads == wanted:
                return _Call((kernel,), sizes.heads * sizes.values)
        return None
    if model.head_size != _HEAD:
        return None
    chunking = f"/C{model.chunk_size}/K{model.top_k}"
    return {
        "wkv7": _Call(("wkv7_forward",), model.width),
        "select_chunks": _Call(("select_chunks",), model.width, chunking, power=2),
        "sparse_attention": _Call(_SPARSE, model.width, chunking),
    }.get(op)

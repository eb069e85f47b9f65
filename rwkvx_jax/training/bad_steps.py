"""Why a step was bad, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rwkvx_jax.config import Stage


def explain_bad_step(
    values: Mapping[str, float], stage: Stage, step: int, finite_update: bool
) -> tuple[str, str]:
    """What was wrong with a step, and what to do about it.

    Args:
      values: its metrics.
      stage: that it belongs to.
      step: its number over all stages.
      finite_update: whether all values that it would have made are finite.
    """
    loss, norm = values["objective"], values["grad_norm"]
    if values["without_target"] == stage.global_batch:
        advice = f"Raise seq_len (it is {stage.seq_len})"
        return f"no sample with a target at step {step}", advice
    advice = "Lower peak_lr"
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"not finite: loss {loss}, gradient norm {norm} at step {step}", advice
    if not finite_update:
        kind = f"update not finite (loss {loss}, gradient norm {norm}) at step {step}"
        return kind, "Raise optimizer.eps or lower peak_lr"
    return f"spike: loss {loss}, gradient norm {norm} at step {step}", advice

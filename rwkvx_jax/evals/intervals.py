"""Shares of right answers and means, with intervals that say what so many trials can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A score and its 95 % interval; low and high are None where one trial tells nothing of it."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of_mean(cls, value: float, error: float | None) -> Estimate:
        """Of a mean and its standard error."""
        if error is None:
            return cls(value, None, None)
        return cls(value, value - 1.96 * error, value + 1.96 * error)

    @classmethod
    def of_ratio(cls, sums: Sequence[float], weights: Sequence[float]) -> Estimate:
        """Of sum(sums) / sum(weights) over documents that differ in both.

        Its standard error is the ratio estimator's (Cochran, Sampling Techniques, section 6.4).
        """
        total, count = float(np.sum(weights)), len(sums)
        value = float(np.sum(sums)) / total
        if count < 2:
            return cls(value, None, None)
        rest = np.asarray(sums) - value * np.asarray(weights)
        error = float(np.sqrt(count / (count - 1) * np.sum(rest**2)) / total)
        return cls.of_mean(value, error)

    def text(self, digits: int = 3) -> str:
        """Such as "1.234 ± 0.012"."""
        half = "" if self.high is None else f" ± {self.high - self.value:.{digits}f}"
        return f"{self.value:.{digits}f}{half}"


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of these values; None where there is only one."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def wilson(correct: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share: (low, high), 95 % at the default z.

    Unlike the normal approximation it stays within [0, 1] and keeps a width at 0 and 100 %.
    Without any trial it is (0, 1). Trials scored between 0 and 1 count in part; they vary less than
    right and wrong ones of the same mean, so the interval is then wide enough.
    """
    if trials == 0:
        return 0.0, 1.0
    share, z2 = correct / trials, z * z / trials
    center = (share + z2 / 2) / (1 + z2)
    half = z * ((share * (1 - share) + z2 / 4) / trials) ** 0.5 / (1 + z2)
    return max(0.0, center - half), min(1.0, center + half)


def share_with_interval(correct: float, trials: int) -> dict[str, Any]:
    """JSON form of a share; `accuracy` is None where nothing was tried."""
    low, high = wilson(correct, trials)
    accuracy = correct / trials if trials else None
    return {"trials": trials, "correct": correct, "accuracy": accuracy, "low": low, "high": high}

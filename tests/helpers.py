"""Shared helpers of the test suite: one comparison with a readable report, one place that knows
where optional reference data lies."""

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_path(*parts: str) -> Path:
    """Path of optional reference data beside the checkout; skips the test where it is absent."""
    path = ROOT.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"reference data {'/'.join(parts)} is not beside this checkout")
    return path


def assert_close(actual, expected, *, rel: float, name: str = "value") -> None:
    """Asserts max |actual - expected| <= rel * max(1e-30, max |expected|), elementwise finite.

    The error is measured against the largest entry of `expected`, so that near-zero entries of a
    gradient do not dominate. Reports the maximum and the relative root-mean-square error.
    """
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} != {expected.shape}"
    assert np.isfinite(actual).all(), f"{name}: not finite"
    if actual.size == 0:
        return
    error = np.abs(actual - expected)
    scale = max(float(np.abs(expected).max()), 1e-30)
    rms = float(np.sqrt((error**2).mean() / max((expected**2).mean(), 1e-60)))
    assert error.max() <= rel * scale, (
        f"{name}: max error {error.max():.3e} > {rel:g} x largest entry {scale:.3e} "
        f"(relative rms {rms:.3e})"
    )


def assert_within(found, expected, bound):
    """Largest absolute difference at most `bound`; shapes must be the same."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error = np.abs(found.astype(np.float64) - expected).max()
    assert error <= bound, f"largest difference {error:.2e}, allowed {bound:.0e}"

"""Tests run on 8 simulated CPU devices, with implicit rank promotion forbidden."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config, items):
    """Skips tests marked for hardware that is not here."""
    backend = jax.default_backend()
    for item in items:
        for marker in ("tpu", "gpu"):
            if item.get_closest_marker(marker) and backend != marker:
                item.add_marker(
                    pytest.mark.skip(reason=f"needs a {marker.upper()}, found {backend}")
                )

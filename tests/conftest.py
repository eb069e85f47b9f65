"""Tests run on 8 simulated CPU devices, with implicit rank promotion forbidden.

JAX_PLATFORMS=tpu (or cuda) in the environment runs them there: `pytest -m tpu` those that need it.

The shapes and dtypes in the signatures of ops, modules, the cache and the model are checked at each
call, see `tests/shape_checks.py`.

XLA optimises little, since at these sizes compiling is nearly all the time that a test takes;
modules that compile for chips, or whose numbers depend on it, are marked `optimized`. Before jax
0.12, XLA still has the CPU's older way to emit fused loops, which compiles twice as fast: all tests
take it there, and the tests under a newer jax the one that replaced it.
"""

import importlib.util
import os

import jax
import pytest
from jaxtyping import install_import_hook

if importlib.util.find_spec("beartype"):  # of the extra `dev`
    from tests.shape_checks import checked_after_the_call

    install_import_hook(  # before anything imports them
        ["rwkvx_jax.ops", "rwkvx_jax.modules", "rwkvx_jax.cache", "rwkvx_jax.model"],
        f"{checked_after_the_call.__module__}.{checked_after_the_call.__name__}",
    )

if jax.__version_info__ < (0, 12):  # later ones end on a flag that they do not know
    os.environ["XLA_FLAGS"] = " ".join(
        [
            "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
            os.environ.get("XLA_FLAGS", ""),
        ]
    )
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# With whole call stacks, XLA's CPU compiler (jax 0.10.2) did not come back from inlining a loop of
# tests/ops/test_transforms.py in a process that had run two hundred other tests; alone, in 0.8 s.
jax.config.update("jax_traceback_in_locations_limit", 1)


def pytest_collection_modifyitems(config, items):
    """Skips tests marked for hardware that is not here."""
    backend = jax.default_backend()
    for item in items:
        for marker in ("tpu", "gpu"):
            if item.get_closest_marker(marker) and backend != marker:
                item.add_marker(
                    pytest.mark.skip(reason=f"needs a {marker.upper()}, found {backend}")
                )


@pytest.fixture(scope="module", autouse=True)
def quick_compile(request):
    quick = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # a worker that keeps the programs of all modules grows to 7 GB

"""The TPU kernels compiled for TPUs that are not here: schedule, traffic and compile time.

Needs the TPU compiler (libtpu), no TPU. The counts are the compiler's static schedule.
"""

import pytest

from rwkvx_jax.plan import topology
from tools import static_costs
from tools.static_costs import Case

pytestmark = pytest.mark.skipif(
    not topology.is_available(), reason="libtpu is not installed: pip install 'jax[tpu]'"
)

# Bundles per token and head pair. v5p has no bar of its own; its table guards it.
BARS = {
    "wkv7_forward": {"v5e": 10, "v6e": 8.5},
    "wkv7_backward": {"v5e": 20, "v6e": 17},
}
FAST = {Case(kernel, "v5e", 768, 4096) for kernel in BARS}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case in FAST else pytest.mark.slow)
        for case in static_costs.all_cases()
    ],
)
def test_schedule(case):
    result = static_costs.measure(case)
    expected = static_costs.read_table()[case.name]
    remedy = f"{case.name}: if intended, run `make static-costs`"
    assert result["body"] == pytest.approx(expected["body"], rel=0.05), remedy
    assert result["steps"] == expected["steps"], remedy
    assert result["traffic"] <= 1.3
    assert result["compile_seconds"] < 60
    bar = BARS.get(case.kernel, {}).get(case.chip)
    assert bar is None or result["bundles_per_unit"] <= bar


def test_topologies():
    assert topology.topology_mesh("v5e:2x2", {"data": 2, "tensor": 2}).shape == {
        "data": 2,
        "tensor": 2,
    }
    assert topology.topology_mesh("v5p:4x4x8").devices.size == 128


@pytest.mark.parametrize(
    "name, message",
    [("v5e", "v5e:2x2"), ("v9:2x2", "v5e:2x2"), ("v5e:3x7", "does not know topology 'v5e:3x7'")],
)
def test_bad_topologies_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        topology.topology_devices(name)


def test_a_mesh_larger_than_the_topology_is_refused():
    with pytest.raises(ValueError, match="need 8 devices; v5e:2x2 has 4"):
        topology.topology_mesh("v5e:2x2", {"data": 8})

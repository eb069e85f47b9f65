"""Many requests through one engine; the long form is benchmarks/endurance.py."""

import pytest

from benchmarks import endurance


@pytest.mark.thorough
def test_none_is_lost_or_mixed_up_and_memory_stays_flat():
    found = endurance.endure(1500)
    assert found.answered == 1500
    assert (found.lost, found.wrong) == (0, 0)
    assert len(found.arrays) == 1, found.arrays

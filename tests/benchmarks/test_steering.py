from pathlib import Path

import pytest

from benchmarks.steering import measure
from tests.support.brokers import require_mosquitto


@pytest.mark.broker
def test_a_small_fleet_is_set_and_commanded(tmp_path: Path) -> None:
    require_mosquitto()
    found = measure(3, tmp_path, rounds=2)
    assert [(each.what, each.devices, each.well) for each in found] == [("set", 3, 3), ("command", 3, 3)] * 2
    assert all(0 < each.first_s <= each.half_s <= each.last_s for each in found)

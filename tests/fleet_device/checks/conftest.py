from collections.abc import Iterator

import pytest

from tests.support.memory_device import at_work
from tests.support.memory_fleet import MemoryFleet


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for wait in ("doctor._WAIT_S", "doctor._STATES_S", "edge_check._WAIT_S"):
        monkeypatch.setattr(f"fleet_device.checks.{wait}", 0.2)


@pytest.fixture
def fleet() -> Iterator[MemoryFleet]:
    fleet = MemoryFleet()
    with at_work(fleet):
        yield fleet

"""What a restart of an edge does not change of what devices have used, and done."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleet_edge.errors import OpenRefused
from fleet_edge.guard.guard import FenceBegun, Guard
from fleet_edge.guard.kept import KeptStandings
from fleet_edge.guard.quotas import QuotaSettings
from fleet_edge.guard.strikes import FenceSettings
from schemas.reasons import FaultCode
from tests.support.drafts import open_message
from tests.support.memory_fleet import Clock

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Edge:
    """One edge, run after run; a monotonic clock begins at another time in each."""

    def __init__(self, folder: Path) -> None:
        self.path, self.wall, self.runs = folder / "standings.json", NOON, 0
        self.start()

    def start(self) -> None:
        self.runs += 1
        self.clock = Clock()
        self.clock.seconds = 1000.0 * self.runs
        self.guard = Guard(QuotaSettings(), FenceSettings(), clock=self.clock)
        self.kept = KeptStandings(self.guard, self.path, lambda: self.wall)
        self.kept.read()

    def restart(self, after_s: float = 0.0) -> None:
        self.kept.write()
        self.wall += timedelta(seconds=after_s)
        self.start()

    def opens(self) -> int:
        """Open sessions until that is refused; return how many."""
        for number in range(100):
            try:
                self.guard.admit_open("device-1", open_message())
            except OpenRefused:
                return number
        raise AssertionError("nothing bounds it")


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    return Edge(tmp_path)


def test_quotas_are_as_used_as_they_were_and_fill_meanwhile(edge: Edge) -> None:
    whole = edge.opens()
    edge.restart()
    assert edge.opens() == 0
    edge.restart(after_s=30.0)
    assert 0 < edge.opens() < whole
    edge.restart(after_s=3600.0)
    assert edge.opens() == whole


def test_strikes_count_on_and_the_next_fence_is_as_long_as_without_a_restart(edge: Edge) -> None:
    lengths = []
    for _ in range(3):
        edge.guard.strike_grammar("device-1")
        edge.restart(after_s=0.5)
        edge.guard.strike_grammar("device-1")
        (begun,) = edge.guard.take_notices()
        assert isinstance(begun, FenceBegun)
        lengths.append(begun.for_s)
        edge.restart(after_s=begun.for_s)
    assert lengths == [10.0, 20.0, 40.0]
    edge.restart(after_s=1000.0)
    while not (notices := edge.guard.take_notices()):
        edge.guard.strike("device-1", FaultCode.TOKEN)
    assert isinstance(notices[0], FenceBegun)
    assert notices[0].for_s == 10.0


def test_devices_that_have_used_nothing_are_not_kept(edge: Edge) -> None:
    for number in range(50):
        edge.guard.accepts(f"dssd/v1/fleet/device-{number}/up/state".encode(), 60, retained=False)
    edge.guard.strike("device-7", FaultCode.MALFORMED)
    assert list(edge.guard.kept(10)) == ["device-7"]


def test_of_too_many_those_with_strikes_are_kept(edge: Edge) -> None:
    for number in range(20):
        edge.guard.admit_open(f"device-{number}", open_message())
    edge.guard.strike("device-3", FaultCode.MALFORMED)
    assert "device-3" in edge.guard.kept(4)
    assert len(edge.guard.kept(4)) == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"at": "now", "devices": {}}', b"\xff"])
def test_a_damaged_file_is_as_none(edge: Edge, content: bytes) -> None:
    edge.path.write_bytes(content)
    edge.start()
    assert edge.opens() > 0


def test_a_clock_that_was_set_back_lengthens_nothing(edge: Edge) -> None:
    edge.opens()
    edge.restart(after_s=-86_400.0)
    edge.clock.seconds += 3600.0
    assert edge.opens() > 0


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(edge: Edge) -> None:
    KeptStandings(edge.guard, Path("/nowhere/at/all.json"), lambda: NOON).write()

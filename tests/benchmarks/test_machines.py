from dataclasses import replace

from benchmarks.machines import Machine, most_devices
from fleet_admin.advice import Workload

SLOW = Machine("a large target on two cores", read_ms=75, row_ms=9)


def most(machine: Machine, draft_ms: float) -> int | None:
    work = Workload(curve=machine.curve(), draft_s=draft_ms / 1e3, acceptance=0.8, round_trip_s=0.02)
    return most_devices(work)


def test_more_arithmetic_on_the_same_memory_drafts_for_more_devices() -> None:
    few, many = most(SLOW, 15), most(replace(SLOW, row_ms=1.2), 15)
    assert few is not None
    assert many is not None
    assert many > few


def test_drafts_that_take_as_long_as_a_step_never_pay() -> None:
    assert most(SLOW, 75) is None

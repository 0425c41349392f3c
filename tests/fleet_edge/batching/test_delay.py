from fleet_edge.batching.delay import BatchingDelay

STEP_S = 0.1


def learned(**turnarounds_s: float) -> BatchingDelay:
    """Return a gathering that has seen sessions 1, 2, … come back after these times."""
    gathering = BatchingDelay()
    gathering.stepped(STEP_S)
    for handle, seconds in enumerate(turnarounds_s.values(), start=1):
        gathering.answered(handle, at=0.0)
        gathering.arrived(handle, at=seconds)
    return gathering


def test_a_step_is_held_for_a_quick_device() -> None:
    gathering = learned(quick=0.004)
    gathering.answered(1, at=10.0)
    assert 0.004 <= gathering.hold_s(ready=4, now=10.0) <= 0.006


def test_a_slow_device_is_not_waited_for() -> None:
    gathering = learned(slow=0.08)
    gathering.answered(1, at=10.0)
    assert gathering.hold_s(ready=1, now=10.0) == 0.0


def test_one_late_device_does_not_hold_up_many() -> None:
    gathering = learned(late=0.03)
    gathering.answered(1, at=10.0)
    assert gathering.hold_s(ready=1, now=10.0) > 0.0
    assert gathering.hold_s(ready=20, now=10.0) == 0.0


def test_several_late_devices_may() -> None:
    gathering = learned(a=0.03, b=0.03, c=0.03)
    for handle in (1, 2, 3):
        gathering.answered(handle, at=10.0)
    assert gathering.hold_s(ready=5, now=10.0) > 0.03


def test_nobody_ready_means_no_hold() -> None:
    gathering = learned(quick=0.004)
    gathering.answered(1, at=10.0)
    assert gathering.hold_s(ready=0, now=10.0) == 0.0


def test_a_device_that_is_overdue_or_gone_is_not_waited_for() -> None:
    gathering = learned(a=0.004, b=0.004)
    gathering.answered(1, at=10.0)
    gathering.answered(2, at=10.0)
    assert gathering.hold_s(ready=1, now=10.5) == 0.0
    gathering.forget(1)
    gathering.forget(2)
    assert gathering.hold_s(ready=1, now=10.0) == 0.0


def test_it_can_be_turned_off() -> None:
    gathering = learned(quick=0.004)
    gathering.share = 0.0
    gathering.answered(1, at=10.0)
    assert gathering.hold_s(ready=4, now=10.0) == 0.0

import random
from collections.abc import Sequence

from fleet_edge.service import Availability
from fleet_edge.verifiers.contract import Item, Logits, RunsElsewhere, SequenceFailed, TargetAway
from schemas.messages import Fault, Verdict
from schemas.policy import Mode
from tests.support.memory_fleet import Device, MemoryFleet, lossless_text, run, terms


class Elsewhere:
    def __init__(self, fleet: MemoryFleet) -> None:
        self.reason = ""
        self.unreachable = False
        self.faulty: int | None = None
        self._score = fleet.verifier.score
        vars(fleet.verifier).update(score=self.score, away=lambda: self.reason, shut_down=lambda: None)
        assert isinstance(fleet.verifier, RunsElsewhere)

    def score(self, items: Sequence[Item]) -> Logits:
        if self.unreachable:
            raise TargetAway("No server answers.", retry_s=1.0)
        for item in items:
            if item.sequence == self.faulty:
                raise SequenceFailed("The server refuses it.", sequence=item.sequence)
        return self._score(items)


def waiting(fleet: MemoryFleet, count: int) -> list[Device]:
    devices = [
        Device(fleet, f"device-{number}", terms(number, mode=Mode.COUPLED, max_new_tokens=20), length=3, ahead=False)
        for number in range(count)
    ]
    for device in devices:
        device.act()
        fleet.settle()
    for device in devices:
        device.act()
    fleet.broker.pump()
    return devices


def test_drafts_wait_while_the_target_is_away_and_are_verified_when_it_is_back() -> None:
    fleet = MemoryFleet()
    target = Elsewhere(fleet)
    devices = waiting(fleet, 3)
    target.reason = "No server answers."
    assert not fleet.step()
    target.reason = ""
    assert fleet.step()
    fleet.broker.pump()
    assert all(isinstance(message, Verdict) for device in devices for message in device.messages)


def test_a_step_that_finds_the_target_away_fails_nobody_and_is_not_repeated_at_once() -> None:
    fleet = MemoryFleet()
    target = Elsewhere(fleet)
    devices = waiting(fleet, 3)
    target.unreachable = True
    fleet.step()
    target.unreachable = False
    assert not fleet.step()  # not before its time
    fleet.clock.seconds += 1.5
    run(fleet, devices, random.Random(0))
    assert [device.session.committed for device in devices] == [lossless_text(device.terms) for device in devices]


def test_a_sequence_that_cannot_be_computed_fails_alone() -> None:
    fleet = MemoryFleet()
    target = Elsewhere(fleet)
    devices = waiting(fleet, 3)
    target.faulty = next(session.handle for session in fleet.edge.sessions if session.device == "device-1")
    for _ in range(3):
        fleet.step()
    fleet.broker.pump()
    told = {device.name: [type(message) for message in device.messages] for device in devices}
    assert told == {"device-0": [Verdict], "device-1": [Fault], "device-2": [Verdict]}


def test_an_absence_counts_when_it_lasts() -> None:
    now = [0.0]
    one = Availability(5.0, lambda: now[0])
    assert not one.changes("")
    assert not one.changes("away")
    now[0] = 4.0
    assert not one.changes("away")
    assert not one.changes("")
    now[0] = 6.0
    assert not one.changes("away")  # another absence
    now[0] = 11.0
    assert one.changes("away")
    assert not one.changes("away for another reason")
    assert one.changes("")
    assert not one.changes("")

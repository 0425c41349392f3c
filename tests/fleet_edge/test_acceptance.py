import random
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_edge.sessions.statistics import RecentAcceptance
from schemas.policy import Mode
from tests.support import memory_fleet
from tests.support.markov import MarkovScript
from tests.support.memory_fleet import END, TARGET, Device, MemoryFleet, run, terms

CODE = "acceptance-collapsed"


class Contrary(MarkovScript):
    """A draft language that proposes what the target is least likely to generate."""

    def __init__(self) -> None:
        super().__init__(size=TARGET.size, seed=0)

    def logits(self, prefix: tuple[int, ...]) -> NDArray[np.float32]:  # type: ignore[override]
        row: NDArray[np.float32] = -TARGET.logits(prefix)
        row[END] = -100.0  # or its drafts would end there
        return row


def write(fleet: MemoryFleet, number: int) -> Device:
    asked = terms(number, mode=Mode.COUPLED, max_new_tokens=40, temperature=0.0)
    device = Device(fleet, "device-1", asked, length=8, ahead=False)
    run(fleet, [device], random.Random(number))
    device.link.stop()
    return device


def collapses(fleet: MemoryFleet) -> list[SimpleNamespace]:
    return [event for event in fleet.sink.of("event") if event.code == CODE]


def test_a_collapse_is_logged_once_a_minute_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_fleet, "DRAFT", Contrary())
    fleet = MemoryFleet()
    for number in range(8):
        write(fleet, number)
    fleet.edge.handlers.recorder.flush()
    events = collapses(fleet)
    assert len({event.id for event in events}) == 1
    assert {event.device for event in events} == {"device-1"}
    assert events[-1].count > 1


def test_after_a_collapse_the_next_session_gets_short_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_fleet, "DRAFT", Contrary())
    fleet = MemoryFleet()
    granted = []
    for number in range(8):
        opened = write(fleet, number).session.opened
        granted.append(opened.max_draft)
    assert (granted[0], granted[-1]) == (16, 4)


def test_an_ordinary_draft_model_is_left_alone() -> None:
    fleet = MemoryFleet()
    for number in range(8):
        opened = write(fleet, number).session.opened
        assert opened.max_draft == 16
    assert collapses(fleet) == []


def test_a_collapse_is_noticed_in_the_middle_of_a_long_text_and_its_end_as_well() -> None:
    recent = RecentAcceptance()
    for _ in range(1_000):
        recent.count(tested=4, accepted=3)
    assert not recent.collapsed
    for _ in range(300):
        recent.count(tested=1, accepted=0)
    assert recent.collapsed
    for _ in range(20):
        recent.count(tested=4, accepted=3)
    assert not recent.collapsed

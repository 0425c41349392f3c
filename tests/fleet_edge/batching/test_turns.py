"""Where there is not memory for all who are busy, little is computed anew, and nobody waits for ever."""

from collections.abc import Sequence

import pytest

from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_edge.batching.turns import Turns
from fleet_edge.verifiers.contract import Item, Logits
from schemas.policy import Mode
from tests.support.memory_fleet import Device, MemoryFleet, lossless_text, terms

DEVICES = 32
PROMPT = 24
ROOM_FOR = 10


def test_a_turn_lasts_until_as_much_is_verified_as_was_computed_to_come_in() -> None:
    turns = Turns()
    assert not turns.lasts(1, now=0.0)
    turns.computed(1, prefilled=20, verified=0, at=0.0)
    turns.computed(1, prefilled=0, verified=19, at=1.0)
    assert turns.lasts(1, now=1.0)
    turns.computed(1, prefilled=0, verified=3, at=1.0)
    assert (turns.lasts(1, now=1.0), turns.balance(1)) == (False, -2)
    turns.end(1)
    turns.computed(1, prefilled=5, verified=0, at=1.0)
    assert (turns.lasts(1, now=1.0), turns.balance(1)) == (True, 5)


def test_who_is_absent_for_long_keeps_no_place() -> None:
    turns = Turns()
    turns.computed(1, prefilled=20, verified=0, at=5.0)
    assert turns.lasts(1, now=6.0)
    assert not turns.lasts(1, now=10.0)


@pytest.mark.parametrize("pacing", [FixedPacing(32, stream=True), FixedPacing(3)], ids=["written", "drafted"])
def test_busy_sessions_that_do_not_all_fit_take_turns(pacing: Pacing, monkeypatch: pytest.MonkeyPatch) -> None:
    # Holding a step needs a clock that runs; and where a token more costs no time, the edge guesses many.
    settings = {"prefix_sharing": "off", "step_tokens": 256, "gather_share": 0.0, "max_guess": 0}
    fleet = MemoryFleet(kv_tokens=ROOM_FOR * 2 * PROMPT, settings=settings)
    computed = 0
    score = fleet.verifier.score

    def counted(items: Sequence[Item]) -> Logits:
        nonlocal computed
        computed += sum(len(item.tokens) for item in items)
        fleet.clock.seconds += 0.05
        return score(items)

    monkeypatch.setattr(fleet.verifier, "score", counted)
    devices = []
    for number in range(DEVICES):
        prompt = (1, *(1 + (number >> place) % 2 for place in range(PROMPT - 1)))
        asked = terms(100 + number, mode=Mode.COUPLED, max_new_tokens=40, prompt=prompt)
        devices.append(Device(fleet, f"device-{number}", asked, length=3, ahead=False, pacing=pacing))
    while not all(device.done for device in devices):
        fleet.broker.pump()
        moved = [device.act() for device in devices]  # all are busy
        fleet.broker.pump()
        assert fleet.step() or any(moved)
    assert [device.session.committed for device in devices] == [lossless_text(device.terms) for device in devices]
    written = sum(len(device.session.committed) for device in devices)
    # At least each prompt and each token once, and what was drafted in vain; without turns it is ten times that.
    assert computed < 3 * (DEVICES * PROMPT + written)

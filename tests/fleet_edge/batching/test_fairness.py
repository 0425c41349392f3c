import math
from collections.abc import Sequence

import pytest

from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_edge.batching.fairness import BackgroundWork, DeviceShares, MemoryTurns
from fleet_edge.sessions.grammars import MAX_FORCED
from fleet_edge.verifiers.contract import Item, Logits
from schemas.policy import Mode
from tests.support.drafts import step_report
from tests.support.memory_fleet import Device, MemoryFleet, lossless_text, terms


def step(work: BackgroundWork, at: float, seconds: float, *, tokens: int, background: int) -> float:
    parts = {1: tokens - background, 2: background}
    work.on_step(step_report(parts, step_s=seconds, at=at + seconds, background={2}))
    return at + seconds


def test_it_gets_its_share_of_the_time_while_others_are_verified() -> None:
    work, now, mine, whole = BackgroundWork(share=0.1), 0.0, 0.0, 0.0
    for _ in range(2000):
        if work.may_run():
            now, mine, whole = step(work, now, 0.12, tokens=148, background=128), mine + 0.12 * 128 / 148, whole + 0.12
        else:
            now, whole = step(work, now, 0.04, tokens=20, background=0), whole + 0.04
    assert 0.09 < mine / whole < 0.12


def test_time_in_which_nothing_is_computed_does_not_count_for_its_share() -> None:
    work, now = BackgroundWork(share=0.1), 0.0
    now = step(work, now, 1.0, tokens=128, background=128)
    for _ in range(4):
        now = step(work, now + 2.0, 0.01, tokens=20, background=0)
        assert not work.may_run(), "devices that pause earn no time for another"
    while not work.may_run():
        now = step(work, now, 0.01, tokens=20, background=0)


def test_work_that_waits_may_take_a_fraction_of_the_silence_of_others() -> None:
    shares = DeviceShares()
    assert shares.quiet_s(["a"], 0.0) == math.inf, "nobody else is served"
    shares.note_served(["b"], 1.0)
    shares.note_served(["a"], 1.9)
    assert 0.0 < shares.quiet_s(["a"], 2.0) < 0.5
    assert shares.quiet_s(["a"], 9.0) == pytest.approx(8.0 * shares.quiet_s(["a"], 2.0))
    assert shares.quiet_s(["b", "c"], 2.0) < 0.1


def test_who_drafts_much_for_nothing_is_wasteful_until_that_is_forgotten() -> None:
    work = BackgroundWork()
    work.count_drafts("device-1", computed=17, committed=1)
    assert not work.wasteful("device-1"), "a few drafts say nothing"
    for _ in range(10):
        work.count_drafts("device-1", computed=17, committed=1)
    assert work.wasteful("device-1")
    assert not work.wasteful("device-2")
    assert [work.longest_draft("device-1", most) for most in (2, 16)] == [2, 4]
    assert work.longest_draft("device-2", 16) == 16
    for _ in range(100):
        work.count_drafts("device-1", computed=5, committed=3)
    assert not work.wasteful("device-1")


def test_long_drafts_that_are_often_accepted_are_none() -> None:
    work = BackgroundWork()
    for _ in range(100):
        work.count_drafts("device-1", computed=17, committed=4)
    assert not work.wasteful("device-1")


def test_prompts_get_their_share_of_the_time_while_others_are_served() -> None:
    share, now, prompts_s = DeviceShares(), 0.0, 0.0
    while now < 100.0:
        mine_s = 0.0 if share.prompts_over("a", now) else 0.1
        now += 0.04 + mine_s
        share.note_served(["b"], now)
        share.spend("a", now, prompts_s=mine_s)
        prompts_s += mine_s
    assert 0.15 < prompts_s / now < 0.25
    assert not share.prompts_over("a", now + 10.0)


def test_a_device_that_is_alone_is_not_limited() -> None:
    share = DeviceShares()
    share.note_served(["a"], 0.0)
    share.spend("a", 0.0, masks_s=100.0, rows_s=100.0)
    assert not share.masks_over("a", 0.1)
    assert share.most_forced("a", 1000, 0.1) == MAX_FORCED
    share.spend("a", 0.1, prompts_s=100.0)
    assert not share.prompts_over("a", 0.1)


def test_masks_of_a_device_get_their_share_of_the_time_while_others_are_served() -> None:
    share, now, masks = DeviceShares(), 0.0, 0.0
    while now < 100.0:
        devices = ["b"] if share.masks_over("a", now) else ["a", "b"]
        step_s = 0.04 + (0.2 if "a" in devices else 0.0)
        now += step_s
        share.note_served(devices, now)
        if "a" in devices:
            share.spend("a", now, masks_s=0.2)
            masks += 0.2
    assert 0.15 < masks / now < 0.25
    assert not share.masks_over("b", now)


def test_small_masks_never_reach_it() -> None:
    share, now = DeviceShares(), 0.0
    for _ in range(10_000):
        now += 0.04
        share.note_served(["a", "b"], now)
        share.spend("a", now, masks_s=0.002)
        assert not share.masks_over("a", now)


def test_few_forced_tokens_are_guessed_beside_others() -> None:
    share = DeviceShares()
    share.note_served(["a", "b"], 0.0)
    first = share.most_forced("a", 0, 0.1)
    assert 0 < first < MAX_FORCED
    assert share.most_forced("a", first, 0.1) == 0
    assert share.most_forced("a", first, 10.0) == MAX_FORCED


def test_rows_of_forced_tokens_get_their_share_of_the_time_while_others_are_served() -> None:
    share, now, rows_s = DeviceShares(), 0.0, 0.0
    while now < 100.0:
        forced = share.most_forced("a", 0, now)
        now += 0.03 + 0.004 * forced
        share.note_served(["a", "b"], now)
        share.spend("a", now, rows_s=0.004 * forced)
        rows_s += 0.004 * forced
        assert not share.masks_over("a", now), "its other tokens do not wait"
    assert 0.15 < rows_s / now < 0.25


def test_what_is_known_of_devices_is_forgotten_with_what_they_used() -> None:
    share = DeviceShares()
    for number in range(1000):
        share.note_served([f"device-{number}"], float(number))
        share.spend(f"device-{number}", float(number), masks_s=0.01)
    assert len(share._masks._budgets) < 10
    assert len(share._latest) < 10


DEVICES = 32
PROMPT = 24
ROOM_FOR = 10


def test_a_turn_lasts_until_as_much_is_verified_as_was_computed_to_come_in() -> None:
    turns = MemoryTurns()
    assert not turns.lasts(1, now=0.0)
    turns.count(1, prefilled=20, verified=0, at=0.0)
    turns.count(1, prefilled=0, verified=19, at=1.0)
    assert turns.lasts(1, now=1.0)
    turns.count(1, prefilled=0, verified=3, at=1.0)
    assert (turns.lasts(1, now=1.0), turns.balance(1)) == (False, -2)
    turns.end(1)
    turns.count(1, prefilled=5, verified=0, at=1.0)
    assert (turns.lasts(1, now=1.0), turns.balance(1)) == (True, 5)


def test_who_is_absent_for_long_keeps_no_place() -> None:
    turns = MemoryTurns()
    turns.count(1, prefilled=20, verified=0, at=5.0)
    assert turns.lasts(1, now=6.0)
    assert not turns.lasts(1, now=10.0)


@pytest.mark.parametrize("pacing", [FixedPacing(32, edge_only=True), FixedPacing(3)], ids=["written", "drafted"])
def test_busy_sessions_that_do_not_all_fit_take_turns(pacing: Pacing, monkeypatch: pytest.MonkeyPatch) -> None:
    # Holding a step needs a running clock; and where further tokens cost no time, the edge speculates many.
    settings = {"prefix_sharing": "off", "step_tokens": 256, "gather_share": 0.0}
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
    # At least each prompt, each token and each rejected draft once; without fairness it is ten times that.
    assert computed < 3 * (DEVICES * PROMPT + written)

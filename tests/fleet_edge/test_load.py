"""An edge under growing load: devices draft less, then all get fewer tokens per second, then new ones wait.

Steps take the time that a script says, on a clock that does not move otherwise.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_edge.batching.step_cost import StepCost, StepParts
from fleet_edge.verifiers.contract import Item, Logits
from schemas.fields import EdgeLoad
from schemas.messages import Opened, Verdict
from schemas.policy import Mode
from tests.support.memory_fleet import Device, MemoryFleet, terms

STEP_S = 0.02
TOKEN_S = 0.004
LENGTH = 150


def loaded(
    monkeypatch: pytest.MonkeyPatch, devices: int, pacing: Callable[[], Pacing], **settings: object
) -> tuple[MemoryFleet, list[Device]]:
    fleet = MemoryFleet(settings={"gather_share": 0.0, "prefix_sharing": "off", "step_tokens": 4096, **settings})
    score = fleet.verifier.score

    def timed(items: Sequence[Item]) -> Logits:
        fleet.clock.seconds += STEP_S + TOKEN_S * sum(len(item.tokens) for item in items)
        return score(items)

    monkeypatch.setattr(fleet.verifier, "score", timed)
    asked = [terms(50 + number, mode=Mode.COUPLED, max_new_tokens=LENGTH) for number in range(devices)]
    return fleet, [
        Device(fleet, f"device-{number}", each, length=0, ahead=False, pacing=pacing())
        for number, each in enumerate(asked)
    ]


def serve(fleet: MemoryFleet, devices: Sequence[Device], *, steps: int = 10_000) -> None:
    """Let all devices do what they can between two steps, until they are done."""
    for _ in range(steps):
        if all(device.done for device in devices):
            return
        fleet.broker.pump()
        for device in devices:
            device.act()
        fleet.broker.pump()
        fleet.step()


def sent(
    fleet: MemoryFleet, devices: Sequence[Device], kind: type[Verdict | Opened], *, at_once: bool = True
) -> list[Any]:
    """Serve the devices, at once or one more per step; return what the edge has sent them of a kind."""
    seen: list[Any] = []
    for number in range(400):
        if all(device.done for device in devices):
            break
        fleet.broker.pump()
        seen += [each for device in devices for each in device.messages if isinstance(each, kind)]
        for device in devices if at_once else devices[: 1 + number]:
            device.act()
        fleet.broker.pump()
        fleet.step()
    return seen


def test_an_edge_that_has_much_to_do_makes_devices_draft_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer step makes each device draft more, unless it knows the cost to others."""
    drafted, took = {}, {}
    for count, knows in ((1, True), (12, True), (12, False)):
        if not knows:
            monkeypatch.setattr(EdgeLoad, "differs", lambda _now, _told: False)
            monkeypatch.setattr(StepCost, "parts", lambda _cost, _texts: StepParts())
        fleet, devices = loaded(monkeypatch, count, lambda: AdaptivePacing(ahead=False))
        begun = fleet.clock.seconds
        serve(fleet, devices)
        counters = [device.session.counters for device in devices]
        drafted[count, knows] = sum(each.drafted for each in counters) / sum(each.rounds for each in counters)
        took[count, knows] = fleet.clock.seconds - begun
    assert drafted[12, False] > drafted[1, True]
    assert drafted[12, True] < 0.6 * drafted[1, True]
    assert took[12, True] < 0.9 * took[12, False]  # for the same requests


def test_a_verdict_says_what_the_edge_does_where_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, devices = loaded(monkeypatch, 6, lambda: AdaptivePacing(ahead=False))
    verdicts: list[Verdict] = sent(fleet, devices, Verdict, at_once=False)
    loads = [verdict.load for verdict in verdicts if verdict.load is not None]
    assert max(load.requests for load in loads) == 6
    by_device = [
        [each.load for each in verdicts if each.load and each.handle == handle]
        for handle in {each.handle for each in verdicts}
    ]
    assert all(now.differs(told) for told_to_one in by_device for told, now in pairwise(told_to_one))
    assert len(loads) < 0.6 * len(verdicts)  # although requests come and go, one with each step
    known = [load for load in loads if load.requests >= 4 and load.writing_ms is not None and load.token_ms is not None]
    # A step takes 20 ms and 4 ms per token: edge-only decoding of all requests.
    assert known[-1].writing_ms == pytest.approx(1e3 * (STEP_S + TOKEN_S * known[-1].requests), rel=0.15)
    assert known[-1].token_ms == pytest.approx(1e3 * TOKEN_S, rel=0.3)


def test_devices_are_told_what_a_token_costs_and_how_good_their_draft_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, devices = loaded(monkeypatch, 2, lambda: AdaptivePacing(ahead=False))
    granted: list[Opened] = sent(fleet, devices, Opened)
    assert granted[0].load == EdgeLoad(requests=1)
    asked = [terms(90 + place, mode=Mode.COUPLED, max_new_tokens=LENGTH) for place in range(2)]
    later = [Device(fleet, f"device-{place}", each, length=4, ahead=False) for place, each in enumerate(asked)]
    last = sent(fleet, later, Opened)[-1].load
    assert last.token_ms == pytest.approx(TOKEN_S * 1e3, rel=0.3)
    counted = [session.counters for session in fleet.known.values()]
    share = sum(each.accepted for each in counted) / sum(each.tested for each in counted)
    assert last.acceptance == pytest.approx(share, abs=0.2)


def test_where_all_cannot_be_in_a_step_they_are_written_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, devices = loaded(
        monkeypatch, 9, lambda: FixedPacing(64, edge_only=True), step_tokens=4, max_new_tokens=LENGTH
    )
    serve(fleet, devices, steps=8)  # all are open, and their prompts computed
    for _ in range(60):
        fleet.broker.pump()
        for device in devices:
            device.act()
        fleet.step()
        open_ = [session for session in fleet.edge.sessions if not session.finished]
        if len(open_) == len(devices):
            written = [session.committed for session in open_]
            assert max(written) - min(written) <= 2
    assert sum(session.committed for session in fleet.known.values()) > 100

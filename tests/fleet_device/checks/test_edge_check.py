from collections.abc import Callable
from typing import Any

import pytest

from fleet_common.checks import Check, CheckStatus
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.checks.edge_check import EdgeCheck
from sampling.distribution import Dist, point_mass
from sampling.verification import Judgement, judge
from schemas.control import Presence
from schemas.names import VERSION
from tests.support.memory_device import announce_edge
from tests.support.memory_fleet import EDGE, FLEET, TARGET, MemoryFleet
from tests.support.memory_link import MemoryLink

PROBE = "probe-edge-1"


def check(
    fleet: MemoryFleet, *, edge: str = EDGE, on_check: Callable[[Check], None] = lambda _check: None
) -> list[Check]:
    return EdgeCheck(
        FLEET,
        edge,
        PROBE,
        BrokerSettings(),
        TARGET.words,
        on_check,
        lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
    ).run()


def faults(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.sentence for check in checks if check.status is not CheckStatus.OK}


def replace_judgement(monkeypatch: pytest.MonkeyPatch, judged: Callable[..., Judgement]) -> None:
    monkeypatch.setattr("fleet_edge.batching.judging.judge", judged)


def test_an_edge_that_verifies_passes_and_is_left_as_it_was(fleet: MemoryFleet) -> None:
    seen = list[Check]()
    announce_edge(fleet, software=VERSION)
    checks = check(fleet, on_check=seen.append)
    assert [each.name for each in checks] == ["broker", "edge", "rejection", "acceptance"]
    assert not faults(checks)
    assert seen == checks
    assert len(fleet.edge.sessions) == 0
    assert fleet.broker.retained(f"dssd/v1/{FLEET}/{PROBE}/state") is None
    assert not [each for each in fleet.sink if getattr(each, "device", None) == PROBE], "it is no device, and no usage"


def test_an_edge_that_accepts_nonsense_is_found(fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def credulous(at: Callable[[int], Dist], tokens: tuple[int, ...], *rest: Any, **given: Any) -> Judgement:
        return judge(lambda row: point_mass(tokens[row]) if row < len(tokens) else at(row), tokens, *rest, **given)

    replace_judgement(monkeypatch, credulous)
    announce_edge(fleet, software=VERSION)
    found = faults(check(fleet))
    assert "nonsense" in found["rejection"]
    assert "Skipped" in found["acceptance"]


def test_an_edge_that_rejects_what_it_said_itself_is_found(fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = list[int]()

    def fickle(at: Callable[[int], Dist], tokens: tuple[int, ...], *rest: Any, **given: Any) -> Judgement:
        if given["base"] == 0:
            sessions.append(len(sessions))
        turned = 3 if len(sessions) > 1 else 0  # another target from the second request on
        return judge(lambda row: Dist((at(row).ids + turned) % TARGET.size, at(row).probs), tokens, *rest, **given)

    replace_judgement(monkeypatch, fickle)
    announce_edge(fleet, software=VERSION)
    found = faults(check(fleet))
    assert list(found) == ["acceptance"]
    assert "greedy" in found["acceptance"]


@pytest.mark.parametrize(
    ("presence", "software", "words"),
    [
        (None, VERSION, "No message came from edge 'edge-1'"),
        (Presence.OFFLINE, VERSION, "is offline"),
        (Presence.DRAINING, VERSION, "is draining"),
        (Presence.ONLINE, "0.0.9", "runs software 0.0.9"),
    ],
)
def test_a_missing_or_wrong_edge(fleet: MemoryFleet, presence: Presence | None, software: str, words: str) -> None:
    if presence is not None:
        announce_edge(fleet, presence, software=software)
    found = faults(check(fleet))
    assert words in found["edge"]
    assert "Skipped" in found["rejection"]


def test_without_a_broker_the_rest_is_not_tried(fleet: MemoryFleet) -> None:
    fleet.broker.up = False
    found = faults(check(fleet))
    assert list(found) == ["broker", "edge", "rejection", "acceptance"]
    assert found["edge"] == "Skipped, because broker failed."


def test_sessions_at_another_edge_prove_nothing(fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    announce_edge(fleet, software=VERSION)
    monkeypatch.setattr("fleet_device.checks.edge_check.EdgePresences.wait_online", lambda *_, **__: True)
    monkeypatch.setattr(
        "fleet_device.checks.edge_check.EdgeCheck._edge", lambda self: f"{self.edge} is taken on trust."
    )
    found = faults(check(fleet, edge="edge-2"))
    assert "took" in found["rejection"]

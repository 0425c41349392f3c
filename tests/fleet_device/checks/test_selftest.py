import pytest

from fleet_device.api.listening import listen
from fleet_device.checks.edge_check import Check
from fleet_device.checks.selftest import SelfTest
from fleet_device.drafters.contract import DrafterError
from schemas.control import DeviceState, Presence, decode_json
from tests.support.memory_device import TalkingDrafter, announce_edge, settings
from tests.support.memory_fleet import FLEET, MemoryFleet
from tests.support.memory_link import MemoryLink

STATE = f"dssd/v1/{FLEET}/device-1/state"
NAMES = ["configuration", "model", "broker", "edge", "generation"]


def selftest(fleet: MemoryFleet, drafter: TalkingDrafter | None = None, **given: object) -> SelfTest:
    return SelfTest(
        settings(**given),
        load=lambda _settings: drafter or TalkingDrafter(),
        make_link=lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
    )


def failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def test_a_device_that_is_fit_passes_every_check_and_leaves_nothing_behind(fleet: MemoryFleet) -> None:
    drafter = TalkingDrafter()
    announce_edge(fleet)
    seen: list[Check] = []
    test = selftest(fleet, drafter)
    test.on_check = seen.append
    report = test.run()
    assert [check.name for check in report.checks] == NAMES
    assert report.ok, report.checks
    assert tuple(seen) == report.checks
    assert report.tokens_per_s is not None
    assert report.acceptance is not None
    assert "software 9.9" in report.checks[3].sentence
    body = report.json()
    assert set(body) == {"ok", "software", "device", "checks", "acceptance", "tokens_per_s"}
    assert set(body["checks"][0]) == {"name", "ok", "ms", "sentence", "status"}
    assert len(fleet.edge.sessions) == 0
    kept = fleet.broker.retained(STATE)
    assert kept is not None
    assert decode_json(DeviceState, kept).presence is Presence.OFFLINE
    assert drafter.closed


def test_a_model_that_does_not_load_is_told_in_its_own_words(fleet: MemoryFleet) -> None:
    def fail(_settings: object) -> TalkingDrafter:
        raise DrafterError("It is not a GGUF file.")

    test = selftest(fleet)
    test.load = fail
    report = test.run()
    assert failed(report.checks) == NAMES[1:]
    assert report.checks[1].sentence == "It is not a GGUF file."
    assert report.checks[2].sentence == "Skipped, because model failed."
    assert not report.ok


def test_without_a_broker_the_rest_is_not_tried(fleet: MemoryFleet) -> None:
    drafter = TalkingDrafter()
    fleet.broker.up = False
    report = selftest(fleet, drafter).run()
    assert failed(report.checks) == NAMES[2:]
    assert "broker" in report.checks[2].sentence
    assert report.tokens_per_s is None
    assert drafter.closed


@pytest.mark.parametrize(("presence", "words"), [(None, "none has sent a message"), (Presence.DRAINING, "is draining")])
def test_without_a_free_edge_nothing_is_written(fleet: MemoryFleet, presence: Presence | None, words: str) -> None:
    if presence is not None:
        announce_edge(fleet, presence)
    report = selftest(fleet).run()
    assert failed(report.checks) == NAMES[3:]
    assert words in report.checks[3].sentence


def test_an_edge_that_refuses_fails_the_generation(fleet: MemoryFleet) -> None:
    announce_edge(fleet)
    report = selftest(fleet, TalkingDrafter(words=[f"other{token}" for token in range(6)])).run()
    assert failed(report.checks) == ["generation"]
    assert "vocabulary" in report.checks[4].sentence


def test_a_device_that_runs_already_is_not_thrown_off_the_broker(fleet: MemoryFleet) -> None:
    with listen() as taken:
        report = selftest(fleet, api_listen=f"127.0.0.1:{taken.getsockname()[1]}").run()
    assert failed(report.checks) == ["configuration", "broker", "edge", "generation"]
    assert "maybe" in report.checks[0].sentence
    assert fleet.broker.retained(STATE) is None

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet_admin.settings import AdminSettings
from fleet_admin.steering import Actor, DeviceSettingsView, Selection, SettingState, Steering, SteeringError
from fleet_common.identity.certificates import IdentityRole
from fleet_common.mqtt.link import publish_confirmed
from fleet_edge.session_log.database import open_store
from schemas.control import DeviceState, Presence, encode_json
from schemas.topics import Topic, build
from tests.support.steered_devices import steered_devices
from tests.support.tls_fleet import FLEET, TlsFleet, tls_fleet
from tests.support.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.broker]

ALICE = Actor("alice", "desk")
ALL = Selection(everything=True)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[TlsFleet]:
    with tls_fleet(tmp_path, edges=("edge-1",)) as running:
        yield running


def database(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    open_store(url).close()
    return url


def identity(fleet: TlsFleet) -> AdminSettings:
    return AdminSettings(fleet=FLEET, broker=fleet.settings(fleet.enrol("monitor", IdentityRole.MONITOR)))


def monitor(fleet: TlsFleet, url: str) -> Steering:
    return Steering.open(identity(fleet), url)


def reported(steering: Steering, devices: int) -> None:
    until(lambda: sum(each.reports for each in steering.wanted_and_reported()) >= devices)


def states(results: Iterator[DeviceSettingsView]) -> dict[str, SettingState]:
    return {each.device: each.state for each in results}


def test_a_device_that_is_away_takes_what_was_wanted_when_it_is_back(fleet: TlsFleet, tmp_path: Path) -> None:
    url, settings = database(tmp_path), identity(fleet)
    brokers = {"gw-1": fleet.settings(fleet.enrol("gw-1"))}
    with (
        steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path),
        Steering.open(settings, url) as steering,
    ):
        reported(steering, 1)
    with Steering.open(settings, url) as steering:
        assert states(steering.set({"top_k": 7}, ALL, actor=ALICE)) == {"gw-1": SettingState.WAITING}
        [answer] = steering.command("self-test", ALL, actor=ALICE)
        assert (answer.outcome, answer.id) == ("offline", "")
        with steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path) as [gateway]:
            until(lambda: gateway.service.settings.top_k == 7)
            until(lambda: steering.wanted_and_reported()[0].state is SettingState.IN_FORCE)


def test_a_bad_report_concerns_the_device_that_sent_it_alone(fleet: TlsFleet, tmp_path: Path) -> None:
    url = database(tmp_path)
    brokers = {"gw-1": fleet.settings(fleet.enrol("gw-1"))}
    state = DeviceState(
        presence=Presence.ONLINE, software="1", draft_model="toy", quantization="none", since=datetime.now(UTC)
    )
    hostile = fleet.link(fleet.enrol("gw-2"), "gw-2")
    hostile.start(timeout_s=PATIENCE_S)
    reports = [
        {"id": "f" * 32, "values": {}, "at": "0001-01-01T00:00:00+23:59"},
        {
            "id": "f" * 32,
            "applied": "0" * 32,
            "values": {},
            "refused": {f"k{number}": "x" * 500 for number in range(60)},
        },
    ]
    with (
        steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path),
        monitor(fleet, url) as steering,
    ):
        for number, report in enumerate(reports, 1):
            for topic, payload in (
                (Topic.STATE, encode_json(state)),
                (Topic.CONFIG_REPORTED, json.dumps(report).encode()),
            ):
                publish_confirmed(
                    hostile, build(topic, fleet=FLEET, device="gw-2"), payload, timeout_s=PATIENCE_S, retain=True
                )
            reported(steering, 2)
            steering.set({"top_k": number}, ALL, actor=ALICE, wait_s=0.0)
            expected = {"gw-1": SettingState.IN_FORCE, "gw-2": SettingState.SILENT}
            until(lambda: {each.device: each.state for each in steering.wanted_and_reported()} == expected)  # noqa: B023


def test_changes_in_quick_succession_add_up(fleet: TlsFleet, tmp_path: Path) -> None:
    url = database(tmp_path)
    brokers = {"gw-1": fleet.settings(fleet.enrol("gw-1"))}
    with (
        steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path) as [gateway],
        monitor(fleet, url) as steering,
    ):
        reported(steering, 1)
        changes = [steering.set({name: 5}, ALL, actor=ALICE) for name in ("top_k", "draft_length", "max_new_tokens")]
        assert [states(each)["gw-1"] for each in changes] == [SettingState.IN_FORCE] * 3
        settings = gateway.service.settings
        assert (settings.top_k, settings.draft_length, settings.max_new_tokens) == (5, 5, 5)


def test_a_device_cannot_be_a_monitor(fleet: TlsFleet, tmp_path: Path) -> None:
    url = database(tmp_path)
    broker = fleet.settings(fleet.enrol("gw-7"))
    steering = Steering.open(AdminSettings(fleet=FLEET, name="gw-7", broker=broker), url)
    with pytest.raises(SteeringError, match="gw-7"):
        steering.start()

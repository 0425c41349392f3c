import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_admin.settings import AdminSettings
from fleet_admin.steering import Actor, Selection, SetResult, SettingState, Steering, SteeringError
from fleet_common.identity.certificates import IdentityRole
from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import publish_confirmed
from fleet_common.mqtt.settings import BrokerSettings
from fleet_edge.store.database import open_store
from fleet_edge.store.records import DeviceSeen
from schemas.control import (
    MAX_VERSION,
    CommandOutcome,
    CommandRequest,
    CommandResponse,
    DesiredSettings,
    DeviceState,
    Presence,
    ReportedSettings,
    encode_json,
)
from schemas.topics import Topic, build
from tests.support.brokers import StartBroker
from tests.support.steered_devices import steered_devices
from tests.support.tls_fleet import FLEET, TlsFleet, tls_fleet
from tests.support.waiting import until

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
    until(lambda: sum(each.reported_version is not None for each in steering.wanted_and_reported()) >= devices)


def states(results: Iterator[SetResult]) -> dict[str, SettingState]:
    return {each.device: each.state for each in results}


def test_a_fleet_is_set_and_commanded_and_all_of_it_is_recorded(fleet: TlsFleet, tmp_path: Path) -> None:
    url, names = database(tmp_path), ["gw-1", "gw-2", "gw-3"]
    brokers = {name: fleet.settings(fleet.enrol(name)) for name in names}
    with (
        steered_devices(names, fleet=FLEET, brokers=brokers, folder=tmp_path) as gateways,
        monitor(fleet, url) as steering,
    ):
        reported(steering, 3)
        steering.log.label(["gw-1", "gw-2"], add=["hall"], actor=ALICE)
        in_hall = Selection(labels=("hall",))
        assert states(steering.set({"top_k": 7}, in_hall, actor=ALICE)) == dict.fromkeys(
            ("gw-1", "gw-2"), SettingState.IN_FORCE
        )
        assert [each.service.settings.top_k for each in gateways] == [7, 7, 50]
        [refused] = steering.set({"model": "never:Q4_0"}, Selection(devices=("gw-1",)), actor=ALICE)
        assert refused.state is SettingState.REFUSED
        assert "never" in refused.sentence
        assert gateways[0].service.settings.top_k == 7
        answers = {each.device: each for each in steering.command("log-tail", ALL, actor=ALICE)}
        assert {device: each.outcome for device, each in answers.items()} == dict.fromkeys(names, "ok")
        found = {each.device: each for each in steering.wanted_and_reported()}
        assert found["gw-1"].state is SettingState.REFUSED
        assert (found["gw-2"].wanted, found["gw-3"].state) == ({"top_k": 7}, SettingState.NONE)
        done = [(each.who, each.action, each.subject, each.outcome.partition(":")[0]) for each in steering.log.audit()]
        assert ("alice", "set", "gw-2", "in force") in done
        assert ("alice", "set", "gw-1", "refused") in done
        assert ("alice", "command log-tail", "gw-3", "ok") in done
        assert steering.log.reported()["gw-2"].values["top_k"] == 7
        assert {each.outcome for each in steering.log.commands()} == {"ok"}
        assert states(steering.set({}, ALL, actor=ALICE, unset=["top_k"])) == dict.fromkeys(
            names, SettingState.IN_FORCE
        )
        assert [each.service.settings.top_k for each in gateways] == [50, 50, 50]


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


def test_nobody_but_a_monitor_sets_or_commands_a_device_or_speaks_for_it(fleet: TlsFleet, tmp_path: Path) -> None:
    """Every forbidden message is sent with the identities that must not send it."""
    url = database(tmp_path)
    brokers = {"gw-1": fleet.settings(fleet.enrol("gw-1"))}
    deadline = datetime.now(UTC) + timedelta(seconds=60)
    desired = encode_json(DesiredSettings(version=50, values={"top_k": 3}))
    command = encode_json(CommandRequest(id="0" * 16, command="drain", deadline=deadline))
    report = encode_json(ReportedSettings(version=90, applied=90, values={"top_k": 3}))
    response = encode_json(CommandResponse(id="0" * 16, outcome=CommandOutcome.OK, sentence="Done."))
    with (
        steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path) as [gateway],
        monitor(fleet, url) as steering,
    ):
        reported(steering, 1)
        for name, role in (("gw-2", IdentityRole.DEVICE), ("edge-1", IdentityRole.EDGE)):
            link = fleet.link(fleet.enrol(name, role), name, port=fleet.broker.edge_port if name == "edge-1" else None)
            link.start(timeout_s=10.0)
            for topic, payload in (
                (Topic.CONFIG_DESIRED, desired),
                (Topic.COMMAND_REQUEST, command),
                (Topic.CONFIG_REPORTED, report),
                (Topic.COMMAND_RESPONSE, response),
            ):
                with pytest.raises(PublishRejected):
                    publish_confirmed(
                        link, build(topic, fleet=FLEET, device="gw-1"), payload, timeout_s=10.0, retain=True
                    )
            link.stop()
        assert states(steering.set({"top_p": 0.5}, ALL, actor=ALICE)) == {"gw-1": SettingState.IN_FORCE}
        [view] = [each for each in steering.wanted_and_reported() if each.device == "gw-1"]
        assert (view.reported_version, gateway.service.settings.top_k) == (1, 50)
        assert gateway.health()["status"] != "draining"


def test_a_bad_report_concerns_the_device_that_sent_it_alone(fleet: TlsFleet, tmp_path: Path) -> None:
    url = database(tmp_path)
    brokers = {"gw-1": fleet.settings(fleet.enrol("gw-1"))}
    state = DeviceState(
        presence=Presence.ONLINE, software="1", draft_model="toy", quantization="none", since=datetime.now(UTC)
    )
    hostile = fleet.link(fleet.enrol("gw-2"), "gw-2")
    hostile.start(timeout_s=10.0)
    reports = [
        {"version": MAX_VERSION, "applied": 0, "values": {}, "at": "0001-01-01T00:00:00+23:59"},
        {
            "version": MAX_VERSION,
            "applied": 0,
            "values": {},
            "refused": {f"k{number}": "x" * 500 for number in range(60)},
        },
    ]
    with (
        steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path),
        monitor(fleet, url) as steering,
    ):
        for version, report in enumerate(reports, 1):
            for topic, payload in (
                (Topic.STATE, encode_json(state)),
                (Topic.CONFIG_REPORTED, json.dumps(report).encode()),
            ):
                publish_confirmed(
                    hostile, build(topic, fleet=FLEET, device="gw-2"), payload, timeout_s=10.0, retain=True
                )
            reported(steering, 2)
            results = {each.device: each for each in steering.set({"top_k": version}, ALL, actor=ALICE, wait_s=2.0)}
            assert {device: (each.version, each.state) for device, each in results.items()} == {
                "gw-1": (version, SettingState.IN_FORCE),
                "gw-2": (version, SettingState.AHEAD),
            }
        assert {each.device: each.state for each in steering.wanted_and_reported()}["gw-2"] is SettingState.AHEAD
        assert steering.log.reported()["gw-2"].version == MAX_VERSION


def test_a_device_that_was_retired_and_restored_is_set_again(fleet: TlsFleet, tmp_path: Path) -> None:
    """Its versions start again, because its state was deleted."""
    url = database(tmp_path)
    with open_store(url) as store:
        store.apply(
            [
                DeviceSeen(
                    device="gw-1",
                    at=datetime.now(UTC),
                    presence="online",
                    software="1",
                    draft_model="toy",
                    quantization="none",
                )
            ]
        )
    brokers = {"gw-1": fleet.settings(fleet.enrol("gw-1"))}
    with (
        steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path) as [gateway],
        monitor(fleet, url) as steering,
    ):
        reported(steering, 1)
        for _ in range(2):
            assert states(steering.set({"top_k": 7}, ALL, actor=ALICE)) == {"gw-1": SettingState.IN_FORCE}
        steering.retire("gw-1", actor=ALICE)
        steering.retire("gw-1", undo=True, actor=ALICE)
        [result] = steering.set({"top_k": 9}, ALL, actor=ALICE)
        assert (result.version, result.state, gateway.service.settings.top_k) == (1, SettingState.IN_FORCE, 9)


def test_a_device_cannot_be_a_monitor(fleet: TlsFleet, tmp_path: Path) -> None:
    url = database(tmp_path)
    broker = fleet.settings(fleet.enrol("gw-7"))
    steering = Steering.open(AdminSettings(fleet=FLEET, name="gw-7", broker=broker), url)
    with pytest.raises(SteeringError, match="gw-7"):
        steering.start()


def test_what_was_set_holds_after_a_restart_without_a_broker(start_mosquitto: StartBroker, tmp_path: Path) -> None:
    url = database(tmp_path)
    process: MosquittoProcess = start_mosquitto(Broker(fleet=FLEET))
    place = BrokerSettings(port=process.port)
    brokers = {"gw-1": place}
    settings = AdminSettings(fleet=FLEET, broker=place)
    with (
        steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path),
        Steering.open(settings, url) as steering,
    ):
        reported(steering, 1)
        assert states(steering.set({"top_k": 7}, ALL, actor=ALICE)) == {"gw-1": SettingState.IN_FORCE}
    process.close()
    with steered_devices(["gw-1"], fleet=FLEET, brokers=brokers, folder=tmp_path) as [gateway]:
        assert gateway.service.settings.top_k == 7
        # The broker has lost its state: the device reports its settings, and the next change has a later version.
        again: MosquittoProcess = start_mosquitto(Broker(fleet=FLEET, port=process.port))
        assert again.port == process.port
        with Steering.open(settings, url) as steering:
            until(lambda: steering.known()["gw-1"].presence is Presence.ONLINE)
            [result] = steering.set({"top_k": 8}, Selection(devices=("gw-1",)), actor=ALICE)
            assert (result.version, result.state) == (2, SettingState.IN_FORCE)
        assert gateway.service.settings.top_k == 8

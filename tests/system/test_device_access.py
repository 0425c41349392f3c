"""Disconnect, suspend and revoke a device through the session log, on a real broker whose log shows the effect."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleet_admin.settings import AdminSettings
from fleet_admin.steering import Actor, CommandResult, Steering, SteeringLog
from fleet_admin.steering.access import access_facts, carry_out, request_access
from fleet_admin.steering.clients import CONNECTED, GONE, LOG_TOPIC, BrokerClients
from fleet_common.identity.certificates import AccessAction, IdentityRole
from fleet_common.identity.index import CertificateState, standing
from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.link import Will
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import TlsSettings
from fleet_edge.session_log.database import open_store
from schemas.control import DesiredSettings
from schemas.topics import Topic, build
from tests.support.links import START_S, Inbox
from tests.support.tls_fleet import FLEET, Clock, TlsFleet, tls_fleet
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.broker

DEVICE, OTHER, EDGE = "gw-1", "gw-2", "edge-1"
ALICE = Actor("alice", "desk")


@dataclass
class Stage:
    """A fleet whose authority carries out requests, a monitor, and two connected devices."""

    fleet: TlsFleet
    log: SteeringLog
    steering: Steering
    tls: TlsSettings
    device: PahoLink
    other: PahoLink

    def request(self, action: AccessAction, device: str = DEVICE) -> CommandResult:
        [result] = request_access(self.log, action, [device], actor=ALICE, limit_s=PATIENCE_S)
        return result

    def facts(self) -> dict[str, str]:
        client = next((each for each in self.steering.clients()[0] if each.client == DEVICE), None)
        found = access_facts(
            self.log, DEVICE, client=client, absence="", quarantine=None, certificate_until=None, now=Clock()()
        )
        return {each.fact: each.state for each in found}

    def until_facts(self, **wanted: str) -> None:
        until(lambda: wanted.items() <= {name.replace(" ", "_"): state for name, state in self.facts().items()}.items())


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    open_store(url).close()
    with tls_fleet(tmp_path, edges=(EDGE,), sys_interval_s=1) as fleet:
        fleet.enrol(EDGE, IdentityRole.EDGE)
        settings = AdminSettings(fleet=FLEET, broker=fleet.settings(fleet.enrol("monitor", IdentityRole.MONITOR)))
        ended = threading.Event()

        def carry_out_requests() -> None:
            with SteeringLog(url) as log:
                while not ended.wait(0.05):
                    carry_out(log, fleet.authority, fleet.access)

        worker = threading.Thread(target=carry_out_requests)
        with SteeringLog(url) as log, Steering.open(settings, url) as steering:
            tls = fleet.enrol(DEVICE)
            will = Will(build(Topic.STATE, fleet=FLEET, device=DEVICE), b"")
            device, other = fleet.link(tls, DEVICE, will=will), fleet.link(fleet.enrol(OTHER), OTHER)
            for link in (device, other):
                link.start(timeout_s=START_S)
            worker.start()
            yield Stage(fleet, log, steering, tls, device, other)
            ended.set()
            worker.join()


def test_a_device_is_disconnected_now_and_may_come_back(stage: Stage) -> None:
    stage.until_facts(connected=CONNECTED)
    result = stage.request(AccessAction.DISCONNECT)
    assert result.ok, result.sentence
    until(lambda: stage.device.counters.losses >= 1)
    assert stage.device.counters.takeovers >= 1
    until(lambda: stage.device.connected)
    stage.until_facts(connected=CONNECTED, at_the_broker="accepted")
    assert (stage.other.counters.losses, stage.other.connected) == (0, True)


def test_a_suspended_device_is_refused_until_that_is_lifted(stage: Stage) -> None:
    stage.until_facts(connected=CONNECTED)
    result = stage.request(AccessAction.SUSPEND)
    assert result.ok, result.sentence
    until(lambda: not stage.device.connected)
    stage.until_facts(connected=GONE, at_the_broker="refused", certificate="suspended")
    stage.device.stop()
    for _ in range(3):
        with pytest.raises(ConnectFailed):
            stage.fleet.link(stage.tls, DEVICE).start(timeout_s=START_S)
    assert stage.facts()["connected"] == GONE
    assert stage.request(AccessAction.UNSUSPEND).ok
    stage.fleet.link(stage.tls, DEVICE).start(timeout_s=START_S)
    stage.until_facts(connected=CONNECTED, at_the_broker="accepted", certificate="unknown")
    assert (stage.other.counters.losses, stage.other.connected) == (0, True)


def test_a_revocation_is_shown_as_a_fact(stage: Stage) -> None:
    assert stage.request(AccessAction.REVOKE).ok
    until(lambda: not stage.device.connected)
    stage.until_facts(connected=GONE, at_the_broker="refused", certificate="revoked")
    assert not stage.request(AccessAction.UNSUSPEND).ok
    facts = stage.facts()
    assert (facts["latest request: unsuspend"], facts["certificate"]) == ("failed", "revoked")


def test_a_request_that_the_broker_does_not_follow_is_no_success(stage: Stage) -> None:
    stage.fleet.access = stage.fleet.access.model_copy(update={"pid_file": None})
    result = stage.request(AccessAction.SUSPEND)
    assert result.outcome == "failed"
    until(lambda: stage.device.connected)
    assert stage.facts()["at the broker"] == "accepted"
    assert stage.facts()["latest request: suspend"] == "failed"


@pytest.mark.parametrize("name", [EDGE, "monitor", "nobody"])
def test_only_devices_can_be_requested(stage: Stage, name: str) -> None:
    result = stage.request(AccessAction.REVOKE, name)
    assert result.outcome == "failed"
    entries = standing(stage.fleet.authority.entries(), now=Clock()())
    assert CertificateState.REVOKED not in {each.state for each in entries}


def test_the_list_of_clients_is_complete_by_the_brokers_own_number(stage: Stage) -> None:
    def seen() -> tuple[set[str], int | None]:
        found, number = stage.steering.clients()
        return {each.client for each in found if each.state == CONNECTED}, number

    until(lambda: seen() == ({DEVICE, OTHER, "monitor"}, 3))
    read = BrokerClients()
    for line in stage.fleet.broker.log().splitlines():
        read.read_line(line)
    assert {each.client for each in read.named().values() if each.state == CONNECTED} == {DEVICE, OTHER, "monitor"}


def test_a_device_reads_nothing_of_the_brokers_log(stage: Stage) -> None:
    inbox = Inbox()
    for topic in (LOG_TOPIC, "$SYS/#"):
        stage.other.subscribe(topic, inbox)
    assert stage.request(AccessAction.DISCONNECT).ok
    until(lambda: stage.device.counters.losses >= 1)
    stage.until_facts(connected=CONNECTED)
    stage.other.subscribe(build(Topic.CONFIG_DESIRED, fleet=FLEET, device=OTHER), inbox)
    stage.steering._wire.want(OTHER, DesiredSettings(id="0" * 16, values={}))
    until(lambda: bool(list(inbox)))
    assert [each.topic for each in inbox if each.topic.startswith("$SYS")] == []

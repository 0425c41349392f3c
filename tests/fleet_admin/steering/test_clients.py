from datetime import UTC, datetime

import pytest

from fleet_admin.steering.clients import CONNECTED, GONE, LOG_TOPIC, NUMBER_TOPIC, BrokerClients
from fleet_admin.steering.wire import SteeringWire
from schemas.control import DeviceState, Presence, encode_json
from schemas.topics import Topic, build
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink

FLEET = "home"
NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
CAME = "2026-03-04T12:00:00: New client connected from 10.0.0.7:50123 as gw-1 (p5, c1, k10, u'gw-1')."


def read(*lines: str) -> BrokerClients:
    clients = BrokerClients()
    for line in lines:
        clients.read_line(line, now=NOW)
    return clients


def test_a_client_is_connected_from_its_line_on() -> None:
    client = read(CAME).named()["gw-1"]
    assert (client.state, client.address, client.since) == (CONNECTED, "10.0.0.7", NOW)


@pytest.mark.parametrize(
    "line",
    [
        "2026-03-04T12:00:09: Client gw-1 disconnected.",
        "2026-03-04T12:00:09: Client gw-1 closed its connection.",
        "2026-03-04T12:00:09: Client gw-1 has exceeded timeout, disconnecting.",
        "2026-03-04T12:00:09: Client gw-1 disconnected due to protocol error.",
        "2026-03-04T12:00:09: Client gw-1 [10.0.0.7:50123] disconnected: session taken over.",
        "2026-03-04T12:00:09: Bad socket read/write on client gw-1: Connection reset by peer",
    ],
)
def test_a_client_is_gone_from_its_line_on(line: str) -> None:
    clients = read(CAME, line)
    assert clients.named()["gw-1"].state == GONE
    clients.read_line(CAME, now=NOW)
    assert clients.named()["gw-1"].state == CONNECTED


def test_a_takeover_leaves_the_newer_connection() -> None:
    clients = read(CAME, "2026-03-04T12:00:09: Client gw-1 already connected, closing old connection.", CAME)
    assert clients.named()["gw-1"].state == CONNECTED


@pytest.mark.parametrize(
    "line",
    ["", "x" * 10_000, "2026-03-04T12:00:09: Client <unknown> disconnected due to protocol error.", "9: Saving."],
)
def test_other_lines_name_nobody(line: str) -> None:
    assert read(line).named() == {}


def test_a_log_from_the_start_of_the_broker_is_the_whole_list() -> None:
    clients = BrokerClients()
    for line in (CAME, "2026-03-04T13:00:00: mosquitto version 2.0.21 starting", CAME.replace("gw-1", "gw-2")):
        clients.read_line(line)
    assert clients.named().keys() == {"gw-2"}
    assert clients.named()["gw-2"].since == datetime(2026, 3, 4, 12).astimezone(UTC)


@pytest.mark.parametrize(("payload", "number"), [(b"12", 12), (b"", None), (b"-1", None), (b"x", None)])
def test_the_brokers_number(payload: bytes, number: int | None) -> None:
    clients = BrokerClients()
    clients.read_number(payload)
    assert clients.number == number


def test_a_monitor_sees_retained_states_until_the_log_says_otherwise() -> None:
    broker = MemoryBroker()
    link = MemoryLink(broker, "monitor")
    wire = SteeringWire(link, fleet=FLEET, name="monitor")
    device = MemoryLink(broker, "gw-1")
    device.start(timeout_s=1.0)
    state = DeviceState(presence=Presence.ONLINE, software="1", draft_model="toy", quantization="none", since=NOW)
    device.publish(build(Topic.STATE, fleet=FLEET, device="gw-1"), encode_json(state), retain=True)
    broker.pump()
    link.start(timeout_s=1.0)
    device.publish(NUMBER_TOPIC, b"3")
    broker.pump()

    def states() -> dict[str, str]:
        return {each.client: each.state for each in wire.clients()[0]}

    assert states() == {"gw-1": CONNECTED, "monitor": CONNECTED}
    assert wire.clients()[1] == 3
    device.publish(LOG_TOPIC, b"2026-03-04T12:00:09: Client gw-1 closed its connection.")
    broker.pump()
    assert states()["gw-1"] == GONE
    broker.kill("monitor")
    broker.revive("monitor")
    broker.pump()
    assert states()["gw-1"] == CONNECTED, "nobody read the log meanwhile: what is retained counts"
    assert wire.clients()[1] is None

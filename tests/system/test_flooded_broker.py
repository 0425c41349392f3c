"""What one hostile device cannot do to an edge through the broker, on the configuration that production gets.

In a flood the edge does not read, so that the broker has to queue for it, and the flood is long enough to fill every
queue.
"""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from broker_config.broker import Broker
from fleet_common.identity.certificates import IdentityRole
from fleet_common.identity.enforcement import enforce_change
from schemas.topics import Topic, build, wildcard
from tests.support.mqtt_packets import PacketType, publish_packet
from tests.support.raw_client import RawClient
from tests.support.tls_fleet import FLEET, HOST, tls_fleet

pytestmark = pytest.mark.broker

EDGE = "edge-1"
MESSAGES = 20_000  # twice what the broker queues for a client, and then what the system's buffers hold
IN_A_WRITE = 200
ANSWERS = 100
CONNECTIONS = 6
TAKEN_OVER, ALIAS_INVALID = 0x8E, 0x94
WELCOME = {0x00, 0x10}  # success, or nobody subscribes
ON_TIME = b"of an honest device"


def draft_of(device: str) -> str:
    return build(Topic.DRAFT, fleet=FLEET, device=device, edge=EDGE)


def flood(client: RawClient, device: str, *, qos: int, messages: int) -> None:
    """Send drafts as fast as the broker takes them; return when it has processed the last one."""
    packets = publish_packet(draft_of(device), bytes(1000), qos=qos) * IN_A_WRITE
    for _ in range(messages // IN_A_WRITE):
        client.send(packets)
        for _ in range(IN_A_WRITE if qos else 0):
            client.wait_for(PacketType.PUBACK)
    client.publish(build(Topic.CLOSE, fleet=FLEET, device=device), b"")


def reaches(edge: RawClient, honest: RawClient) -> bool:
    """Return whether a draft that is repeated arrives once the edge reads its queue."""
    while True:
        honest.publish(draft_of("honest"), ON_TIME)
        for _ in range(ANSWERS):
            if edge.wait_for(PacketType.PUBLISH).publish()[2] == ON_TIME:
                return True


@pytest.mark.parametrize("qos", [(0, 1), (1, 0)], ids=["qos-0-then-1", "qos-1-then-0"])
def test_a_flood_costs_the_edge_none_of_its_acknowledgements(tmp_path: Path, qos: tuple[int, int]) -> None:
    # At QoS 1 as many as are in flight to the edge suffice: each dropped one would shrink that window for good.
    messages = {0: MESSAGES, 1: 4 * Broker.production().max_unanswered}
    with (
        tls_fleet(tmp_path) as fleet,
        RawClient(fleet.broker.edge_port, fleet.enrol(EDGE, IdentityRole.EDGE), EDGE) as edge,
        RawClient(fleet.broker.port, fleet.enrol("hostile"), "hostile") as hostile,
        RawClient(fleet.broker.port, fleet.enrol("honest"), "honest") as honest,
    ):
        verdict = build(Topic.VERDICT, fleet=FLEET, device="honest")
        honest.subscribe(verdict)
        edge.subscribe(wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE))
        for each in qos:
            flood(hostile, "hostile", qos=each, messages=messages[each])
        assert fleet.broker.await_log(f"being dropped for client {EDGE}"), "or the queues were not full"

        for _ in range(ANSWERS):
            edge.send(publish_packet(verdict, b"verdict"))
        for _ in range(ANSWERS):
            assert edge.wait_for(PacketType.PUBACK).reason == 0

        assert reaches(edge, honest)


def test_a_port_that_is_full_of_silent_connections_keeps_out_neither_an_edge_nor_a_revocation(tmp_path: Path) -> None:
    with tls_fleet(tmp_path, max_connections=CONNECTIONS) as fleet, ExitStack() as stack:
        hostile = RawClient(fleet.broker.port, fleet.enrol("hostile"), "hostile")
        stack.callback(hostile.close)
        # They need not even begin a TLS handshake; one slot is the hostile device's own.
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.create_connection((HOST, fleet.broker.port)))
        assert fleet.broker.await_log("max_connections exceeded")
        tls = fleet.enrol("honest")
        with pytest.raises(OSError, match=r"EOF|reset"):
            RawClient(fleet.broker.port, tls, "honest")

        with RawClient(fleet.broker.edge_port, fleet.enrol(EDGE, IdentityRole.EDGE), EDGE) as edge:
            assert edge.publish(build(Topic.EDGE_STATE, fleet=FLEET, edge=EDGE), b"online") in WELCOME
        assert enforce_change(fleet.authority.revoke(["hostile"]), fleet.access) is not None
        assert hostile.wait_for(PacketType.DISCONNECT).reason == TAKEN_OVER


def test_a_device_has_few_topic_aliases_and_an_edge_one_for_each_device(tmp_path: Path) -> None:
    few, many = Broker.production().max_device_aliases, Broker.production().max_aliases
    with (
        tls_fleet(tmp_path) as fleet,
        RawClient(fleet.broker.edge_port, fleet.enrol(EDGE, IdentityRole.EDGE), EDGE) as edge,
        RawClient(fleet.broker.port, fleet.enrol("hostile"), "hostile") as hostile,
    ):
        for client, alias in ((edge, many), (hostile, few)):
            client.send(publish_packet("a/topic", b"", alias=alias))
            assert client.wait_for(PacketType.PUBACK)
        hostile.send(publish_packet("a/topic", b"", alias=few + 1))
        assert hostile.wait_for(PacketType.DISCONNECT).reason == ALIAS_INVALID

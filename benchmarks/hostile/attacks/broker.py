"""Attacks on the broker, which the whole fleet shares: connections, subscriptions, wills, retained messages, queues."""

import contextlib
import json
import socket
import ssl
import time
from typing import Final

from benchmarks.hostile.attacks.contract import Attacker, Source, flood, pool
from benchmarks.hostile.mqtt_client import ConnectRefused, tls_socket
from benchmarks.hostile.payloads import open_of, random_draft, state_of
from schemas.topics import Topic, build
from tests.support.mqtt_packets import WillMessage, publish_packet

_LONGEST_WILL: Final = (1 << 16) - 1  # its length has two bytes
_PACKET_HEAD: Final = 256
_FILTERS_A_PACKET: Final = 100


def filters(attacker: Attacker, *, number: int) -> None:
    """Subscriptions that match every message of the fleet, half of them shared by groups of one; none gives a right."""
    client = attacker.client()
    everything = f"dssd/v1/{attacker.place.fleet}/#"
    own = f"dssd/v1/{attacker.place.fleet}/{client.identity.name}"
    half = number // 2
    wanted = [f"$share/group-{each}/{everything}" for each in range(half)]
    wanted += [f"{own}/down/{each}/#" for each in range(number - half)]
    left: list[str] = []
    connected = -1
    while attacker.running():
        if client.counters.connects != connected:  # a broker that has hung up has forgotten them
            connected, left = client.counters.connects, list(wanted)
        if left and client.connected and not client.full:
            client.subscribe(left[:_FILTERS_A_PACKET])
            del left[:_FILTERS_A_PACKET]
            attacker.sent += 1
        client.pump(0.01)


def wills(attacker: Attacker, *, rate: float) -> None:
    """Connections with the longest will, cut so that the broker publishes it: as an Open, and as a retained state."""
    client = attacker.client()
    place, identity = attacker.place, client.identity
    state = json.loads(state_of(attacker.rng))
    state["padding"] = ""
    state["padding"] = "x" * (_LONGEST_WILL - len(json.dumps(state).encode()))
    prompt = (1,) * ((_LONGEST_WILL - 1024) // 2)
    each = [
        WillMessage(place.topic(Topic.STATE, identity), json.dumps(state).encode(), retain=True),
        WillMessage(place.topic(Topic.OPEN, identity), open_of(place.vocabulary, prompt=prompt)),
    ]
    began, count = attacker.clock(), 0
    while attacker.running():
        wait_s = began + count / rate - attacker.clock()
        if wait_s > 0:
            time.sleep(min(wait_s, 0.05))
            continue
        count += 1
        try:
            client.connect(each[count % 2])
            client.abort()
            attacker.sent += 1
        except ConnectRefused:
            attacker.failed += 1


def slow_reader(attacker: Attacker, *, rate: float) -> None:
    """Drafts that are all answered, from a device that never reads its socket."""
    client = attacker.client()
    while attacker.running() and not client.connected:
        client.pump(0.01)
    client.reads = False
    size = attacker.place.vocabulary_size
    packets = pool(lambda: attacker.publish(client, Topic.DRAFT, random_draft(attacker.rng, vocabulary=size)))
    flood(attacker, [Source(client, packets, rate)])


def connections(attacker: Attacker, *, number: int) -> None:
    """TLS connections with one certificate, held open, each replaced when the broker ends it."""
    identity = attacker.place.identities[0]
    context = identity.tls_context()
    held: list[ssl.SSLSocket] = []
    try:
        while attacker.running():
            if len(held) < number:
                try:
                    sock = tls_socket(identity, context)
                    sock.setblocking(False)  # noqa: FBT003 - the standard library's
                    held.append(sock)
                    attacker.sent += 1
                    continue
                except OSError:
                    attacker.failed += 1
            held = [sock for sock in held if _alive(sock)]
            time.sleep(0.1)
    finally:
        attacker.answers["held"] = len(held)
        for sock in held:
            sock.close()


def retained(attacker: Attacker, *, number: int) -> None:
    """Retained messages of the greatest size, each under another name of an edge, one of them the edge's own."""
    client = attacker.client()
    place = attacker.place
    payload = bytes(place.max_packet_bytes - _PACKET_HEAD)
    names = [place.sink if place.control else place.edge, *(f"none-{each}" for each in range(number - 1))]
    began: float | None = None
    count = 0
    while attacker.running():
        if client.connected and not client.full:
            began = attacker.clock() if began is None else began
            # All at once, and then again one by one: kept messages may have been cleared.
            if count < number or attacker.clock() - began > count - number:
                topic = build(Topic.DRAFT, fleet=place.fleet, device=client.identity.name, edge=names[count % number])
                client.send(publish_packet(topic, payload, retain=True))
                count += 1
                attacker.sent += 1
        client.pump(0.005)


def _alive(sock: ssl.SSLSocket) -> bool:
    try:
        ended = not sock.recv(1)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return True
    except OSError:
        ended = True
    if ended:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
    return not ended

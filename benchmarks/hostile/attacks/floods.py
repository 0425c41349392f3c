"""Floods: messages that are no use to anybody, at rates at which handling each would take the edge's time."""

from collections.abc import Callable, Iterator
from itertools import chain, cycle

from benchmarks.hostile.attacks.contract import Attacker, Source, flood, pool
from benchmarks.hostile.mqtt_client import RawClient
from benchmarks.hostile.payloads import (
    close_of,
    huge_open,
    open_of,
    random_bytes,
    random_draft,
    state_of,
    unique,
)
from schemas.codec import MAX_OPEN_BYTES
from schemas.topics import Topic

_PACKET_HEAD = 256


def random_payloads(attacker: Attacker, *, rate: float) -> None:
    """Random bytes as draft, Open and Close in turn."""
    client = attacker.client()
    flood(attacker, [Source(client, _random_payloads(attacker, client), rate)])


def unknown_session(attacker: Attacker, *, rate: float, qos: int) -> None:
    """Well-formed drafts of sessions that were never granted."""
    client = attacker.client()
    flood(attacker, [Source(client, _unknown_session(attacker, client, qos=qos), rate)])


def opens(attacker: Attacker, *, rate: float) -> None:
    """Opens, each of a new session."""
    client = attacker.client()
    flood(attacker, [Source(client, _opens(attacker, client), rate)])


def closes(attacker: Attacker, *, rate: float) -> None:
    """Closes, each of another session that never was."""
    client = attacker.client()
    flood(attacker, [Source(client, _closes(attacker, client), rate)])


def own_state(attacker: Attacker, *, rate: float) -> None:
    """The device's own retained state, each time another one."""
    client = attacker.client()
    flood(attacker, [Source(client, _states(attacker, client), rate)])


def huge_opens(attacker: Attacker, *, rate: float) -> None:
    """Well-formed Opens of the greatest size."""
    client = attacker.client()
    most = min(MAX_OPEN_BYTES, attacker.place.max_packet_bytes - _PACKET_HEAD)
    payloads = unique(huge_open(attacker.place.vocabulary, most=most))
    flood(attacker, [Source(client, (attacker.publish(client, Topic.OPEN, each) for each in payloads), rate)])


def swarm(attacker: Attacker, *, rate: float) -> None:
    """Many devices at once, each of which misbehaves in one of the ways above, all at the same rate."""
    kinds = cycle((_random_payloads, _unknown_session, _opens, _closes, _states))
    sources = []
    for identity, kind in zip(attacker.place.identities, kinds, strict=False):
        client = attacker.client(identity)
        sources.append(Source(client, kind(attacker, client), rate))
    flood(attacker, sources)


def _random_payloads(attacker: Attacker, client: RawClient) -> Iterator[bytes]:
    topics = cycle((Topic.DRAFT, Topic.OPEN, Topic.CLOSE))
    return pool(lambda: attacker.publish(client, next(topics), random_bytes(attacker.rng)))


def _unknown_session(attacker: Attacker, client: RawClient, *, qos: int = 1) -> Iterator[bytes]:
    size = attacker.place.vocabulary_size
    return pool(lambda: attacker.publish(client, Topic.DRAFT, random_draft(attacker.rng, vocabulary=size), qos=qos))


def _opens(attacker: Attacker, client: RawClient) -> Iterator[bytes]:
    return _each(attacker, client, Topic.OPEN, lambda: open_of(attacker.place.vocabulary))


def _closes(attacker: Attacker, client: RawClient) -> Iterator[bytes]:
    return _each(attacker, client, Topic.CLOSE, close_of)


def _each(attacker: Attacker, client: RawClient, topic: Topic, make: Callable[[], bytes]) -> Iterator[bytes]:
    return (attacker.publish(client, topic, payload) for payload in chain(unique(make())))


def _states(attacker: Attacker, client: RawClient) -> Iterator[bytes]:
    return pool(lambda: attacker.publish(client, Topic.STATE, state_of(attacker.rng), retain=True))

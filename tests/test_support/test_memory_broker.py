import random

import pytest

from fleet_common.mqtt.link import Handler
from tests.support.links import Inbox
from tests.support.memory_broker import Faults, MemoryBroker
from tests.support.memory_link import MemoryLink

SENT = [b"%d" % number for number in range(200)]


def joined(broker: MemoryBroker, name: str, handler: Handler | None = None) -> MemoryLink:
    """Return a link that has connected, and hands what comes on the topic `t` to its handler."""
    link = MemoryLink(broker, name)
    if handler is not None:
        link.subscribe("t", handler)
    link.start(timeout_s=0)
    return link


def run(faults: Faults, *, seed: int = 1) -> list[bytes]:
    broker = MemoryBroker(rng=random.Random(seed), faults=faults)
    inbox = Inbox()
    joined(broker, "receiver", inbox)
    sender = joined(broker, "sender")
    for payload in SENT:
        sender.publish("t", payload)
        broker.step()
    broker.pump()
    return inbox.payloads


def test_without_faults_everything_arrives_once_and_in_order() -> None:
    assert run(Faults()) == SENT


def test_drop_loses_and_does_nothing_else() -> None:
    received = run(Faults(drop=0.3))
    assert received == [payload for payload in SENT if payload in set(received)]
    # Binomial(200, 0.7): outside 100..180 with probability below 1e-9, and the seed is fixed.
    assert 100 < len(received) < 180


def test_duplicate_repeats_and_does_nothing_else() -> None:
    received = run(Faults(duplicate=0.3))
    assert len(received) > len(SENT)
    assert list(dict.fromkeys(received)) == SENT


@pytest.mark.parametrize("faults", [Faults(delay=0.3, max_delay=5), Faults(reorder=0.3)])
def test_delay_and_reorder_change_only_the_order(faults: Faults) -> None:
    received = run(faults)
    assert received != SENT
    assert sorted(received) == sorted(SENT)


def test_faults_keep_to_their_topics() -> None:
    assert run(Faults(drop=1.0, only="b/#")) == SENT
    assert run(Faults(drop=1.0, only="t")) == []

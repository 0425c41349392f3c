import random

import pytest

from benchmarks.hostile.attacks.granted import wide_policy
from benchmarks.hostile.payloads import DEFAULT_POLICY
from benchmarks.hostile.sessions import HostileSessions
from fleet_common.mqtt.link import Message
from fleet_edge.store.records import EventLogged
from schemas.codec import decode_draft
from schemas.messages import Draft
from schemas.policy import SamplingPolicy
from schemas.topics import Topic, build
from tests.support.memory_fleet import EDGE, FLEET, MemoryFleet
from tests.support.memory_link import MemoryLink

NAME = "hostile-1"


class Hostile:
    """Sessions of an attacker on a fleet in memory."""

    def __init__(self, policy: SamplingPolicy, *, number: int, drafts: bool = True) -> None:
        # Time stands still here, so that rates would be unlimited ones.
        self.fleet = MemoryFleet(settings={"quotas": {"drafts_per_s": 1e6, "new_tokens_per_min": 1e6}})
        self.link = MemoryLink(self.fleet.broker, NAME)
        self.drafts: list[Draft] = []
        self.closes = 0
        for topic in (Topic.SESSION, Topic.VERDICT):
            self.link.subscribe(build(topic, fleet=FLEET, device=NAME), self._arrived)
        self.link.start(timeout_s=1.0)
        self.group = HostileSessions(
            vocabulary=self.fleet.verifier.info.vocabulary,
            policy=policy,
            number=number,
            tokens=64,
            rng=random.Random(1),
            send_open=lambda payload: self.link.publish(self._topic(Topic.OPEN), payload),
            send_draft=self._draft,
            send_close=self._close,
            drafts=drafts,
        )

    def _topic(self, topic: Topic) -> str:
        return build(topic, fleet=FLEET, device=NAME, edge=EDGE if topic is Topic.DRAFT else None)

    def _arrived(self, message: Message) -> None:
        self.group.take(message.topic.encode(), message.payload)

    def _draft(self, payload: bytes) -> None:
        self.drafts.append(decode_draft(payload))
        self.link.publish(self._topic(Topic.DRAFT), payload)

    def _close(self, payload: bytes) -> None:
        self.closes += 1
        self.link.publish(self._topic(Topic.CLOSE), payload)


@pytest.mark.parametrize("policy", [DEFAULT_POLICY, wide_policy()])
def test_a_hostile_session_keeps_to_the_protocol_up_to_its_end(policy: SamplingPolicy) -> None:
    hostile = Hostile(policy, number=2)
    hostile.group.fill()
    hostile.fleet.settle()
    assert hostile.closes == 2
    assert not list(hostile.group)
    assert any(draft.fix is not None for draft in hostile.drafts), "or nothing was ever rejected"
    assert not hostile.fleet.sink.of(EventLogged), "or it was answered with a fault"


def test_one_that_asks_for_samples_stops_at_its_first_rejection() -> None:
    hostile = Hostile(wide_policy(), number=1, drafts=False)
    hostile.group.fill()
    hostile.fleet.settle()
    (session,) = hostile.group
    assert session.rejected
    asked = session.more_samples(64)
    assert (asked.tried, asked.base, asked.epoch) == (64, session.committed, session.epoch)


def test_a_draft_that_was_not_answered_is_sent_again() -> None:
    hostile = Hostile(DEFAULT_POLICY, number=1)
    hostile.group.fill()
    hostile.fleet.step()
    while not hostile.drafts:
        hostile.fleet.broker.pump()
        hostile.fleet.step()
    hostile.group.fill()
    assert len(hostile.drafts) >= 2
    assert hostile.drafts[-1] == hostile.drafts[-2]


def test_an_unanswered_open_is_sent_again_under_its_own_name() -> None:
    hostile = Hostile(DEFAULT_POLICY, number=1)
    sent: list[bytes] = []
    hostile.group.send_open = sent.append
    hostile.group.fill()
    hostile.group.fill()
    assert len(sent) == 2
    assert sent[0] == sent[1]

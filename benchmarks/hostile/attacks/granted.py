"""Attacks from within sessions that the edge has granted: dear prompts, dear shapes, endless questions, replays."""

from collections.abc import Iterator
from itertools import cycle
from typing import Final

from benchmarks.hostile.attacks.contract import Attacker, Source, flood, pool
from benchmarks.hostile.mqtt_client import RawClient
from benchmarks.hostile.payloads import DEFAULT_POLICY, close_of, open_of, random_draft
from benchmarks.hostile.sessions import HostileSession, HostileSessions
from schemas.codec import encode_draft
from schemas.fields import MAX_DRAFT, SESSION_BYTES
from schemas.policy import SamplingPolicy
from schemas.topics import Topic

_GRANT_S: Final = 10.0
_ASK_AGAIN_S: Final = 1.0
_RECORD_S: Final = 1.5
_AHEAD: Final = 1 << 20  # an epoch that no session comes to
_PROMPTS: Final = 8


def wide_policy(top_k: int = 0) -> SamplingPolicy:
    """Return the policy whose distributions are dearest: untempered, all tokens unless `top_k` is given."""
    return DEFAULT_POLICY.model_copy(update={"temperature": 1.0, "top_k": top_k, "top_p": 1.0})


def out_of_epoch(attacker: Attacker, *, rate: float) -> None:
    """Drafts of the attacker's own session, of an epoch that it has not reached."""
    client, session = _one_session(attacker, DEFAULT_POLICY)
    handle = session.opened.handle if session is not None and session.opened is not None else 0
    size = attacker.place.vocabulary_size

    def make() -> bytes:
        draft = random_draft(attacker.rng, vocabulary=size, handle=handle, epoch=_AHEAD)
        return attacker.publish(client, Topic.DRAFT, draft)

    flood(attacker, [Source(client, pool(make), rate)])


def more_samples(attacker: Attacker, *, rate: float) -> None:
    """A rejection whose samples never suffice: more are asked for, and more."""
    client, session = _one_session(attacker, wide_policy())
    flood(attacker, [Source(client, _requests(attacker, client, session), rate)])


def drafting(attacker: Attacker, *, sessions: int, policy: SamplingPolicy = DEFAULT_POLICY) -> None:
    """Longest drafts in several sessions, each sent as soon as the last is answered."""
    client, group = _sessions(attacker, policy, number=sessions)
    _keep_drafting(attacker, client, group)


def nearly_all(attacker: Attacker, *, sessions: int) -> None:
    """As `drafting`, with a `top_k` just below the size of the vocabulary."""
    drafting(attacker, sessions=sessions, policy=wide_policy(attacker.place.vocabulary_size - 1))


def prompts(attacker: Attacker, *, rate: float, length: int) -> None:
    """Prompts of a middling length, each in a new session that is closed when the next is opened."""
    client = attacker.client()
    length = min(length, attacker.place.context - 1)
    flood(attacker, [Source(client, _opened_and_closed(attacker, client, length), rate)])


def long_prompts(attacker: Attacker, *, rate: float) -> None:
    """Prompts as long as the target holds, each in a new session that is closed when the next is opened."""
    prompts(attacker, rate=rate, length=attacker.place.context)


def replays(attacker: Attacker, *, rate: float) -> None:
    """All messages of a session that the attacker has had, over and over, long after its end."""
    if attacker.place.control:
        client = attacker.client()
        draft = random_draft(attacker.rng, vocabulary=attacker.place.vocabulary_size)
        flood(attacker, [Source(client, cycle([attacker.publish(client, Topic.DRAFT, draft)]), rate)])
        return
    recorded: list[bytes] = []
    client, group = _sessions(attacker, DEFAULT_POLICY, number=1, recorded=recorded)
    _keep_drafting(attacker, client, group, for_s=_RECORD_S)
    for session in group:
        group.send_close(close_of(session=session.session))
    if recorded:
        flood(attacker, [Source(client, cycle(recorded), rate)])


def _sessions(
    attacker: Attacker,
    policy: SamplingPolicy,
    *,
    number: int,
    drafts: bool = True,
    recorded: list[bytes] | None = None,
) -> tuple[RawClient, HostileSessions]:
    client = attacker.client(on_publish=lambda topic, payload: group.take(topic, payload))  # noqa: PLW0108 - made below

    def send(topic: Topic, payload: bytes) -> None:
        if recorded is not None:
            recorded.append(attacker.publish(client, topic, payload))
        attacker.send(client, topic, payload)

    group = HostileSessions(
        vocabulary=attacker.place.vocabulary,
        policy=policy,
        number=number,
        tokens=MAX_DRAFT,
        rng=attacker.rng,
        send_open=lambda payload: send(Topic.OPEN, payload),
        send_draft=lambda payload: send(Topic.DRAFT, payload),
        send_close=lambda payload: send(Topic.CLOSE, payload),
        drafts=drafts,
    )
    return client, group


def _one_session(attacker: Attacker, policy: SamplingPolicy) -> tuple[RawClient, HostileSession | None]:
    """Return a client and its session, whose first draft was rejected; no session if none is granted in time."""
    client, group = _sessions(attacker, policy, number=1, drafts=False)
    if attacker.place.control:
        return client, None
    until = attacker.clock() + _GRANT_S
    asked = 0.0
    while attacker.running() and attacker.clock() < until:
        if client.connected and attacker.clock() - asked > _ASK_AGAIN_S:
            group.fill()
            asked = attacker.clock()
        client.pump(0.01)
        rejected = next((session for session in group if session.rejected), None)
        if rejected is not None:
            return client, rejected
    return client, next(iter(group), None)


def _keep_drafting(
    attacker: Attacker, client: RawClient, group: HostileSessions, *, for_s: float = float("inf")
) -> None:
    began, asked = attacker.clock(), 0.0
    while attacker.running() and attacker.clock() - began < for_s:
        if client.connected and attacker.clock() - asked > _ASK_AGAIN_S:
            group.fill()
            asked = attacker.clock()
        client.pump(0.005)


def _requests(attacker: Attacker, client: RawClient, session: HostileSession | None) -> Iterator[bytes]:
    if session is None or session.opened is None:
        size = attacker.place.vocabulary_size
        yield from pool(lambda: attacker.publish(client, Topic.DRAFT, random_draft(attacker.rng, vocabulary=size)))
        return
    tried = 0
    while True:
        tried = tried % (1 << 19) + 64
        yield attacker.publish(client, Topic.DRAFT, encode_draft(session.more_samples(tried)))


def _opened_and_closed(attacker: Attacker, client: RawClient, length: int) -> Iterator[bytes]:
    vocabulary, rng = attacker.place.vocabulary, attacker.rng
    name = b""
    for prompt in cycle([tuple(rng.choices(range(vocabulary.size), k=length)) for _ in range(_PROMPTS)]):
        packets = attacker.publish(client, Topic.CLOSE, close_of(session=name)) if name else b""
        name = rng.randbytes(SESSION_BYTES)
        yield packets + attacker.publish(client, Topic.OPEN, open_of(vocabulary, prompt=prompt, session=name))

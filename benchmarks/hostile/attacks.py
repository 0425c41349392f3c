"""Registry of attacks: by name, with their rates.

A new attack is a function that takes an `Attacker`, and a line here.
"""

import argparse
import contextlib
import json
import random
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from types import MappingProxyType
from typing import Any, Final

from benchmarks.hostile.client import Attacker, ConnectRefused, HostileClient, KnownFleet, Source, flood, pool
from benchmarks.hostile.grammars import (
    SMALL,
    forced,
    growing,
    long_opens,
    long_resumes,
    objects,
)
from benchmarks.hostile.messages import (
    DEFAULT_POLICY,
    HostileSession,
    HostileSessions,
    close_of,
    huge_open,
    open_of,
    random_bytes,
    random_draft,
    state_of,
    unique,
)
from schemas.codec import MAX_OPEN_BYTES, encode_draft
from schemas.fields import MAX_DRAFT, MAX_TOKENS, SESSION_BYTES
from schemas.policy import Grammar, SamplingPolicy
from schemas.topics import Topic, build
from tests.support.mqtt_packets import WillMessage, publish_packet
from tests.support.raw_client import open_socket, tls_context


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack."""

    name: str
    summary: str
    run: Callable[..., None]
    control: bool = True
    devices: int = 1
    has_plain: bool = False
    """Whether it takes `plain`: the same load without its harmful part, which is the control. The honest devices then
    write short JSON texts."""
    newcomer: Grammar | None = None


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
        if client.connects != connected:  # a broker that has hung up has forgotten them
            connected, left = client.connects, list(wanted)
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
            continue


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
    assert identity.tls is not None
    context = tls_context(identity.tls)
    held: list[socket.socket] = []
    try:
        while attacker.running():
            if len(held) < number:
                try:
                    sock = open_socket(identity.port, context, host=identity.host)
                    sock.setblocking(False)  # noqa: FBT003 - the standard library's
                    held.append(sock)
                    attacker.sent += 1
                    continue
                except OSError:
                    pass  # again in the next turn
            held = [sock for sock in held if _alive(sock)]
            time.sleep(0.1)
    finally:
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
            # All at once, then again one by one, because retained messages may have been cleared.
            if count < number or attacker.clock() - began > count - number:
                topic = build(Topic.DRAFT, fleet=place.fleet, device=client.identity.name, edge=names[count % number])
                client.send(publish_packet(topic, payload, retain=True))
                count += 1
                attacker.sent += 1
        client.pump(0.005)


def _alive(sock: socket.socket) -> bool:
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


def flood_with(attacker: Attacker, *, make: Callable[[Attacker, HostileClient], Iterator[bytes]], rate: float) -> None:
    """Send packets of one kind from one device."""
    client = attacker.client()
    flood(attacker, [Source(client, make(attacker, client), rate)])


def swarm(attacker: Attacker, *, rate: float) -> None:
    """Many devices at once, each of which misbehaves in one of the ways above, all at the same rate."""
    kinds = cycle((_random_payloads, _unknown_session, _opens, _closes, _states))
    sources = []
    for identity, kind in zip(attacker.place.identities, kinds, strict=False):
        client = attacker.client(identity)
        sources.append(Source(client, kind(attacker, client), rate))
    flood(attacker, sources)


def _random_payloads(attacker: Attacker, client: HostileClient) -> Iterator[bytes]:
    topics = cycle((Topic.DRAFT, Topic.OPEN, Topic.CLOSE))
    return pool(lambda: attacker.publish(client, next(topics), random_bytes(attacker.rng)))


def _unknown_session(attacker: Attacker, client: HostileClient, *, qos: int = 1) -> Iterator[bytes]:
    size = attacker.place.vocabulary_size
    return pool(lambda: attacker.publish(client, Topic.DRAFT, random_draft(attacker.rng, vocabulary=size), qos=qos))


def _huge_opens(attacker: Attacker, client: HostileClient) -> Iterator[bytes]:
    """Yield well-formed Opens of the greatest size."""
    most = min(MAX_OPEN_BYTES, attacker.place.max_packet_bytes - _PACKET_HEAD)
    return _each(attacker, client, Topic.OPEN, lambda: huge_open(attacker.place.vocabulary, most=most))


def _opens(attacker: Attacker, client: HostileClient) -> Iterator[bytes]:
    return _each(attacker, client, Topic.OPEN, lambda: open_of(attacker.place.vocabulary))


def _closes(attacker: Attacker, client: HostileClient) -> Iterator[bytes]:
    return _each(attacker, client, Topic.CLOSE, close_of)


def _each(attacker: Attacker, client: HostileClient, topic: Topic, make: Callable[[], bytes]) -> Iterator[bytes]:
    return (attacker.publish(client, topic, payload) for payload in unique(make()))


def _states(attacker: Attacker, client: HostileClient) -> Iterator[bytes]:
    return pool(lambda: attacker.publish(client, Topic.STATE, state_of(attacker.rng), retain=True))


_GRANT_S: Final = 10.0
_ASK_AGAIN_S: Final = 1.0
_RECORD_S: Final = 1.5
_AHEAD: Final = 1 << 20  # an epoch that no session comes to
_PROMPTS: Final = 8


def wide_policy(top_k: int = 0) -> SamplingPolicy:
    """Return the policy with the most expensive distributions: untempered, all tokens unless `top_k` is given."""
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


def drafting(attacker: Attacker, *, sessions: int, top_k: int | None = None) -> None:
    """Longest drafts in several sessions; with a `top_k`, negative ones counted from the vocabulary, broad policies."""
    policy = DEFAULT_POLICY
    if top_k is not None:
        policy = wide_policy(top_k if top_k >= 0 else attacker.place.vocabulary_size + top_k)
    client, group = _sessions(attacker, policy, number=sessions)
    _keep_drafting(attacker, client, group)


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
        group.send(Topic.CLOSE, close_of(session=session.session))
    if recorded:
        flood(attacker, [Source(client, cycle(recorded), rate)])


def _sessions(
    attacker: Attacker,
    policy: SamplingPolicy,
    *,
    number: int,
    drafts: bool = True,
    recorded: list[bytes] | None = None,
) -> tuple[HostileClient, HostileSessions]:
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
        send=send,
        drafts=drafts,
    )
    return client, group


def _one_session(attacker: Attacker, policy: SamplingPolicy) -> tuple[HostileClient, HostileSession | None]:
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
    attacker: Attacker, client: HostileClient, group: HostileSessions, *, for_s: float = float("inf")
) -> None:
    began, asked = attacker.clock(), 0.0
    while attacker.running() and attacker.clock() - began < for_s:
        if client.connected and attacker.clock() - asked > _ASK_AGAIN_S:
            group.fill()
            asked = attacker.clock()
        client.pump(0.005)


def _requests(attacker: Attacker, client: HostileClient, session: HostileSession | None) -> Iterator[bytes]:
    if session is None or session.opened is None:
        size = attacker.place.vocabulary_size
        yield from pool(lambda: attacker.publish(client, Topic.DRAFT, random_draft(attacker.rng, vocabulary=size)))
        return
    tried = 0
    while True:
        tried = tried % (1 << 19) + 64
        yield attacker.publish(client, Topic.DRAFT, encode_draft(session.more_samples(tried)))


def _opened_and_closed(attacker: Attacker, client: HostileClient, *, length: int = MAX_TOKENS) -> Iterator[bytes]:
    """Yield an Open with a long prompt, and with each next one a Close of the last."""
    length = min(length, attacker.place.context - 1)
    vocabulary, rng = attacker.place.vocabulary, attacker.rng
    name = b""
    for prompt in cycle([tuple(rng.choices(range(vocabulary.size), k=length)) for _ in range(_PROMPTS)]):
        packets = attacker.publish(client, Topic.CLOSE, close_of(session=name)) if name else b""
        name = rng.randbytes(SESSION_BYTES)
        yield packets + attacker.publish(client, Topic.OPEN, open_of(vocabulary, prompt=prompt, session=name))


_SWARM: Final = 50

Packets = Callable[[Attacker, HostileClient], Iterator[bytes]]


def _flood(name: str, summary: str, make: Packets, rate: float) -> Attack:
    return Attack(name, f"{summary}, {rate:,g}/s", partial(flood_with, make=make, rate=rate))


def _drafting(name: str, summary: str, *, top_k: int | None = None) -> Attack:
    run = partial(drafting, sessions=8, top_k=top_k)
    return Attack(name, f"{summary}, 8 sessions at full rate", run, control=False)


def _by_requests(name: str, summary: str, run: Callable[..., None], **options: Any) -> Attack:  # noqa: ANN401 - of `Attack`
    return Attack(name, summary, run, has_plain=True, **options)


_ALL: Final = (
    _flood("random-bytes", "random bytes", _random_payloads, 1000),
    _flood("unknown-session-qos0", "drafts of an unknown session at QoS 0", partial(_unknown_session, qos=0), 2000),
    _flood("unknown-session", "drafts of an unknown session at QoS 1", _unknown_session, 2000),
    Attack("out-of-epoch", "drafts out of epoch, 2,000/s", partial(out_of_epoch, rate=2000)),
    _flood("opens", "Opens", _opens, 3400),
    _flood("closes", "Closes", _closes, 2000),
    _flood("long-prompts", "prompts of greatest length, opened and closed", _opened_and_closed, 7),
    _flood(
        "prompts",
        "prompts of 500 tokens within default quotas, opened and closed",
        partial(_opened_and_closed, length=500),
        1.9,
    ),
    _drafting("top-k", "top_k near the vocabulary", top_k=-1),
    _drafting("whole-vocabulary", "top_k 0, which keeps all tokens", top_k=0),
    Attack("more-samples", "asking for more samples, 400/s", partial(more_samples, rate=400)),
    _drafting("long-drafts", "longest drafts"),
    _flood("own-state", "own retained state", _states, 1000),
    _flood("huge-opens", "Opens of 1 MB", _huge_opens, 20),
    Attack("replays", "own messages of before, 2,000/s", partial(replays, rate=2000)),
    Attack("filters", "subscriptions to 10,000 filters", partial(filters, number=10_000), control=False),
    Attack("wills", "wills of 64 KB, 20 connections/s, cut", partial(wills, rate=20)),
    Attack("slow-reader", "drafts of an unknown session, 1,000/s, answers never read", partial(slow_reader, rate=1000)),
    Attack(
        "connections", "1,000 TLS connections with one certificate", partial(connections, number=1000), control=False
    ),
    Attack("retained", "300 retained messages of 1 MiB on up/draft/…", partial(retained, number=300)),
    Attack(
        "swarm",
        f"{_SWARM} devices at once, 100 messages/s each: bytes, drafts, Opens, Closes, states",
        partial(swarm, rate=100),
        devices=_SWARM,
    ),
    _by_requests(
        "long-opens",
        "4 requests with 4,092 tokens of prompt or resume",
        partial(long_opens, sessions=4, length=4092),
    ),
    *(
        _by_requests(
            f"forced-text-{devices}",
            f"constants of 15,000 characters, 4 requests each of {devices} devices that the edge decodes",
            partial(forced, devices=devices, sessions=4),
            devices=devices,
        )
        for devices in (1, 2, 5)
    ),
    _by_requests(
        "long-resumes",
        "JSON objects of the longest tokens, resumed by 3 devices, 4 requests each",
        partial(long_resumes, devices=3, sessions=4, grammars=0),
        devices=3,
    ),
    _by_requests(
        "many-grammars",
        "40 grammars of 5 devices, each with a long resume",
        partial(long_resumes, devices=5, sessions=8, grammars=40),
        devices=5,
        newcomer=SMALL,
    ),
    _by_requests(
        "many-objects",
        f"JSON objects of {_SWARM} devices, 8 requests each that the edge decodes",
        partial(objects, sessions=8),
        devices=_SWARM,
    ),
    _by_requests(
        "growing-lexers",
        "patterns with ever more states, 8 requests that the edge decodes",
        partial(growing, sessions=8),
    ),
)

ATTACKS: Final[Mapping[str, Attack]] = MappingProxyType({attack.name: attack for attack in _ALL})
"""By name, in the order of the table in the report."""


_READY: Final = "ready"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attack", choices=list(ATTACKS))
    parser.add_argument("--seconds", type=float, required=True, help="longest time")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--plain", action="store_true", help="the attack's plain load in its place")
    arguments = parser.parse_args()
    place = KnownFleet.from_json(sys.stdin.readline())
    ended: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    print(_READY, flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    attacker = Attacker(
        place,
        random.Random(arguments.seed),
        running=lambda: not ended and time.monotonic() - began < arguments.seconds,
    )
    attack = ATTACKS[arguments.attack]
    attack.run(attacker, **({"plain": True} if arguments.plain else {}))
    account = {
        "sent_per_s": attacker.sent / (time.monotonic() - began),
        "connects": sum(client.connects for client in attacker.clients),
        "verdicts": attacker.verdicts,
    }
    print(json.dumps(account), flush=True)
    for client in attacker.clients:
        client.abort()


if __name__ == "__main__":
    main()

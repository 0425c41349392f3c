"""Played sessions: what a real device has sent in a session, kept so that it can be sent again at no cost.

A session's drafts depend on nothing but its seed: the same ones meet the same verdicts at any edge of the same target.
"""

import time
from dataclasses import dataclass
from typing import Any, Final

import cbor2

from fleet_common.mqtt.link import Message
from fleet_device.client.agent import Agent
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import GenerateRequest
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.scripted import ScriptedVerifier
from schemas.codec import decode_close, decode_open, decode_verdict, encode_close, encode_open
from schemas.policy import Mode, SamplingPolicy
from schemas.topics import Topic, wildcard
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.scripted_language import CONTEXT, LANGUAGE, draft_language

DRAFT: Final = 4
"""Tokens of a draft."""

_FLEET, _EDGE, _DEVICE = "played", "edge-1", "device-1"
_HANDLE: Final = 40_000  # three bytes of CBOR behind the array's head
_BEHIND_HANDLE: Final = 4
_PROMPT_TOKENS: Final = 24
_START_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class PlayedSession:
    """A session's messages."""

    open: bytes
    drafts: tuple[bytes, ...]
    verdicts: tuple[tuple[int, int], ...]
    close: bytes

    def draft(self, number: int, handle: int) -> bytes:
        """Return a draft with the handle that an edge has given."""
        payload = self.drafts[number]
        return payload[:1] + cbor2.dumps(handle) + payload[1:]

    def verdict(self, number: int, handle: int) -> bytes:
        """Return how the verdict on a draft must begin, behind the head of its array."""
        round_, accepted = self.verdicts[number]
        return cbor2.dumps(handle) + cbor2.dumps(round_) + cbor2.dumps(accepted)

    def opening(self, session: bytes) -> bytes:
        """Return the Open of a session of another name."""
        return encode_open(decode_open(self.open).model_copy(update={"session": session}))

    def closing(self, session: bytes, handle: int, edge: str) -> bytes:
        update = {"session": session, "handle": handle, "edge": edge}
        return encode_close(decode_close(self.close).model_copy(update=update))


def play(count: int, *, mode: Mode, tokens: int, first_seed: int = 0) -> list[PlayedSession]:
    """Have a real device write some texts of the scripted language, and return what it has sent."""
    broker = MemoryBroker()
    sent: list[tuple[str, bytes]] = []
    listener = MemoryLink(broker, "listener")

    def keep(message: Message) -> None:
        sent.append((message.topic, message.payload))

    for topic in (Topic.OPEN, Topic.DRAFT, Topic.CLOSE, Topic.VERDICT):
        listener.subscribe(wildcard(topic, fleet=_FLEET), keep)
    verifier = ScriptedVerifier(LANGUAGE, LANGUAGE.words, context=CONTEXT)
    settings = EdgeSettings(fleet=_FLEET, edge=_EDGE, quotas=NO_QUOTAS)
    link: Any = MemoryLink(broker, _DEVICE)
    agent = Agent(
        link, _FLEET, _DEVICE, ScriptedDrafter(draft_language(), LANGUAGE.words), FixedPacing(DRAFT), time.monotonic
    )
    agent.attach()
    sessions = []
    with (
        broker.running(),
        edge_thread(settings, verifier, link=MemoryLink(broker, _EDGE), first_handle=_HANDLE),
    ):
        listener.start(timeout_s=_START_S)
        link.start(timeout_s=_START_S)
        for seed in range(first_seed, first_seed + count):
            sent.clear()
            policy = SamplingPolicy(mode=mode, temperature=0.7, top_k=50, top_p=0.95, seed=seed)
            prompt = tuple((seed * 31 + place) % LANGUAGE.size for place in range(_PROMPT_TOKENS))
            agent.generate(GenerateRequest(prompt, policy=policy, max_new_tokens=tokens))
            sessions.append(_session(sent))
    return sessions


def _session(sent: list[tuple[str, bytes]]) -> PlayedSession:
    by_topic: dict[str, list[bytes]] = {name: [] for name in ("open", "draft", "close", "verdict")}
    for topic, payload in sent:
        name = next(name for name in by_topic if f"/{name}" in topic)
        if payload not in by_topic[name]:
            by_topic[name].append(payload)
    verdicts = sorted((decode_verdict(payload) for payload in by_topic["verdict"]), key=lambda each: each.round)
    return PlayedSession(
        by_topic["open"][0],
        tuple(payload[:1] + payload[_BEHIND_HANDLE:] for payload in by_topic["draft"]),
        tuple((verdict.round, verdict.accepted) for verdict in verdicts),
        by_topic["close"][0],
    )

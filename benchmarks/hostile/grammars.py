"""Attacks by requests: long prompts, and grammars that are slow to follow or force text."""

import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, repeat
from typing import Final

from benchmarks.hostile.client import Attacker, HostileClient
from benchmarks.hostile.messages import (
    DEFAULT_POLICY,
    close_of,
    open_of,
)
from schemas.codec import decode_reply, decode_verdict, encode_draft
from schemas.errors import CodecError
from schemas.fields import SESSION_BYTES
from schemas.messages import Closed, Draft, Fault, Opened, Refused, SessionReply, Verdict
from schemas.policy import Grammar, SamplingPolicy
from schemas.reasons import Action, Finish, RefusalCode
from schemas.topics import Topic
from schemas.vocabulary import EMPTY_DIGEST, extend_digest
from tests.support.processes import BrokerClient

_PATIENCE_S: Final = 20.0
_AGAIN_S: Final = 2.5
_TEXT: Final = 4000
_FAREWELL_S: Final = 0.3
_SHORTEST: Final = 3  # tokens of a prompt

SMALL: Final = Grammar.json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
"""A schema of an honest device."""

_FORCED: Final = Grammar.json_schema({"enum": ["a" * 15_000, "a" * 14_999 + "b"]})
_OBJECT_TOKENS: Final = 370
_GROWING: Final = [
    Grammar.json_schema({"type": "array", "items": {"type": "string", "pattern": pattern, "maxLength": 500}})
    for pattern in (r"^[ab]*a[ab]{16}$", r"^(?:\S+\s+){0,49}\S+$")
]


def forced(attacker: Attacker, *, devices: int, sessions: int, plain: bool = False) -> None:
    """Requests of several devices that the edge decodes, of one of two constants of 15,000 characters."""
    grammar = None if plain else _FORCED
    _run(
        attacker,
        [
            _Requests(attacker, identity, _policies(repeat(grammar)), at_once=sessions, tokens=_TEXT)
            for identity in attacker.place.identities[:devices]
        ],
    )


def long_opens(attacker: Attacker, *, sessions: int, length: int, plain: bool = False) -> None:
    """Requests that the edge decodes after a prompt of `length` tokens, or every second one after a long resume."""
    _request(attacker, _policies(repeat(None)), at_once=sessions, tokens=_TEXT, length=_SHORTEST if plain else length)


def long_resumes(attacker: Attacker, *, devices: int, sessions: int, grammars: int, plain: bool = False) -> None:
    """Requests of several devices that resume long JSON objects, all of one grammar or each of another."""
    place = attacker.place
    resume = (*place.json_begin, *[place.json_filler] * (place.context - 200))
    made = [_object(number) for number in range(grammars)] or [Grammar.json_object()]
    policies = [_policies(cycle([None] if plain else made[number::devices] or made)) for number in range(devices)]
    _run(
        attacker,
        [
            _Requests(attacker, identity, each, at_once=sessions, tokens=_TEXT, resume=resume)
            for identity, each in zip(place.identities, policies, strict=False)
        ],
    )


def objects(attacker: Attacker, *, sessions: int, plain: bool = False) -> None:
    """Requests of JSON objects that the edge decodes, many of each device."""
    grammar = None if plain else Grammar.json_object()
    _run(
        attacker,
        [
            _Requests(attacker, identity, _policies(repeat(grammar)), at_once=sessions, tokens=_OBJECT_TOKENS)
            for identity in attacker.place.identities
        ],
    )


def growing(attacker: Attacker, *, sessions: int, plain: bool = False) -> None:
    """Requests that the edge decodes, of patterns whose lexer gets more and more states."""
    grammars = cycle([None] if plain else _GROWING)
    _request(attacker, _policies(grammars), at_once=sessions, tokens=_OBJECT_TOKENS)


def _policies(grammars: Iterable[Grammar | None]) -> Iterator[SamplingPolicy]:
    return (DEFAULT_POLICY.model_copy(update={"grammar": grammar}) for grammar in grammars)


def _object(number: int) -> Grammar:
    schema = {"title": str(number), "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    return Grammar.json_schema(schema)


@dataclass(slots=True)
class _Request:
    policy: SamplingPolicy
    at: float
    session: bytes = field(default_factory=lambda: secrets.token_bytes(SESSION_BYTES))
    handle: int | None = None
    tokens: int = 0
    resumed: tuple[int, int] = (0, EMPTY_DIGEST)  # number of tokens, and their digest


@dataclass(slots=True)
class _Requests:
    """Sessions of one device with edge-only decoding, opened one after another."""

    attacker: Attacker
    identity: BrokerClient
    policies: Iterator[SamplingPolicy]
    at_once: int
    tokens: int
    length: int = _SHORTEST  # of the prompt, or in every second request of the resume if it is long
    resume: tuple[int, ...] = ()  # of every request
    client: HostileClient = field(init=False)
    _open: list[_Request] = field(default_factory=list)
    _again: deque[SamplingPolicy] = field(default_factory=deque)
    _not_before: float = 0.0
    _number: int = 0

    def __post_init__(self) -> None:
        self.client = self.attacker.client(self.identity, self._take)

    def step(self, wait_s: float) -> None:
        now = self.attacker.clock()
        for request in [each for each in self._open if now - each.at > _PATIENCE_S]:
            self._close(request)
        if self.client.connected and now >= self._not_before and len(self._open) < self.at_once:
            policy = self._again.popleft() if self._again else next(self.policies, None)
            if policy is not None:
                request = _Request(policy, now)
                self._open.append(request)
                payload = self._open_of(request)
                self.attacker.send(self.client, Topic.OPEN, payload)
        self.client.pump(wait_s)

    def _open_of(self, request: _Request) -> bytes:
        self._number += 1
        size = self.attacker.place.vocabulary.size
        words = range(size // 8, size // 4)  # no special tokens
        long = tuple(self.attacker.rng.choices(words, k=self.length))
        resumes = self.length > _SHORTEST and self._number % 2
        prompt, resume = (long[:_SHORTEST], long[_SHORTEST:]) if resumes else (long, self.resume)
        request.resumed = len(resume), extend_digest(EMPTY_DIGEST, resume)
        return open_of(
            self.attacker.place.vocabulary,
            prompt=prompt,
            resume=resume or None,
            policy=request.policy,
            session=request.session,
        )

    def close(self) -> None:
        for request in list(self._open):
            self._close(request)

    def _take(self, topic: bytes, payload: bytes) -> None:
        try:
            if topic.endswith(b"/verdict"):
                self._written(decode_verdict(payload))
            else:
                self._answered(decode_reply(payload))
        except CodecError:
            return

    def _written(self, verdict: Verdict) -> None:
        for request in [each for each in self._open if each.handle == verdict.handle]:
            request.at = self.attacker.clock()
            request.tokens += len(verdict.written or ())
            if verdict.finish is not Finish.NO or request.tokens >= self.tokens:
                self._close(request)

    def _answered(self, reply: SessionReply) -> None:
        match reply:
            case Opened():
                for request in [each for each in self._open if each.session == reply.session]:
                    self._granted(request, reply)
            case Refused():
                for request in [each for each in self._open if each.session == reply.session]:
                    self._open.remove(request)
                    if reply.code in (RefusalCode.QUOTA, RefusalCode.BUSY, RefusalCode.QUARANTINED):
                        self._again.append(request.policy)
                        self._not_before = self.attacker.clock() + _AGAIN_S
            case Fault() if reply.handle is not None and reply.action is not Action.WAIT:
                self._open = [each for each in self._open if each.handle != reply.handle]
            case Closed():
                self._open = [each for each in self._open if each.session != reply.session]

    def _granted(self, request: _Request, opened: Opened) -> None:
        request.handle, request.at = opened.handle, self.attacker.clock()
        length, digest = request.resumed
        write = Draft(handle=opened.handle, round=1, epoch=0, base=length, counts=(), digest=digest, write=self.tokens)
        self.attacker.send(self.client, Topic.DRAFT, encode_draft(write))

    def _close(self, request: _Request) -> None:
        if request in self._open:
            self._open.remove(request)
            payload = close_of(session=request.session, handle=request.handle)
            self.attacker.send(self.client, Topic.CLOSE, payload)


def _request(
    attacker: Attacker,
    policies: Iterator[SamplingPolicy],
    *,
    at_once: int,
    tokens: int,
    length: int = _SHORTEST,
) -> None:
    identity = attacker.place.identities[0]
    _run(
        attacker,
        [_Requests(attacker, identity, policies, at_once=at_once, tokens=tokens, length=length)],
    )


def _run(attacker: Attacker, devices: list[_Requests]) -> None:
    while attacker.running():
        for each in devices:
            each.step(0.01 / len(devices))
    for each in devices:
        each.close()
    until = attacker.clock() + _FAREWELL_S
    while attacker.clock() < until:
        for each in devices:
            each.client.pump(0.01)

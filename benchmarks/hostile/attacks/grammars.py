"""Attacks by grammars: those that crash or hang who compiles them, that are dear to follow, and that force text."""

import json
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import Final

from benchmarks.client_process import Identity
from benchmarks.hostile.attacks.contract import Attacker
from benchmarks.hostile.grammar_bombs import random_bomb
from benchmarks.hostile.mqtt_client import RawClient
from benchmarks.hostile.payloads import DEFAULT_POLICY, close_of, open_of
from schemas.codec import decode_reply, decode_verdict, encode_draft
from schemas.errors import CodecError
from schemas.fields import SESSION_BYTES
from schemas.messages import Closed, Draft, Fault, Opened, Refused, SessionReply, Verdict
from schemas.policy import Grammar, SamplingPolicy
from schemas.reasons import Action, Finish, RefusalCode
from schemas.topics import Topic
from schemas.vocabulary import EMPTY_DIGEST

_PATIENCE_S: Final = 20.0
_AGAIN_S: Final = 2.5
_TEXT: Final = 4000
_BOMBS: Final = 20
_FAREWELL_S: Final = 0.3

SMALL: Final = Grammar.json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
"""A schema of an honest device."""

_FORCED: Final = Grammar.json_schema({"enum": ["a" * 15_000, "a" * 14_999 + "b"]})
_DEAR: Final = Grammar.lark("start: a\na: a a | a a a | /[a-z ]/ | /[a-z]+/\n")


def deadly(attacker: Attacker, *, rate: float) -> None:
    """Chains of references and of terminals, 42 to 47 KB, each another one, that overflow a stack or compile long."""
    _request(attacker, _policies(_deadly()), at_once=4, tokens=32, rate=rate)


def forced(attacker: Attacker, *, sessions: int, plain: bool = False) -> None:
    """Requests that the edge decodes, of one of two constants of 15,000 characters."""
    _request(attacker, _policies(repeat(None if plain else _FORCED)), at_once=sessions, tokens=_TEXT)


def dear(attacker: Attacker, *, sessions: int, plain: bool = False) -> None:
    """Requests that the edge decodes, with a grammar whose masks take as long as they may."""
    _request(attacker, _policies(repeat(None if plain else _DEAR)), at_once=sessions, tokens=_TEXT)


def known(attacker: Attacker, *, rate: float, plain: bool = False) -> None:
    """Opens, closed at once, with a schema of 1,900 properties that the edge knows."""
    _request(attacker, _policies(repeat(None if plain else _large(0))), at_once=4, tokens=0, rate=rate)


def large(attacker: Attacker, *, at_once: int, plain: bool = False) -> None:
    """Opens, closed at once, each with another schema of 1,900 properties."""
    grammars = repeat(None) if plain else map(_large, count())
    _request(attacker, _policies(grammars), at_once=at_once, tokens=0)


def bombs(attacker: Attacker, *, plain: bool = False) -> None:
    """Random grammars, 20 of each device, each followed for some tokens if it is granted."""
    made = [[random_bomb(attacker.rng) for _ in range(_BOMBS)] for _ in attacker.place.identities]
    lots = [_policies([None] * _BOMBS if plain else each) for each in made]
    _run(
        attacker,
        [
            _Requests(attacker, identity, policies, at_once=4, tokens=32)
            for identity, policies in zip(attacker.place.identities, lots, strict=False)
        ],
    )


def _policies(grammars: Iterable[Grammar | None]) -> Iterator[SamplingPolicy]:
    return (DEFAULT_POLICY.model_copy(update={"grammar": grammar}) for grammar in grammars)


def _deadly() -> Iterator[Grammar]:
    for number in count():
        yield Grammar.json_schema(
            {
                "title": str(number),
                "$defs": {f"{each}": {"items": {"$ref": f"#/$defs/{each + 1}"}} for each in range(1200)} | {"1200": {}},
                "$ref": "#/$defs/0",
            }
        )
        lines = "".join(f'A{each}: A{each + 1} "a"\n' for each in range(2600))
        yield Grammar.lark(f'start: A0 "{number}"\n{lines}A2600: "a"\n')
        # Within the bounds of a grammar's shape, and dear all the same.
        lines = "".join(f'A{each}: A{each + 1}+ "a"\n' for each in range(240))
        yield Grammar.lark(f'start: A0 "{number}"\n{lines}A240: "a"\n')


def _large(number: int) -> Grammar:
    properties = {f"{number}_{each}": {"type": "string"} for each in range(1900)}
    return Grammar.model_validate(
        {"kind": "json-schema", "text": json.dumps({"properties": properties}, separators=(",", ":"))}
    )


@dataclass(slots=True)
class _Request:
    """One session.

    Attributes:
        policy: Its own.
        at: When it was opened, or last heard of.
        session: Its name.
        handle: Once it is granted.
        tokens: That the edge has decoded.
    """

    policy: SamplingPolicy
    at: float
    session: bytes = field(default_factory=lambda: secrets.token_bytes(SESSION_BYTES))
    handle: int | None = None
    tokens: int = 0


@dataclass(slots=True)
class _Requests:
    """Sessions of one device that the edge decodes, opened one after the other.

    Attributes:
        attacker: Whose.
        identity: Its own.
        policies: Of the sessions.
        at_once: Most that are open.
        tokens: Of each, at most; with 0 it is closed as soon as it is granted.
        rate: Opens a second, at most.
    """

    attacker: Attacker
    identity: Identity
    policies: Iterator[SamplingPolicy]
    at_once: int
    tokens: int
    rate: float = float("inf")
    client: RawClient = field(init=False)
    _open: list[_Request] = field(default_factory=list)
    _again: deque[SamplingPolicy] = field(default_factory=deque)
    _not_before: float = 0.0

    def __post_init__(self) -> None:
        self.client = self.attacker.client(self.identity, self._take)

    def step(self, wait_s: float) -> None:
        """Open what is due, and take what has arrived."""
        now = self.attacker.clock()
        for request in [each for each in self._open if now - each.at > _PATIENCE_S]:
            self._close(request)
        if self.client.connected and now >= self._not_before and len(self._open) < self.at_once:
            policy = self._again.popleft() if self._again else next(self.policies, None)
            if policy is not None:
                self._not_before = max(self._not_before, now - 1.0) + 1.0 / self.rate
                request = _Request(policy, now)
                self._open.append(request)
                payload = open_of(self.attacker.place.vocabulary, policy=policy, session=request.session)
                self.attacker.send(self.client, Topic.OPEN, payload)
        self.client.pump(wait_s)

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
                    if reply.code in (RefusalCode.QUOTA, RefusalCode.BUSY, RefusalCode.FENCED):
                        self._again.append(request.policy)
                        self._not_before = self.attacker.clock() + _AGAIN_S
            case Fault() if reply.handle is not None and reply.action is not Action.WAIT:
                self._open = [each for each in self._open if each.handle != reply.handle]
            case Closed():
                self._open = [each for each in self._open if each.session != reply.session]

    def _granted(self, request: _Request, opened: Opened) -> None:
        request.handle, request.at = opened.handle, self.attacker.clock()
        if not self.tokens:
            self._close(request)
            return
        write = Draft(handle=opened.handle, round=1, epoch=0, base=0, digest=EMPTY_DIGEST, write=self.tokens)
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
    rate: float = float("inf"),
) -> None:
    _run(
        attacker,
        [_Requests(attacker, attacker.place.identities[0], policies, at_once=at_once, tokens=tokens, rate=rate)],
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

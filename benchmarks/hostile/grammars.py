"""Attacks by requests: long prompts, and grammars that crash or hang a compiler, are slow to follow or force text."""

import json
import random
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, cycle, repeat
from typing import Any, Final

from benchmarks.hostile.client import Attacker, HostileClient
from benchmarks.hostile.messages import (
    DEFAULT_POLICY,
    close_of,
    open_of,
)
from benchmarks.processes import Identity
from schemas.codec import decode_reply, decode_verdict, encode_draft
from schemas.errors import CodecError
from schemas.fields import SESSION_BYTES
from schemas.messages import Closed, Draft, Fault, Opened, Refused, SessionReply, Verdict
from schemas.policy import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, SamplingPolicy
from schemas.reasons import Action, Finish, RefusalCode
from schemas.topics import Topic
from schemas.vocabulary import EMPTY_DIGEST, extend_digest


def random_bomb(rng: random.Random) -> Grammar:
    """Return a random grammar of one of the kinds below, within the length limit of grammars."""
    kind = rng.choice(_KINDS)
    size = int(10 ** rng.uniform(0.5, 4.5))
    while True:
        made = kind(rng, size)
        if len(made.text.encode()) <= MAX_GRAMMAR_BYTES:
            return made
        size = size * 2 // 3


def _reference_chain(rng: random.Random, size: int) -> Grammar:
    word = rng.choice(["items", "additionalProperties", "allOf", "anyOf", "oneOf"])
    references = [{"$ref": f"#/$defs/{number + 1:x}"} for number in range(size)]
    definitions: dict[str, Any] = {
        f"{number:x}": {word: [each] if word.endswith("Of") else each} for number, each in enumerate(references)
    }
    return _schema({"$defs": definitions | {f"{size:x}": {"type": "string"}}, "$ref": "#/$defs/0"})


def _scattered_references(rng: random.Random, size: int) -> Grammar:
    """Definitions that refer to random others, in chains that have to be followed."""
    names = [f"{number:x}" for number in range(size)]
    definitions: dict[str, Any] = {
        name: {"properties": {key: {"$ref": f"#/$defs/{rng.choice(names)}"} for key in "ab"}, "required": ["a"]}
        for name in names
    }
    return _schema({"$defs": definitions, "$ref": f"#/$defs/{names[0]}"})


def _doubling(rng: random.Random, size: int) -> Grammar:
    """Definitions, each of which combines the next with itself."""
    word, depth = rng.choice(["allOf", "anyOf", "oneOf"]), min(size, 600)
    definitions: dict[str, Any] = {
        f"d{level}": {word: [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(depth)
    }
    return _schema({"$defs": definitions | {f"d{depth}": {"type": "integer"}}, "$ref": "#/$defs/d0"})


def _nested(rng: random.Random, size: int) -> Grammar:
    forms = [('{"items":', "}"), ('{"anyOf":[', ",{}]}"), ('{"properties":{"a":', "}}"), ("[", "]")]
    before, behind = rng.choice(forms)
    depth = min(size, 20_000 // (len(before) + len(behind)))
    return _grammar(GrammarKind.JSON_SCHEMA, before * depth + "{}" + behind * depth)


def _properties(rng: random.Random, size: int) -> Grammar:
    properties = {f"{number:x}": {"type": rng.choice(["string", "integer", "number"])} for number in range(size)}
    return _schema(
        {"type": "object", "properties": properties, "required": list(properties)[: rng.randrange(size + 1)]}
    )


def _constants(rng: random.Random, size: int) -> Grammar:
    number = rng.choice([1, 2, 10, max(1, size // 8)])
    letters = rng.choice(["a", "ab", "\u00e9\u4e2d", " ", "0123456789"])
    long = max(1, size // number)
    return _schema({"enum": ["".join(rng.choice(letters) for _ in range(long)) for _ in range(number)]})


def _lengths(rng: random.Random, size: int) -> Grammar:
    inner = {"type": "string", "minLength": rng.randrange(size + 1), "maxLength": size, "pattern": _pattern(rng, 3)}
    return _schema({"type": "array", "items": inner, "minItems": rng.randrange(size + 1), "maxItems": size})


def _regex(rng: random.Random, size: int) -> Grammar:
    return _grammar(GrammarKind.REGEX, _pattern(rng, min(size, 40)))


def _repetitions(rng: random.Random, size: int) -> Grammar:
    pattern = "x"
    for _ in range(min(size, rng.randrange(1, 12))):
        pattern = f"({pattern}){{{rng.randrange(3)},{rng.randrange(3, 200)}}}"
    return _grammar(GrammarKind.REGEX, pattern)


def _states(rng: random.Random, size: int) -> Grammar:
    parts = [f".*{rng.choice('abc')}.{{{rng.randrange(2, max(3, min(size, 60)))}}}" for _ in range(rng.randrange(1, 5))]
    return _grammar(GrammarKind.REGEX, rng.choice(["|", ""]).join(f"({part}.*)" for part in parts))


def _terminals(rng: random.Random, size: int) -> Grammar:
    form = rng.choice(['{} "a"', '"a" {}', "{}+ /b/", "{}? {}", "({} | /[a-z]+/)", "~{} & /[a-z]*/", "{} /.*/"])
    lines = [f"A{number}: {form.replace('{}', f'A{number + 1}')}" for number in range(size)]
    return _grammar(GrammarKind.LARK, "\n".join(["start: A0", *lines, f'A{size}: "a"', ""]))


def _rules(rng: random.Random, size: int) -> Grammar:
    form = rng.choice(['{} "a"', '"a" {}', "{} {}", "{}* /b/", "({} | )"])
    lines = [f"r{number}: {form.replace('{}', f'r{number + 1}')}" for number in range(size)]
    return _grammar(GrammarKind.LARK, "\n".join(["start: r0", *lines, f'r{size}: "a"', ""]))


def _ambiguous(rng: random.Random, size: int) -> Grammar:
    """Rules under which one output can be parsed in very many ways."""
    number = min(size, 30)
    names = [f"r{each}" for each in range(number)]
    lines = ["start: r0"]
    for name in names:
        ways = [" ".join(rng.choices(names, k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 5))]
        ways.append(rng.choice(["/[a-z]/", "/[a-z]+/", '""', "/.*/"]))
        lines.append(f"{name}: {' | '.join(ways)}")
    return _grammar(GrammarKind.LARK, "\n".join([*lines, ""]))


def _garbage(rng: random.Random, size: int) -> Grammar:
    """Random characters that are special to parsers."""
    text = "".join(rng.choices('{}[]():"\\/|*+?.,%$~&^#-0aA\n ', k=size))
    return _grammar(rng.choice([GrammarKind.REGEX, GrammarKind.LARK, GrammarKind.JSON_SCHEMA]), text)


def _pattern(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice(["a", "b", ".", "[^a]", r"\w", r"\d", "\u00e9"])
    inner = [_pattern(rng, depth - rng.randrange(1, 8)) for _ in range(rng.randrange(1, 3))]
    form = rng.choice(["({})*", "({})+", "({})?", "({}){{2,9}}", "({})", "(?:{})|a"])
    return form.format(rng.choice(["", "|"]).join(inner))


def _schema(schema: dict[str, Any]) -> Grammar:
    return _grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, separators=(",", ":"), ensure_ascii=False))


def _grammar(kind: GrammarKind, text: str) -> Grammar:
    return Grammar.model_construct(kind=kind, text=text)  # it may be too long yet


_KINDS: Final[tuple[Callable[[random.Random, int], Grammar], ...]] = (
    _reference_chain, _scattered_references, _doubling, _nested, _properties, _constants, _lengths, _regex,
    _repetitions, _states, _terminals, _rules, _ambiguous, _garbage,
)  # fmt: skip


_PATIENCE_S: Final = 20.0
_AGAIN_S: Final = 2.5
_TEXT: Final = 4000
_BOMBS: Final = 20
_FAREWELL_S: Final = 0.3
_SHORTEST: Final = 3  # tokens of a prompt

SMALL: Final = Grammar.json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
"""A schema of an honest device."""

_FORCED: Final = Grammar.json_schema({"enum": ["a" * 15_000, "a" * 14_999 + "b"]})
_OBJECT_TOKENS: Final = 370
_WORN: Final = [
    Grammar.json_schema({"type": "array", "items": {"type": "string", "pattern": pattern, "maxLength": 500}})
    for pattern in (r"^[ab]*a[ab]{16}$", r"^(?:\S+\s+){0,49}\S+$")
]
_DEAR: Final = Grammar.lark("start: a\na: a a | a a a | /[a-z ]/ | /[a-z]+/\n")


def deadly(attacker: Attacker, *, rate: float) -> None:
    """Chains of references and of terminals, 42 to 47 KB, each another one, that overflow a stack or compile long."""
    _request(attacker, _policies(_deadly()), at_once=4, tokens=32, rate=rate)


def forced(attacker: Attacker, *, sessions: int, plain: bool = False) -> None:
    """Requests that the edge decodes, of one of two constants of 15,000 characters."""
    _request(attacker, _policies(repeat(None if plain else _FORCED)), at_once=sessions, tokens=_TEXT)


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


def worn(attacker: Attacker, *, sessions: int, plain: bool = False) -> None:
    """Requests that the edge decodes, of patterns whose lexer has more and more states."""
    grammars = cycle([None] if plain else _WORN)
    _request(attacker, _policies(grammars), at_once=sessions, tokens=_OBJECT_TOKENS)


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
        # Within the limits of a grammar's shape, but expensive.
        lines = "".join(f'A{each}: A{each + 1}+ "a"\n' for each in range(240))
        yield Grammar.lark(f'start: A0 "{number}"\n{lines}A240: "a"\n')


def _object(number: int) -> Grammar:
    schema = {"title": str(number), "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    return Grammar.json_schema(schema)


def _large(number: int) -> Grammar:
    properties = {f"{number}_{each}": {"type": "string"} for each in range(1900)}
    return Grammar.model_validate(
        {"kind": "json-schema", "text": json.dumps({"properties": properties}, separators=(",", ":"))}
    )


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
    identity: Identity
    policies: Iterator[SamplingPolicy]
    at_once: int
    tokens: int
    rate: float = float("inf")
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
                self._not_before = max(self._not_before, now - 1.0) + 1.0 / self.rate
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
        if not self.tokens:
            self._close(request)
            return
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
    rate: float = float("inf"),
    length: int = _SHORTEST,
) -> None:
    identity = attacker.place.identities[0]
    _run(
        attacker,
        [_Requests(attacker, identity, policies, at_once=at_once, tokens=tokens, rate=rate, length=length)],
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

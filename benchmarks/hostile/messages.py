"""Payloads of attacks: messages as our own encoder writes them, made unique by exchanging a few bytes."""

import random
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from schemas.codec import MAX_OPEN_BYTES, decode_reply, decode_verdict, encode_close, encode_draft, encode_open
from schemas.control import DeviceState, Presence, encode_json
from schemas.downlink import Dense, Samples, Sparse
from schemas.errors import CodecError
from schemas.fields import MAX_DRAFT, MAX_TOKENS, SESSION_BYTES
from schemas.messages import Close, Closed, Draft, Fault, Open, Opened, Verdict
from schemas.names import VERSION
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action, EndReason, Finish
from schemas.topics import Topic
from schemas.vocabulary import EMPTY_DIGEST, Vocabulary, extend_digest

DEFAULT_POLICY: Final = SamplingPolicy(mode=Mode.RESIDUAL, seed=1)

_MARK: Final = b"\xf3mark\xf3\xf3\xf3"  # in place of a session's name; nothing else in a message holds it
_HEAD_BYTES: Final = 1024  # what an Open has in addition to its tokens, generously
_WIDE: Final = 4  # bytes of a token id in a typed array, where one does not fit in two


def unique(payload: bytes) -> Iterator[bytes]:
    """Yield the payload of `open_of` or `close_of` repeatedly, each with a unique session name."""
    head, mark, tail = payload.partition(_MARK)
    assert mark
    while True:
        yield head + secrets.token_bytes(SESSION_BYTES) + tail


def open_of(
    vocabulary: Vocabulary,
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    resume: tuple[int, ...] | None = None,
    policy: SamplingPolicy = DEFAULT_POLICY,
    max_new_tokens: int = 4096,
    session: bytes = _MARK,
) -> bytes:
    """Return an Open; without a session's name, one for `unique`."""
    return encode_open(
        Open(
            session=session,
            vocabulary=vocabulary,
            draft_model="hostile",
            quantization="none",
            policy=policy,
            prompt=prompt,
            resume=resume,
            max_new_tokens=max_new_tokens,
        )
    )


def huge_open(vocabulary: Vocabulary, *, most: int = MAX_OPEN_BYTES) -> bytes:
    """Return a well-formed Open for `unique` of nearly the greatest size: prompt and output are all tokens."""
    wide = 1 << 16  # no id of the vocabulary, maybe, but a token id by its form
    prompt = min(MAX_TOKENS, (most - _HEAD_BYTES) // _WIDE)
    resume = max(0, min(MAX_TOKENS, (most - _HEAD_BYTES - _WIDE * prompt) // _WIDE))
    return open_of(vocabulary, prompt=(wide,) * prompt, resume=(wide,) * resume)


def close_of(*, session: bytes = _MARK, handle: int | None = None, edge: str | None = None) -> bytes:
    """Return a Close; without a session's name, one for `unique`."""
    return encode_close(
        Close(
            session=session,
            handle=handle,
            edge=edge,
            reason=EndReason.CANCELLED,
            tokens=0,
            digest=0,
            drafted=0,
            tested=0,
            accepted=0,
            rounds=0,
            uplink_bytes=0,
            downlink_bytes=0,
            draft_ms=0.0,
            wait_ms=0.0,
            wall_ms=0.0,
        )
    )


def random_draft(
    rng: random.Random, *, vocabulary: int, handle: int | None = None, epoch: int = 0, tokens: int = 5
) -> bytes:
    """Return a well-formed draft of random tokens, under a random handle unless one is given."""
    length = min(tokens, MAX_DRAFT)
    return encode_draft(
        Draft(
            handle=rng.randrange(1 << 16) if handle is None else handle,
            round=rng.randrange(1 << 32),
            epoch=epoch,
            base=rng.randrange(1 << 12),
            tokens=tuple(rng.randrange(vocabulary) for _ in range(length)),
            counts=(1,) * length,
            digest=rng.randrange(1 << 32),
        )
    )


def random_bytes(rng: random.Random, *, most: int = 200) -> bytes:
    return rng.randbytes(rng.randrange(1, most + 1))


def state_of(rng: random.Random) -> bytes:
    """Return a well-formed device state of a random software version."""
    return encode_json(
        DeviceState(
            presence=Presence.ONLINE,
            software=f"{VERSION}+{rng.randrange(1 << 32):08x}",
            draft_model="hostile",
            quantization="none",
            since=datetime.now(UTC),
        )
    )


_CERTAIN: Final = (
    1 << 16
)  # the count of a token that is said to be drawn for certain, so that it is nearly always rejected
_FLOAT32: Final = 4


@dataclass(slots=True)
class HostileSession:
    """One session, from the device's end."""

    session: bytes = field(default_factory=lambda: secrets.token_bytes(SESSION_BYTES))
    opened: Opened | None = None
    rejected: bool = False
    round: int = 0
    epoch: int = 0
    committed: int = 0
    digest: int = EMPTY_DIGEST
    fix: int | None = None
    unanswered: bytes | None = None
    _sent: tuple[int, ...] = ()

    def draft(self, rng: random.Random, *, vocabulary: int, tokens: int) -> Draft:
        """Return the next draft, of random tokens as long as the grant allows."""
        assert self.opened is not None
        length = max(0, min(tokens, self.opened.max_draft, self.opened.max_new_tokens - self.committed - 1))
        ends = self.opened.end_tokens  # behind one of them a draft does not go on
        drawn = (rng.randrange(vocabulary) for _ in range(length))
        self._sent = tuple(token for token in drawn if token not in ends)
        self.round += 1
        fix, self.fix = self.fix, None
        if fix is not None:
            self._commit((fix,))
            self.rejected = False
        return Draft(
            handle=self.opened.handle,
            round=self.round,
            epoch=self.epoch,
            base=self.committed,
            fix=fix,
            tokens=self._sent,
            counts=(_CERTAIN,) * len(self._sent),
            digest=self.digest,
        )

    def more_samples(self, tried: int) -> Draft:
        assert self.opened is not None
        self.round += 1
        return Draft(
            handle=self.opened.handle,
            round=self.round,
            epoch=self.epoch,
            base=self.committed,
            digest=self.digest,
            tried=tried,
        )

    def apply(self, verdict: Verdict) -> bool:
        """Apply a verdict; return whether the session continues."""
        if verdict.round != self.round:
            return True
        self.unanswered = None
        self._commit(self._sent[: verdict.accepted])
        following = verdict.next
        if isinstance(following, int):
            self._commit((following,))
        elif isinstance(following, Sparse | Samples):
            self._reject(following.ids)
        elif isinstance(following, Dense):
            self._reject(_likely(following.probs))
        return verdict.finish is Finish.NO

    def _reject(self, likely: Iterable[int]) -> None:
        ends = self.opened.end_tokens if self.opened is not None else ()
        self.rejected = True
        self.epoch += 1
        self.fix = next((token for token in likely if token not in ends), None)

    def _commit(self, tokens: tuple[int, ...]) -> None:
        self.committed += len(tokens)
        self.digest = extend_digest(self.digest, tokens)


@dataclass(slots=True)
class HostileSessions:
    """Several sessions of one device, each drafting as soon as it is answered."""

    vocabulary: Vocabulary
    policy: SamplingPolicy
    number: int
    tokens: int
    rng: random.Random
    send: Callable[[Topic, bytes], None]
    drafts: bool = True
    _by_name: dict[bytes, HostileSession] = field(default_factory=dict)
    _by_handle: dict[int, HostileSession] = field(default_factory=dict)

    def __iter__(self) -> Iterator[HostileSession]:
        return iter(list(self._by_handle.values()))

    def fill(self) -> None:
        """Open missing sessions, and repeat unanswered Opens, as a device does."""
        for _ in range(self.number - len(self._by_name)):
            session = HostileSession()
            self._by_name[session.session] = session
        for session in self._by_name.values():
            if session.opened is None:
                self.send(Topic.OPEN, open_of(self.vocabulary, policy=self.policy, session=session.session))
            elif session.unanswered is not None:
                self.send(Topic.DRAFT, session.unanswered)

    def take(self, topic: bytes, payload: bytes) -> None:
        try:
            if topic.endswith(b"/down/verdict"):
                self._judged(decode_verdict(payload))
            else:
                self._answered(payload)
        except CodecError:
            return

    def _answered(self, payload: bytes) -> None:
        reply = decode_reply(payload)
        if isinstance(reply, Opened):
            session = self._by_name.get(reply.session)
            if session is not None and session.opened is None:
                session.opened = reply
                self._by_handle[reply.handle] = session
                self._draft(session)
        elif isinstance(reply, Closed):
            self._forget(self._by_name.get(reply.session))
        elif isinstance(reply, Fault) and reply.handle is not None and reply.action is not Action.WAIT:
            self._forget(self._by_handle.get(reply.handle))

    def _judged(self, verdict: Verdict) -> None:
        session = self._by_handle.get(verdict.handle)
        if session is None or verdict.round != session.round:
            return
        if not session.apply(verdict):
            self.send(Topic.CLOSE, close_of(session=session.session, handle=verdict.handle))
            self._forget(session)
        elif self.drafts or not session.rejected:
            self._draft(session)

    def _draft(self, session: HostileSession) -> None:
        draft = session.draft(self.rng, vocabulary=self.vocabulary.size, tokens=self.tokens)
        session.unanswered = encode_draft(draft)
        self.send(Topic.DRAFT, session.unanswered)

    def _forget(self, session: HostileSession | None) -> None:
        if session is not None:
            self._by_name.pop(session.session, None)
            if session.opened is not None:
                self._by_handle.pop(session.opened.handle, None)


def _likely(probs: bytes) -> Iterator[int]:
    """Yield the tokens of a dense form whose probability is not zero."""
    zero = bytes(_FLOAT32)
    places = range(0, len(probs), _FLOAT32)
    return (place // _FLOAT32 for place in places if probs[place : place + _FLOAT32] != zero)

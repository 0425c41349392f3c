"""Payloads of attacks: messages as our own encoder writes them, made unique by exchanging a few bytes."""

import random
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from schemas.codec import MAX_OPEN_BYTES, encode_close, encode_draft, encode_open
from schemas.control import DeviceState, Presence, encode_json
from schemas.fields import MAX_DRAFT, MAX_TOKENS, SESSION_BYTES
from schemas.messages import Close, Draft, Open
from schemas.names import VERSION
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from schemas.vocabulary import Vocabulary

DEFAULT_POLICY: Final = SamplingPolicy(mode=Mode.RESIDUAL, seed=1)

_MARK: Final = b"\xf3mark\xf3\xf3\xf3"  # in place of a session's name; nothing else in a message holds it
_HEAD_BYTES: Final = 1024  # what an Open has in addition to its tokens, generously
_WIDE: Final = 4  # bytes of a token id in a typed array, where one does not fit in two


def unique(payload: bytes) -> Iterator[bytes]:
    """Yield the payload of `open_of` or `close_of` over and over, each time under a session's name of its own."""
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
    """Return an Open for `unique`, well-formed, of nearly the greatest size: its prompt and its text are all tokens."""
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
    """Return 1 to `most` random bytes."""
    return rng.randbytes(rng.randrange(1, most + 1))


def state_of(rng: random.Random) -> bytes:
    """Return a device's state, well-formed, of a random software version."""
    return encode_json(
        DeviceState(
            presence=Presence.ONLINE,
            software=f"{VERSION}+{rng.randrange(1 << 32):08x}",
            draft_model="hostile",
            quantization="none",
            since=datetime.now(UTC),
        )
    )

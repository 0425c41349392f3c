"""Structure-aware mutation: messages stay messages, and their fields change."""

import io
import json
import random
from collections.abc import Callable
from typing import Any, Final

import cbor2

from tests.fuzz.frames import MOST, Frame, pack, unpack

Bytes = Callable[[bytes], bytes]

_TAGS: Final = (69, 70, 85, 64, 1)
_LONG: Final = 1 << 9  # one of this many mutations makes something long
_INTEGERS: Final = (
    0, 1, 2, 5, 6, 7, 23, 24, 63, 64, 65, 255, 256, 1023, 65_535, 65_536, (1 << 17), (1 << 20) - 1, 1 << 20,
    (1 << 21), (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, -1, -(1 << 63),
)  # fmt: skip
_FLOATS: Final = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e308, float("inf"), float("nan"), 65_504.0, 1.000001)
_TEXTS: Final = (
    "", "open", "opened", "refused", "closed", "fault", "close", "busy", "draining", "over-quota", "quarantined",
    "stop", "length", "failed", "resume", "wait", "give-up", "residual", "coupled", "online", "offline", "a-new-word",
    "é", "x" * 41, "x" * 201, "x" * 501, "edge-1", "\x00", "\x1b[2J", "😀",
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    place = rng.randint(0, len(data))
    match rng.randrange(5):
        case 0:
            return data[:place] + rng.randbytes(rng.randint(1, 4)) + data[place:]
        case 1:
            return data[:place] + data[place + rng.randint(1, 4) :]
        case 2:
            return data[:place] + data[rng.randint(0, len(data)) :]
        case _:
            byte = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            return data[:place] + bytes([byte]) + data[place + 1 :]


def mutate_cbor(payload: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """Change one field of a message, or bytes if it cannot be decoded."""
    if rng.random() < 0.2:
        return plain(payload)
    try:
        value = cbor2.load(io.BytesIO(payload))
    except Exception:  # noqa: BLE001 - then it is bytes
        return plain(payload)
    try:
        return cbor2.dumps(_changed(value, rng))
    except Exception:  # noqa: BLE001 - the result may not be encodable
        return plain(payload)


def mutate_json(payload: bytes, rng: random.Random, plain: Bytes) -> bytes:
    """Change one field of a JSON document, or bytes if it cannot be decoded."""
    if rng.random() < 0.2:
        return plain(payload)
    try:
        value = json.loads(payload)
        return json.dumps(_changed(value, rng, binary=False), ensure_ascii=rng.random() < 0.5).encode(
            errors="surrogatepass"
        )
    except (ValueError, RecursionError):
        return plain(payload)


def mutate_frames(data: bytes, rng: random.Random, mutate: Callable[[Frame], Frame]) -> bytes:
    frames = unpack(data)
    match rng.randrange(10):
        case 0 if len(frames) > 1:
            del frames[rng.randrange(len(frames))]
        case 1 if frames and len(frames) < MOST:
            frames.insert(rng.randint(0, len(frames)), rng.choice(frames))
        case 2 if len(frames) > 1:
            one, other = rng.randrange(len(frames)), rng.randrange(len(frames))
            frames[one], frames[other] = frames[other], frames[one]
        case 3 if frames:
            place = rng.randrange(len(frames))
            frames[place] = frames[place]._replace(op=frames[place].op ^ (1 << rng.randrange(8)))
        case 4 if len(frames) < MOST:
            frames.insert(rng.randint(0, len(frames)), mutate(Frame(rng.randrange(256), b"")))
        case _:
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                if frames:
                    place = rng.randrange(len(frames))
                    frames[place] = mutate(frames[place])
    return pack(frames)


def cross_frames(data: bytes, other: bytes, rng: random.Random) -> bytes:
    head, tail = unpack(data), unpack(other)
    return pack([*head[: rng.randint(0, len(head))], *tail[rng.randint(0, len(tail)) :]])


def _changed(value: Any, rng: random.Random, *, binary: bool = True, depth: int = 0) -> Any:
    if depth < 8 and rng.random() < 0.85:
        if isinstance(value, list) and value:
            return _changed_list(value, rng, binary=binary, depth=depth)
        if isinstance(value, dict) and value:
            return _changed_map(value, rng, binary=binary, depth=depth)
        if isinstance(value, cbor2.CBORTag):
            return _changed_tag(value, rng)
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2, 256, -value, value))
    if isinstance(value, str) and value and rng.random() < 0.3:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(("", "\x00", "é", '"', "{", " ", "/", value)) + value[place + 1 :]
    return _fresh(rng, binary=binary)


def _changed_list(value: list[Any], rng: random.Random, *, binary: bool, depth: int) -> list[Any]:
    changed = list(value)
    place = rng.randrange(len(changed))
    match rng.randrange(12):
        case 0:
            del changed[place]
        case 1:
            changed.insert(place, _fresh(rng, binary=binary))
        case 2:
            changed.append(_fresh(rng, binary=binary))
        case 3:
            changed.insert(place, changed[place])
        case _:
            changed[place] = _changed(changed[place], rng, binary=binary, depth=depth + 1)
    return changed


def _changed_map(value: dict[Any, Any], rng: random.Random, *, binary: bool, depth: int) -> dict[Any, Any]:
    changed = dict(value)
    key = rng.choice(list(changed))
    match rng.randrange(12):
        case 0:
            del changed[key]
        case 1:
            changed[rng.choice(_TEXTS) if rng.random() < 0.9 else rng.choice(_INTEGERS)] = _fresh(rng, binary=binary)
        case 2:
            changed[key] = changed[rng.choice(list(changed))]
        case _:
            changed[key] = _changed(changed[key], rng, binary=binary, depth=depth + 1)
    return changed


def _changed_tag(tag: cbor2.CBORTag, rng: random.Random) -> cbor2.CBORTag:
    number, raw = tag.tag, tag.value
    if not isinstance(raw, bytes):
        return cbor2.CBORTag(number, b"")
    match rng.randrange(8):
        case 0:
            number = rng.choice(_TAGS)
        case 1:
            raw = raw[: rng.randint(0, len(raw))]
        case 2:
            raw += raw or b"\x01\x00"
        case 3 if rng.randrange(_LONG) == 0:
            raw = (raw or b"\x01\x00\x00\x00") * ((1 << 19) // max(1, len(raw)))
        case 4:
            raw += rng.randbytes(rng.choice((1, 2, 4, 8)))
        case 5:
            return cbor2.CBORTag(number, _fresh(rng))
        case _ if raw:
            place = rng.randrange(len(raw))
            byte = rng.choice((0, 1, 2, 5, 6, 127, 128, 255, rng.randrange(256)))
            raw = raw[:place] + bytes([byte]) + raw[place + 1 :]
    return cbor2.CBORTag(number, raw)


def _fresh(rng: random.Random, *, binary: bool = True) -> Any:
    return rng.choice(_BINARY if binary else _PLAIN)(rng)


def _long(rng: random.Random) -> Any:
    size = 1 << 16 if rng.randrange(_LONG) == 0 else 64
    return rng.choice(("x" * size, b"\x00" * size, [1] * size))


_PLAIN: Final[tuple[Callable[[random.Random], Any], ...]] = (
    lambda rng: rng.choice(_INTEGERS),
    lambda rng: rng.choice(_INTEGERS),
    lambda rng: rng.choice(_FLOATS),
    lambda rng: rng.choice(_TEXTS),
    lambda rng: rng.choice(_TEXTS),
    lambda rng: rng.choice((None, True, False)),
    lambda rng: [_fresh(rng, binary=False) for _ in range(rng.randrange(4))],
    lambda rng: {rng.choice(_TEXTS): _fresh(rng, binary=False) for _ in range(rng.randrange(3))},
)
_BINARY: Final = (
    *_PLAIN,
    lambda rng: rng.randbytes(rng.choice((0, 1, 4, 8, 8, 32))),
    lambda rng: cbor2.CBORTag(rng.choice(_TAGS), rng.randbytes(rng.choice((0, 2, 4, 8, 12)))),
    _long,
)

"""Frames: an input as a sequence of messages, each with a byte that says what to do with it."""

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

MOST: Final = 16
_HEAD: Final = struct.Struct(">BH")


class Frame(NamedTuple):
    """A message; `op` says what the target does with it, `payload` has at most 65,535 bytes."""

    op: int
    payload: bytes


def unpack(data: bytes) -> list[Frame]:
    """Decode any bytes to frames."""
    frames = []
    at = 0
    while at + _HEAD.size <= len(data) and len(frames) < MOST:
        op, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        frames.append(Frame(op, data[at : at + length]))
        at += length
    return frames


def pack(frames: Iterable[Frame]) -> bytes:
    return b"".join(_HEAD.pack(op, len(payload[:65_535])) + payload[:65_535] for op, payload in frames)

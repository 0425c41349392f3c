"""Messages between the parent and a grammar process: frames on a stream socket."""

import socket
import struct
from typing import Final, NamedTuple, Self

_LENGTH: Final = struct.Struct("=I")
_HEAD: Final = struct.Struct("=c?QII")
_NUMBERS: Final = struct.Struct("=ii")

MAX_FRAME: Final = 1 << 20
"""Bytes: more than the largest grammar with the longest generation."""

_READ: Final = 1 << 16


class Op:
    ALLOWED: Final = b"a"
    FORCED: Final = b"f"


class Status:
    """First byte of a reply.

    `DONE` is followed by the mask, or by what is forced; `OUTSIDE` by the number of tokens before the one that is not
    allowed; `FAILED` by the reason; `ENCODE` by text that the parent is to encode; `ENDED` by the exit code of the
    process, negative for a signal. `NOT_READY`: the answer would take long.
    """

    DONE: Final = b"="
    OUTSIDE: Final = b"?"
    FAILED: Final = b"!"
    ENCODE: Final = b"e"
    ENDED: Final = b"x"
    NOT_READY: Final = b"w"


class GrammarRequest(NamedTuple):
    """A question about a generation: which tokens may follow (`Op.ALLOWED`), or which must (`Op.FORCED`).

    Attributes:
        grammar: Kind and text of the grammar.
        tokens: All tokens of the generation, 4 bytes each.
        number: Names the generation, so that a process finds where it was.
        owner: Names the device, which shares the memory of the process with others.
    """

    op: bytes
    grammar: bytes
    tokens: bytes = b""
    number: int = 0
    owner: int = 0

    def encode(self, *, patient: bool) -> bytes:
        """Return the message; unless `patient`, the reply is `NOT_READY` if an answer would take long."""
        head = _HEAD.pack(self.op, patient, self.number, self.owner, len(self.grammar))
        return b"".join((head, self.grammar, self.tokens))

    @classmethod
    def decode(cls, message: bytes) -> tuple[Self, bool]:
        op, patient, number, owner, size = _HEAD.unpack_from(message)
        end = _HEAD.size + size
        return cls(op, message[_HEAD.size : end], message[end:], number, owner), patient


def numbers(status: bytes, first: int, second: int = 0) -> bytes:
    return status + _NUMBERS.pack(first, second)


def numbers_of(reply: bytes) -> tuple[int, int]:
    first, second = _NUMBERS.unpack_from(reply, 1)
    return int(first), int(second)


class Channel:
    """One end of a stream of frames. Every method raises OSError if the other end is gone or silent for too long."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._buffer = bytearray()

    def write_frame(self, payload: bytes) -> None:
        self.socket.sendall(_LENGTH.pack(len(payload)) + payload)

    def receive(self) -> bytes:
        while True:
            if len(self._buffer) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer)
                if length > MAX_FRAME:
                    raise ConnectionResetError
                end = _LENGTH.size + length
                if len(self._buffer) >= end:
                    frame = bytes(self._buffer[_LENGTH.size : end])
                    del self._buffer[:end]
                    return frame
            data = self.socket.recv(_READ)
            if not data:
                raise ConnectionResetError
            self._buffer += data

"""A broker that sends what the test specifies, also what no real one would."""

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

HOST = "127.0.0.1"

CONNECT, PUBLISH, SUBSCRIBE = 0x10, 0x30, 0x82


def connack(reason: int = 0, properties: bytes = b"") -> bytes:
    body = bytes([0, reason, len(properties)]) + properties
    return bytes([0x20, len(body)]) + body


def receive_maximum(value: int) -> bytes:
    return b"\x21" + struct.pack("!H", value)


def alias_maximum(value: int) -> bytes:
    return b"\x22" + struct.pack("!H", value)


def puback(identifier: int, reason: int = 0) -> bytes:
    return struct.pack("!BBHBB", 0x40, 4, identifier, reason, 0)


class ScriptedBroker:
    """Accepts connections, answers each CONNECT with `answer` and keeps the packets it gets.

    With `answer` None it never answers; with an empty one it hangs up; a function gets the CONNECT and returns the
    answer. It reads a packet only while `reading` is set.
    """

    def __init__(
        self, answer: bytes | Callable[[bytes], bytes] | None, *, reading: threading.Event | None = None
    ) -> None:
        self.answer = answer
        self._reading = reading
        self.packets: list[bytes] = []
        self._peers: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._peers):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def publishes(self) -> list[bytes]:
        return [packet for packet in self.packets if packet[0] & 0xF0 == PUBLISH]

    def identifiers(self) -> list[int]:
        found = []
        for packet in self.publishes():
            if packet[0] & 0x06:
                at = 2 + sum(1 for byte in itertools.takewhile(lambda byte: byte & 0x80, packet[1:]))
                at += 2 + int.from_bytes(packet[at : at + 2], "big")
                found.append(int.from_bytes(packet[at : at + 2], "big"))
        return found

    def send(self, packet: bytes) -> None:
        self._peers[-1].sendall(packet)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._peers.append(peer)
            thread = threading.Thread(target=self._serve, args=(peer,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as stream, contextlib.suppress(OSError):
            while head := stream.read(1):
                if self._reading is not None:
                    self._reading.wait()
                length, shift, raw = 0, 0, b""
                while True:
                    byte = stream.read(1)
                    if not byte or shift > 21:
                        return  # gone, or not MQTT: a length has four bytes at most
                    raw += byte
                    length |= (byte[0] & 0x7F) << shift
                    shift += 7
                    if not byte[0] & 0x80:
                        break
                self.packets.append(head + raw + stream.read(length))
                if head[0] == CONNECT and self.answer is not None:
                    answer = self.answer(self.packets[-1]) if callable(self.answer) else self.answer
                    if not answer:
                        return
                    peer.sendall(answer)

"""A client that never acknowledges messages, so that the broker has to queue."""

import socket
import struct
from typing import Self

HOST = "127.0.0.1"
PATIENCE_S = 10.0


class SlowClient:
    def __init__(self, port: int, name: str, topic_filter: str) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=PATIENCE_S)
        # CONNECT with a user name, a clean start and no keepalive; then SUBSCRIBE.
        self._send(0x10, _text("MQTT") + b"\x05\x82\x00\x00\x00" + _text(name) + _text(name))
        self._expect(0x20)
        self._send(0x82, b"\x00\x01\x00" + _text(topic_filter) + b"\x01")
        self._expect(0x90)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _send(self, head: int, body: bytes) -> None:
        assert len(body) < 128, "one byte of length is enough here"
        self._socket.sendall(bytes([head, len(body)]) + body)

    def _expect(self, head: int) -> None:
        got = self._socket.recv(1)
        assert got == bytes([head])
        length = self._socket.recv(1)[0]
        while length:
            length -= len(self._socket.recv(length))


def _text(value: str) -> bytes:
    return struct.pack("!H", len(value)) + value.encode()

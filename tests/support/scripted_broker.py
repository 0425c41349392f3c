"""A broker that sends what the test specifies, also what no real one would."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

from tests.support.mqtt_packets import IncomingPacket, PacketType, packet, split_packets

HOST = "127.0.0.1"


def connack(reason: int = 0, properties: bytes = b"") -> bytes:
    return packet(PacketType.CONNACK << 4, bytes([0, reason, len(properties)]) + properties)


def receive_maximum(value: int) -> bytes:
    return b"\x21" + struct.pack("!H", value)


def alias_maximum(value: int) -> bytes:
    return b"\x22" + struct.pack("!H", value)


def puback(identifier: int, reason: int = 0) -> bytes:
    return struct.pack("!BBHBB", 0x40, 4, identifier, reason, 0)


class ScriptedBroker:
    """Accepts connections, answers each CONNECT with `answer` and keeps the packets it gets.

    With `answer` None it never answers; with an empty one it hangs up; a function gets the CONNECT's body and returns
    the answer. It reads only while `reading` is set.
    """

    def __init__(
        self, answer: bytes | Callable[[bytes], bytes] | None, *, reading: threading.Event | None = None
    ) -> None:
        self.answer = answer
        self._reading = reading
        self.packets: list[IncomingPacket] = []
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

    def publishes(self) -> list[IncomingPacket]:
        return [each for each in self.packets if each.kind == PacketType.PUBLISH]

    def identifiers(self) -> list[int]:
        return [found for each in self.publishes() if (found := each.publish()[1]) is not None]

    def send(self, packets: bytes) -> None:
        self._peers[-1].sendall(packets)

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
        received = bytearray()
        with peer, contextlib.suppress(OSError, ValueError):  # gone, or not MQTT
            while data := self._read(peer):
                received += data
                for each in split_packets(received):
                    self.packets.append(each)
                    if each.kind == PacketType.CONNECT and self.answer is not None:
                        answer = self.answer(each.body) if callable(self.answer) else self.answer
                        if not answer:
                            return
                        peer.sendall(answer)

    def _read(self, peer: socket.socket) -> bytes:
        if self._reading is not None:
            self._reading.wait()
        return peer.recv(1 << 13)

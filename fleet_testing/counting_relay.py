"""Counting relay: passes TCP on and counts the bytes: TLS records and MQTT packets, heads included."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

__all__ = ["CountingRelay"]

HOST = "127.0.0.1"
CHUNK = 1 << 16


class CountingRelay:
    """Passes one connection after another on to a port of this machine.

    Attributes:
        port: Where it listens.
        up: Bytes from clients to the port.
        down: Bytes from the port to clients.
    """

    def __init__(self, target: int) -> None:
        self.up = 0
        self.down = 0
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, socket.create_connection((HOST, self._target)) as server:
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=self._pass_down, args=(server, client), daemon=True)
                back.start()
                while data := _received(client):
                    self.up += len(data)
                    server.sendall(data)
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                back.join()

    def _pass_down(self, server: socket.socket, client: socket.socket) -> None:
        while data := _received(server):
            self.down += len(data)
            with contextlib.suppress(OSError):
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(CHUNK)
    except OSError:
        return b""

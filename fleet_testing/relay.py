"""TCP relay for tests and benchmarks: counts bytes, delays them, and ends connections as a dead network would."""

import contextlib
import queue
import socket
import threading
import time
from typing import Final, Self

__all__ = ["Relay"]

HOST: Final = "127.0.0.1"
CHUNK: Final = 1 << 16


class Relay:
    """Listens on a free port and passes every connection on to a port of this machine.

    Args:
        target: The port.
        round_trip_s: What is passed on arrives half of this later, in order, and as fast as it came.

    Attributes:
        port: Where it listens.
        up: Bytes that came from clients.
        down: Bytes that came from the target.
    """

    def __init__(self, target: int, *, round_trip_s: float = 0.0) -> None:
        self.up = 0
        self.down = 0
        self._target = target
        self._way_s = round_trip_s / 2
        self._refusing = threading.Event()
        self._swallowing = threading.Event()
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, name="relay", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """End all connections now, without a goodbye; new ones are passed on."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            _end(sock)
        self._swallowing.clear()

    def swallow(self) -> None:
        """Take what clients send and lose it, until the next `cut`."""
        self._swallowing.set()

    def hold(self) -> None:
        """Take nothing more from the target until `release`, as behind a line that is full: its queues fill up."""
        self._flowing.clear()

    def release(self) -> None:
        """Take from the target again."""
        self._flowing.set()

    def isolate(self) -> None:
        """End all connections, and new ones as they come."""
        self._refusing.set()
        self.cut()

    def reunite(self) -> None:
        """Pass connections on again."""
        self._refusing.clear()

    def close(self) -> None:
        """Stop listening and end everything."""
        _end(self._listener)  # wakes the acceptor
        self._acceptor.join()
        self._listener.close()
        self.release()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = None
            if not self._refusing.is_set():
                with contextlib.suppress(OSError):
                    server = socket.create_connection((HOST, self._target))
            if server is None:
                client.close()
                continue
            thread = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [client, server]
            back = threading.Thread(target=self._pass_down, args=(server, client), daemon=True)
            back.start()
            way = _Way(server, self._way_s)
            while data := _received(client):
                self.up += len(data)
                if not self._swallowing.is_set():
                    way.send(data)
            way.end()
            back.join()

    def _pass_down(self, server: socket.socket, client: socket.socket) -> None:
        way = _Way(client, self._way_s)
        while data := _received(server):
            self._flowing.wait()
            self.down += len(data)
            way.send(data)
        way.end()


class _Way:
    """One direction of a connection."""

    def __init__(self, sink: socket.socket, way_s: float) -> None:
        self._sink = sink
        self._way_s = way_s
        self._under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if way_s:
            self._thread = threading.Thread(target=self._arrive, daemon=True)
            self._thread.start()

    def send(self, data: bytes) -> None:
        """Pass data on; empty data is the end."""
        if self._thread is None:
            self._deliver(data)
        else:
            self._under_way.put((time.monotonic() + self._way_s, data))

    def end(self) -> None:
        """Pass the end on, behind all that is under way."""
        self.send(b"")
        if self._thread is not None:
            self._thread.join()

    def _arrive(self) -> None:
        data = b"-"
        while data:
            at, data = self._under_way.get()
            time.sleep(max(0.0, at - time.monotonic()))
            self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        if not data:
            _end(self._sink)
            return
        with contextlib.suppress(OSError):  # the other direction may have ended the connection already
            self._sink.sendall(data)


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(CHUNK)
    except OSError:
        return b""


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

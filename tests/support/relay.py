"""TCP relay for tests and benchmarks: counts and delays bytes, and ends connections as a dead network does."""

import contextlib
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final, Self

HOST: Final = "127.0.0.1"
CHUNK: Final = 1 << 16
AHEAD_S: Final = 0.1
"""Buffer of a narrow line, at least MIN_AHEAD bytes: data beyond it is not acknowledged, as on a real slow line."""
MIN_AHEAD: Final = 4096
_SEGMENTS: Final = struct.Struct("=136xII")  # of Linux's tcp_info: segments sent and received, acknowledgements too
RETRANSMISSION_S: Final = (0.2, 0.6)
"""Delay of a lost segment: TCP repeats it after 0.2 s, or after 0.4 s more if it is lost again."""


class Relay:
    """Listens on a free port and forwards every connection to a port of this machine."""

    def __init__(
        self,
        target: int,
        *,
        round_trip_s: float = 0.0,
        bytes_per_s: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
        self.up = 0
        self.down = 0
        self.round_trip_s = round_trip_s
        self._bytes_per_s = bytes_per_s
        self.loss = 0.0
        self._target = target
        self._rng = rng or random.Random(0)
        self._refusing = threading.Event()
        self._swallowing = threading.Event()
        self._rising = threading.Event()
        self._flowing = threading.Event()
        self.release()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((HOST, 0))
        self._narrow(self._listener)
        self.port = int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, name="relay", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def segments(self) -> tuple[int, int]:
        """Return the TCP segments of live connections, from clients and to them; Linux only.

        Pure acknowledgements are included.
        """
        up, down = 0, 0
        with self._lock:
            clients = self._sockets[::2]
        for sock in clients:
            sent, received = _SEGMENTS.unpack_from(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SEGMENTS.size))
            up, down = up + received, down + sent
        return up, down

    def cut(self) -> None:
        """End all connections without a goodbye; new ones are forwarded."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            _end(sock)
        self._swallowing.clear()

    def swallow(self) -> None:
        """Read and discard what clients send until the next `cut`."""
        self._swallowing.set()

    def hold(self) -> None:
        """Read nothing from the target until `release`, as behind a full line: its queues fill up."""
        self._flowing.clear()

    def stall(self) -> None:
        """Read nothing from either side until `release`, as on a dead line: nobody is notified."""
        self._rising.clear()
        self._flowing.clear()

    def release(self) -> None:
        self._rising.set()
        self._flowing.set()

    def isolate(self) -> None:
        """End all connections, and new ones as they arrive."""
        self._refusing.set()
        self.cut()

    def reunite(self) -> None:
        self._refusing.clear()

    def close(self) -> None:
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
                    server = self._connected()
            if server is None:
                client.close()
                continue
            thread = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _connected(self) -> socket.socket:
        server = socket.socket()
        try:
            self._narrow(server)
            server.connect((HOST, self._target))
        except OSError:
            server.close()
            raise
        return server

    def _narrow(self, sock: socket.socket) -> None:
        """Let an unconnected socket buffer little before a narrow line; accepted sockets inherit that."""
        if self._bytes_per_s:
            ahead = max(MIN_AHEAD, round(AHEAD_S * self._bytes_per_s))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ahead)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [client, server]
            back = threading.Thread(target=self._pass_down, args=(server, client), daemon=True)
            back.start()
            way = _Way(server, self._delay_s, self._bytes_per_s)
            while data := _received(client):
                self._rising.wait()
                self.up += len(data)
                if not self._swallowing.is_set():
                    way.send(data)
            way.end()
            back.join()

    def _pass_down(self, server: socket.socket, client: socket.socket) -> None:
        way = _Way(client, self._delay_s, self._bytes_per_s)
        while data := _received(server):
            self._flowing.wait()
            self.down += len(data)
            way.send(data)
        way.end()

    def _delay_s(self) -> float:
        lost = self.loss > 0.0 and self._rng.random() < self.loss
        return self.round_trip_s / 2 + (self._rng.uniform(*RETRANSMISSION_S) if lost else 0.0)


class _Way:
    def __init__(self, sink: socket.socket, delay_s: Callable[[], float], bytes_per_s: float) -> None:
        self._sink = sink
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, data: bytes) -> None:
        """Forward data, no sooner than a narrow line has nearly room for it; empty data is the end."""
        if self._bytes_per_s:
            time.sleep(max(0.0, self._free_at - time.monotonic() - AHEAD_S))
        delay_s = (self._delay_s() + self._leaving_s(len(data))) if data else 0.0
        if self._thread is None:
            if not delay_s:
                self._deliver(data)
                return
            # From the first delay on all data goes through the queue, which keeps the order.
            self._thread = threading.Thread(target=self._arrive, daemon=True)
            self._thread.start()
        self._under_way.put((time.monotonic() + delay_s, data))

    def _leaving_s(self, size: int) -> float:
        if not self._bytes_per_s:
            return 0.0
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + size / self._bytes_per_s
        return self._free_at - now

    def end(self) -> None:
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

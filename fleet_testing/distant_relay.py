"""Delaying relay: passes TCP on as late as one likes, in order, and as fast as it came."""

import contextlib
import queue
import socket
import threading
import time
from typing import Final, Self

__all__ = ["DistantRelay"]

HOST: Final = "127.0.0.1"
CHUNK: Final = 1 << 16


class DistantRelay:
    """Passes connections on to a port of this machine.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, target: int, *, round_trip_s: float) -> None:
        self._target = target
        self._way_s = round_trip_s / 2
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening; connections end with their clients."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection((HOST, self._target))
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            back = threading.Thread(target=self._one_way, args=(server, client), daemon=True)
            back.start()
            self._one_way(client, server)
            back.join()

    def _one_way(self, source: socket.socket, sink: socket.socket) -> None:
        under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        arrival = threading.Thread(target=self._arrive, args=(under_way, sink), daemon=True)
        arrival.start()
        data = b"-"
        while data:
            data = _received(source)
            under_way.put((time.monotonic() + self._way_s, data))
        arrival.join()

    @staticmethod
    def _arrive(under_way: "queue.SimpleQueue[tuple[float, bytes]]", sink: socket.socket) -> None:
        while True:
            at, data = under_way.get()
            time.sleep(max(0.0, at - time.monotonic()))
            with contextlib.suppress(OSError):  # the other way may have ended the connection already
                sink.sendall(data) if data else sink.shutdown(socket.SHUT_RDWR)
            if not data:
                return


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(CHUNK)
    except OSError:
        return b""

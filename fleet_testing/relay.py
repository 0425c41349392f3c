"""TCP relay that tests cut, so that a connection ends as if a machine or a network had died."""

import contextlib
import socket
import threading
from typing import Self

HOST = "127.0.0.1"
CHUNK = 1 << 16


class Relay:
    """Listens on a free port and passes every connection on to the port `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._refusing = threading.Event()
        self._swallowing = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
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
                    server = socket.create_connection((HOST, self.target))
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
            back = threading.Thread(target=_copy, args=(server, client, threading.Event()), daemon=True)
            back.start()
            _copy(client, server, self._swallowing)
            back.join()


def _copy(source: socket.socket, sink: socket.socket, swallowing: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            if not swallowing.is_set():
                sink.sendall(data)
    _end(source)
    _end(sink)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

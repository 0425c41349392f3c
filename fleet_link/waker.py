"""A file descriptor that other threads make readable, to end a wait."""

import contextlib
import socket

__all__ = ["Waker"]


class Waker:
    """Wakes a thread that polls."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(0)
        self._sender.settimeout(0)

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._receiver.fileno()

    def wake(self) -> None:
        """Make the descriptor readable; callable from any thread, also after `close`."""
        # A full buffer means that a wake-up is already due, a closed one that nobody waits.
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def clear(self) -> None:
        """Make the descriptor unreadable until the next `wake`."""
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def close(self) -> None:
        """Free the descriptors."""
        self._receiver.close()
        self._sender.close()

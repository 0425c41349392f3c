"""Waits for a connection's socket or for another thread, whichever has something first."""

import contextlib
import fcntl
import select
import socket
import struct
import termios
from typing import Any, Final


class Waker:
    """Wakes a thread that polls."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(0)
        self._sender.settimeout(0)
        self._poll = select.poll()
        self._poll.register(self._receiver, select.POLLIN)
        self._due = False  # a wake-up is under way: one is enough for any number of reasons

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._receiver.fileno()

    def wake(self) -> None:
        """Make the descriptor readable; callable from any thread, also after `close`."""
        if self._due:
            return
        self._due = True
        with contextlib.suppress(OSError):  # closed: nobody waits
            self._sender.send(b"\0")

    def clear(self) -> None:
        """Make the descriptor unreadable until the next `wake`. What was to be told must be looked at after it."""
        with contextlib.suppress(BlockingIOError):
            self._receiver.recv(4096)
        self._due = False

    def wait(self, timeout_s: float) -> bool:
        """Wait for a `wake`, and clear it; False if none came in time."""
        woken = bool(self._poll.poll(1000 * timeout_s))
        if woken:
            self.clear()
        return woken

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


MAX_POLL_S: Final = 1.0  # keepalive is checked at least this often


def wait(sock: Any, waker: Waker, *, reading: bool, writing: bool, timeout_s: float) -> tuple[bool, bool]:  # noqa: ANN401
    """Return whether the socket can be read from, and whether written to.

    Unlike `select`, `poll` takes descriptors above 1023.

    Args:
        sock: With a descriptor.
        waker: Ends the wait early, and is cleared.
        reading: Whether to wait for something to read.
        writing: Whether there is something to write.
        timeout_s: Longest wait.
    """
    poll = select.poll()
    wanted = (select.POLLIN if reading else 0) | (select.POLLOUT if writing else 0)
    if wanted:
        poll.register(sock, wanted)
    poll.register(waker, select.POLLIN)
    events = dict(poll.poll(1000 * max(0.0, min(timeout_s, MAX_POLL_S))))
    if waker.fileno() in events:
        waker.clear()
    ready = events.get(sock.fileno(), 0)
    return reading and bool(ready & ~select.POLLOUT), bool(ready & select.POLLOUT)


def has_arrived(sock: Any) -> bool:  # noqa: ANN401 - paho's
    """Return whether all that was written to a socket has reached the other machine; True where no system tells."""
    try:
        (left,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
    except OSError:
        return True
    return bool(left == 0)

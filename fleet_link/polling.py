"""Waiting for a connection's socket or for another thread, whichever has something first."""

import select
from typing import Any, Final

from fleet_link.waker import Waker

__all__ = ["MAX_POLL_S", "wait"]

MAX_POLL_S: Final = 1.0  # keepalive is checked at least this often


def wait(sock: Any, waker: Waker, *, writing: bool, timeout_s: float) -> tuple[bool, bool]:  # noqa: ANN401 - paho's
    """Return whether the socket can be read from, and whether written to.

    Unlike `select`, `poll` takes descriptors above 1023.

    Args:
        sock: Plain or TLS.
        waker: Ends the wait early, and is cleared.
        writing: Whether there is something to write.
        timeout_s: Longest wait.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if writing else 0))
    poll.register(waker, select.POLLIN)
    # What TLS has decrypted already makes no descriptor readable.
    pending = bool(getattr(sock, "pending", int)())
    events = dict(poll.poll(0 if pending else 1000 * max(0.0, min(timeout_s, MAX_POLL_S))))
    if waker.fileno() in events:
        waker.clear()
    ready = events.get(sock.fileno(), 0)
    return pending or bool(ready & ~select.POLLOUT), bool(ready & select.POLLOUT)

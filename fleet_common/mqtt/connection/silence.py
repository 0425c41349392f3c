"""Silence on a connection: whether the broker's machine, and the way to it, are still there.

A machine that loses its power says no goodbye, nor does a router that forgets a connection: nothing comes any more,
and nothing else happens. Each side sends a ping where it has heard nothing for a keepalive, and the broker gives a
client up after one and a half (MQTT 5, 3.1.2.10). Here the client does likewise. The MQTT library alone would wait for
two.
"""

from collections.abc import Callable
from typing import Final

# In keepalives. The library asks after one: usually its ping is answered, and ours is not needed.
ASK: Final = 1.1
GIVE_UP: Final = 1.5


class Silence:
    """Watches one connection. Belongs to the link's thread.

    Time in which nobody looked counts for nothing beyond the question: a process that was stopped for a while first has
    to see what has come meanwhile, and to ask.

    Args:
        keepalive_s: As agreed with the broker; 0 for none.
        clock: Monotonic seconds.
    """

    def __init__(self, keepalive_s: float, *, clock: Callable[[], float]) -> None:
        self._keepalive_s = keepalive_s
        self._clock = clock
        self._received = -1
        self._since = clock()
        self._asked_at: float | None = None

    def asks(self, received: int) -> bool:
        """Take how many bytes have come so far; return whether the broker is to be asked now if it is there."""
        now = self._clock()
        if received != self._received or not self._keepalive_s:
            self._received, self._since, self._asked_at = received, now, None
        elif self._asked_at is None and now - self._since >= ASK * self._keepalive_s:
            self._asked_at = now
            return True
        return False

    @property
    def given_up(self) -> bool:
        """Whether the answer has been missing for too long."""
        patience_s = (GIVE_UP - ASK) * self._keepalive_s
        return self._asked_at is not None and self._clock() - self._asked_at >= patience_s

    @property
    def lasts_s(self) -> float:
        return self._clock() - self._since

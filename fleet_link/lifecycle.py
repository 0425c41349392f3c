"""Life of a link across connections: reconnect back-off, the wait for the first one, who is told of changes."""

import random
import threading

from fleet_link.counters import Guard
from fleet_link.errors import ConnectFailed
from fleet_link.link import Listener

__all__ = ["Backoff", "Connectivity", "Startup"]

GROWTH = 2.0


class Backoff:
    """Exponential delays with jitter.

    A fleet that lost its broker must not come back as one: each delay is drawn evenly from the upper half
    of the exponential step, so that two clients soon differ, and none returns at once.
    """

    def __init__(self, *, minimum_s: float, maximum_s: float, rng: random.Random) -> None:
        self._minimum_s = minimum_s
        self._maximum_s = maximum_s
        self._rng = rng
        self._step_s = minimum_s

    def next_delay_s(self) -> float:
        """Return the next delay; the one after it is about twice as long, up to the maximum."""
        step_s = self._step_s
        self._step_s = min(self._step_s * GROWTH, self._maximum_s)
        return self._rng.uniform(step_s / 2, step_s)

    def reset(self) -> None:
        """Begin again with the minimum: a connection has held."""
        self._step_s = self._minimum_s


class Startup:
    """Told by the link's thread, waited for by whoever started it. One for every start."""

    def __init__(self) -> None:
        self._settled = threading.Event()
        self._connected = False
        self._failure: ConnectFailed | None = None

    @property
    def pending(self) -> bool:
        """Whether no attempt has succeeded yet."""
        return not self._connected

    def connected(self) -> None:
        """An attempt has succeeded."""
        self._connected = True
        self._settled.set()

    def failed(self, error: ConnectFailed) -> None:
        """An attempt has failed; the last word if trying again is pointless."""
        self._failure = error
        if error.final:
            self._settled.set()

    def ended(self) -> None:
        """There will be no further attempt."""
        self._settled.set()

    def wait(self, timeout_s: float, otherwise: ConnectFailed) -> None:
        """Return when connected.

        Args:
            timeout_s: Longest wait.
            otherwise: What to raise if not even one attempt has come to an end.

        Raises:
            ConnectFailed: What the last attempt died of.
        """
        self._settled.wait(timeout_s)
        if not self._connected:
            raise self._failure if self._failure is not None else otherwise


class Connectivity:
    """Changed on the link's thread, read from any."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._listeners: tuple[Listener, ...] = ()
        self.online = False

    def listen(self, listener: Listener) -> None:
        """Tell `listener` from now on."""
        self._listeners = (*self._listeners, listener)

    def up(self) -> None:
        """A connection was made."""
        self._guard.counters.connects += 1
        self.online = True
        self._tell(online=True)

    def down(self, *, on_purpose: bool) -> None:
        """A connection has ended; a goodbye is no loss."""
        if self.online:
            self.online = False
            if not on_purpose:
                self._guard.counters.losses += 1
                self._tell(online=False)

    def _tell(self, *, online: bool) -> None:
        for listener in self._listeners:
            self._guard.call(listener, online)

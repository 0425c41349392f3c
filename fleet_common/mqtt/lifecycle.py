"""Life of a link across connections: reconnect back-off, the wait for the first one, who is told of changes."""

import random
import threading
from typing import Final

from fleet_common.mqtt.counters import Guard
from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.link import Listener

GROWTH: Final = 2.0
FORGIVEN_S: Final = 1.0  # connected for so long takes back one step of growth


class Backoff:
    """Exponential delays with full jitter, and a low ceiling.

    A broker that is back must be found within seconds, however long it was away, so the ceiling is low: to knock at a
    machine where nobody listens costs both sides next to nothing. Only a broker that works and turns us away is left
    alone for longer: its refusals cost it work, and most need somebody's hand.

    A fleet that lost its broker must not come back as one: each delay is drawn evenly from zero to the step, which
    spreads the fleet over the whole of it.

    Args:
        minimum_s: The first step.
        maximum_s: The longest, while the broker does not answer.
        refused_s: The longest, while it turns us away.
        rng: Draws the delays.
    """

    def __init__(self, *, minimum_s: float, maximum_s: float, refused_s: float, rng: random.Random) -> None:
        self._minimum_s = minimum_s
        self._maximum_s = maximum_s
        self._refused_s = max(maximum_s, refused_s)
        self._rng = rng
        self._step_s = minimum_s

    def next_delay_s(self, *, refused: bool = False) -> float:
        """Return the next delay; the step of the one after it is twice as long, up to the ceiling.

        Args:
            refused: Whether the last attempt ended with a broker's refusal.
        """
        ceiling_s = self._refused_s if refused else self._maximum_s
        step_s = min(self._step_s, ceiling_s)
        self._step_s = min(step_s * GROWTH, ceiling_s)
        return self._rng.uniform(0.0, step_s)

    def held(self, lived_s: float) -> None:
        """Take back what the delays have grown by, in proportion to how long a connection has held (seconds)."""
        self._step_s = max(self._minimum_s, self._step_s * GROWTH ** (-lived_s / FORGIVEN_S))


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
        self._listeners = (*self._listeners, listener)

    def up(self) -> None:
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

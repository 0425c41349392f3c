"""Courier: brings alerts to whoever is to be told, each on a thread of its own, again until it is taken.

A receiver that is away delays nobody but itself. What waits for it is bounded, and the oldest is dropped first: the
latest says more about what is wrong now.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from fleet_admin.alerts.errors import DeliveryFailed
from schemas.control import Alert

__all__ = ["Channel", "Courier"]

_log = logging.getLogger(__name__)

_MOST_WAITING: Final = 1000
_ATTEMPTS: Final = 20
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 300.0


class Channel(Protocol):
    """Somebody who is told of alerts."""

    @property
    def name(self) -> str:
        """For the log."""

    def send(self, alert: Alert) -> None:
        """Tell. May block for seconds.

        Raises:
            DeliveryFailed: It was not taken; it may be the next time.
        """


@dataclass(slots=True)
class _Waiting:
    alert: Alert
    attempts: int = 0


class _Round:
    """One channel, and what waits for it."""

    def __init__(self, channel: Channel, pause: Callable[[float], bool]) -> None:
        self.channel = channel
        self._pause = pause
        self._waiting: deque[_Waiting] = deque(maxlen=_MOST_WAITING)
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, alert: Alert) -> None:
        with self._changed:
            if len(self._waiting) == _MOST_WAITING:
                _log.error("Alerts for %s are dropped: it has not taken any for long.", self.channel.name)
            self._waiting.append(_Waiting(alert))
            self._changed.notify()

    def end(self, timeout_s: float) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                waiting = self._waiting.popleft()
            try:
                self.channel.send(waiting.alert)
            except DeliveryFailed as error:
                self._again(waiting, error)
            except Exception:  # noqa: BLE001 - logged with its traceback
                _log.exception("An alert could not be told to %s.", self.channel.name)

    def _again(self, waiting: _Waiting, error: DeliveryFailed) -> None:
        waiting.attempts += 1
        if waiting.attempts >= _ATTEMPTS or self._ended:
            _log.error("The alert %s is told no more: %s", waiting.alert.id, error)
            return
        if waiting.attempts == 1:
            _log.warning("The alert %s will be told again: %s", waiting.alert.id, error)
        with self._changed:
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.appendleft(waiting)
        self._pause(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (waiting.attempts - 1)))


class Courier:
    """Tells all channels of every alert.

    Args:
        channels: Who is told.
        pause: Waits for so many seconds before the next attempt, or until the end; a test need not.
    """

    def __init__(self, channels: Iterable[Channel], *, pause: Callable[[float], bool] | None = None) -> None:
        self._ending = threading.Event()
        self._rounds = [_Round(channel, pause or self._ending.wait) for channel in channels]
        for each in self._rounds:
            each.start()

    def tell(self, alert: Alert) -> None:
        """Have an alert told. Never blocks; from any thread."""
        for each in self._rounds:
            each.put(alert)

    def close(self, timeout_s: float = 5.0) -> None:
        """Make a last attempt at what waits, and end."""
        self._ending.set()
        for each in self._rounds:
            each.end(timeout_s)

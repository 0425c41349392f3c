"""Unconfirmed Closes: kept until an edge confirms that the end of a text is recorded, and said again meanwhile.

An edge answers a Close once its session log cannot lose it any more. One that dies before that leaves a session open in
the log, which only its device can end: it says how the session ended to whichever edge is there next.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.client.inbox import EdgeStateChanged, Event
from schemas.control import Presence
from schemas.messages import Close, Closed

_MOST: Final = 8
_REPEATS: Final = 20
"""How often a Close is said again: an edge that never confirms is not to be asked without end."""


@dataclass(slots=True)
class UnconfirmedCloses:
    """The Closes of one device that no edge has confirmed; of too many, the oldest are forgotten.

    Attributes:
        send: Sends a Close to all edges; never blocks.
    """

    send: Callable[[Close], None]
    _closes: dict[bytes, Close] = field(default_factory=dict)
    _repeats: dict[bytes, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._closes)

    def keep(self, close: Close) -> None:
        """Keep a Close that was sent, and not confirmed while its text waited for that."""
        with self._lock:
            # Whichever edge has it by then, or none: the one that it was meant for may never be back.
            self._closes[close.session] = close.model_copy(update={"edge": None, "handle": None})
            self._repeats[close.session] = 0
            while len(self._closes) > _MOST:
                self._forget(next(iter(self._closes)))

    def on_event(self, event: Event) -> None:
        """Forget what an edge confirms; say all again when an edge is there. Callable from any thread.

        That an edge is there is also heard, once for each edge, after every reconnect.
        """
        match event:
            case Closed(session=session):
                with self._lock:
                    self._forget(session)
            case EdgeStateChanged(presence=Presence.ONLINE):
                self.repeat()

    def repeat(self) -> None:
        with self._lock:
            closes = list(self._closes.values())
            for close in closes:
                self._repeats[close.session] += 1
                if self._repeats[close.session] >= _REPEATS:
                    self._forget(close.session)
        for close in closes:
            self.send(close)

    def _forget(self, session: bytes) -> None:
        self._closes.pop(session, None)
        self._repeats.pop(session, None)

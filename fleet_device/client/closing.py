"""The end of a session: its Close, why it failed, and the wait for the edge's last message."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.client.inbox import ConnectionChanged, EdgeStateChanged, Event
from fleet_device.client.outbound import Outbound
from fleet_device.errors import SessionRefused
from fleet_device.session.machine import DeviceSession
from schemas.bounds import MAX_CODE, MAX_SENTENCE
from schemas.control import Presence
from schemas.errors import FleetError
from schemas.messages import Close, Closed
from schemas.printable import printable_line
from schemas.reasons import EndReason

_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")

_UNFINISHED: Final = {"code": "process-ended", "sentence": "The device's program ended while the text was written."}


@dataclass(slots=True)
class Closing:
    """The end of one session.

    Attributes:
        session: The state machine.
        outbound: To the edge.
        clock: Monotonic seconds.
        started: When the session began.
        failure: What has ended the session early.
        sent: The last Close that was sent, or is to be sent to whichever edge comes next.
        answer: The edge's last message.
        done: Whether there is nothing more to do.
    """

    session: DeviceSession
    outbound: Outbound
    clock: Callable[[], float]
    started: float = field(init=False)
    failure: BaseException | None = None
    sent: Close | None = None
    answer: Closed | None = None
    done: bool = False
    _until: float | None = None  # the answer is awaited until then

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def begun(self) -> bool:
        """Whether the session has ended, and only its last messages are left."""
        return self._until is not None

    @property
    def left_s(self) -> float:
        """Seconds for which the answer is still awaited."""
        return 0.0 if self._until is None else max(0.0, self._until - self.clock())

    def begin(self, *, within_s: float) -> None:
        """Close the session, and wait for the edge's answer.

        Args:
            within_s: Longest wait for it.
        """
        if self.session.text.unverified and self.session.opened is None:
            self.sent, self.done = self._close_to_any(), True  # the agent keeps it until an edge is there
            self._until = self.clock()
            return
        if self.session.asked:
            self.send()
        self._until = self.clock() + within_s
        # Cancelled before any edge took it? One that does later finds the Close behind the Open.
        self.done = not self.session.granted

    def fail(self, error: BaseException) -> None:
        """End the session because of an error, unless it has ended, and say so to the edge that may have it."""
        if self.begun:
            return
        self.failure = error
        self.session.cancel(EndReason.CANCELLED if isinstance(error, KeyboardInterrupt) else EndReason.FAILED)
        refused = isinstance(error, SessionRefused)
        if self.session.granted or self.session.text.unverified or (self.session.asked and not refused):
            self.send()  # also if no edge has answered: one may yet take the Open that was sent

    def send(self, *, to_any: bool = False) -> None:
        """Send a Close.

        Args:
            to_any: The edge that had the session went away before it answered: another one is to record its end.
        """
        self.sent = self._close_to_any() if to_any else self._close()
        self.outbound.close(self.sent)

    def on_event(self, event: Event) -> None:
        """Handle what arrives after the end."""
        opened = self.session.opened
        match event:
            case Closed() if self.session.concerns(event):
                self.answer, self.done = event, True
            case ConnectionChanged(up=True):
                self.send()
            case EdgeStateChanged(edge=edge, presence=Presence.OFFLINE) if opened is not None and edge == opened.edge:
                self.send(to_any=True)
            case _:
                pass

    def on_quiet(self) -> None:
        """Give up waiting for the answer once its time is over."""
        self.done = self.done or self.left_s <= 0.0

    def unfinished(self) -> Close:
        """Return the Close of a session whose program ends without sending one."""
        return self.session.close_if_lost(wall_ms=self._wall_ms).model_copy(update=_UNFINISHED)

    @property
    def _wall_ms(self) -> float:
        return (self.clock() - self.started) * 1e3

    def _close(self) -> Close:
        return _with_cause(self.session.close(wall_ms=self._wall_ms), self.failure)

    def _close_to_any(self) -> Close:
        return self._close().model_copy(update={"edge": None, "handle": None})


def _with_cause(close: Close, error: BaseException | None) -> Close:
    """Return the Close of a failed text with the reason; any other as it is."""
    if error is None or close.reason is not EndReason.FAILED:
        return close
    return close.model_copy(update={"code": _code(error), "sentence": _sentence(error)})


def _code(error: BaseException) -> str:
    if isinstance(error, SessionRefused):
        return error.code.value
    return _WORDS.sub("-", type(error).__name__).lower()[:MAX_CODE]


def _sentence(error: BaseException) -> str:
    if isinstance(error, FleetError):
        return printable_line(str(error))[:MAX_SENTENCE]
    # What other exceptions say may quote anything.
    return f"The device's program has failed ({type(error).__name__}); its own log says more."

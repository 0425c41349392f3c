"""Queue of texts: a drafter has a sequence for each of a few texts at once, so further ones wait for their turn."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.client.request import Cancellation, GenerateRequest, Piece, RequestContext
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import DeviceError, TextCancelled, TextQueueFull
from fleet_device.texts.generate import GeneratedText

__all__ = ["Delayed", "Failed", "GenerateText", "Listener", "Piece", "TextQueue", "Ticket"]

_log = logging.getLogger(__name__)

_GONE: Final = "The text was given up before its end: its reader has gone, or the device is shutting down."
_BROKEN: Final = "The device no longer writes texts, for a reason that its log tells; restart it."
_LONGEST_RETRY_S: Final = 120

# What the latest text weighs in the usual duration of one.
_LATEST_WEIGHT: Final = 0.25


@dataclass(frozen=True, slots=True)
class Delayed:
    """No more text comes for now.

    Attributes:
        reason: Why, in a sentence; told once for each wait that lasts.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no (more) text.

    Attributes:
        error: Why.
        text: What was written, if the text was given up while it was.
    """

    error: Exception
    text: GeneratedText | None = None


Listener = Callable[[Piece | Delayed | GeneratedText | Failed], None]
"""Told, on one of the queue's threads, of pieces, delays, and in the end of a `GeneratedText` or `Failed`; must not
block."""

Prepare = Callable[[], GenerateRequest]
"""Makes the request when its turn has come, on one of the queue's threads: a long prompt takes time to encode."""

GenerateText = Callable[[GenerateRequest, RequestContext], GeneratedText]


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the queue.

    Attributes:
        prepare: Makes the request.
        listener: Told what becomes of it.
        asked_at: When the request came (monotonic seconds).
        begun: Whether its turn has come.
        waited_s: How long it waited for its turn.
        cancellation: Gives it up.
    """

    prepare: Prepare
    listener: Listener
    asked_at: float = 0.0
    begun: bool = False
    waited_s: float = 0.0
    cancellation: Cancellation = field(default_factory=Cancellation)

    def wait_longer(self, waited_s: float) -> None:
        """Add the time for which the request waited for the draft model."""
        self.waited_s += waited_s

    def tell(self, event: Piece | Delayed | GeneratedText | Failed) -> None:
        """Pass an event on; a listener that fails has gone."""
        try:
            self.listener(event)
        except Exception:  # noqa: BLE001 - whatever it is, the others' texts go on
            _log.debug("A listener failed.", exc_info=True)
            self.cancellation.cancel()


class TextQueue:
    """The queue and the threads that work it off, in order.

    Args:
        write: Writes one text; called from as many threads as there may be texts at once.
        waiting: Most texts that wait; None is no bound.
        at_once: How many are written at once.
        clock: Monotonic seconds.
        on_idle: Told when the queue is closed and all of it is done.
    """

    def __init__(
        self,
        write: GenerateText,
        *,
        waiting: int | None = None,
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._write = write
        self._most = waiting
        self._clock = clock
        self._on_idle = on_idle
        self._waiting: deque[Ticket] = deque()
        self._current: dict[Ticket, float] = {}  # the texts under way, and when they were begun, by the clock
        self._closed = self._broken = self._held = False
        self._refusal = ""
        self._usual_s: float | None = None
        self._done = 0
        self._changed = threading.Condition()
        names = ["texts", *(f"texts-{number}" for number in range(2, at_once + 1))]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        self._working = at_once

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def writing(self) -> int:
        return len(self._current)

    @property
    def at_once(self) -> int:
        return len(self._threads)

    @property
    def done(self) -> int:
        """Texts that have ended, well or not."""
        return self._done

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._closed

    @property
    def broken(self) -> bool:
        """Whether a thread that writes has ended before its time: nothing is written any more."""
        return self._broken

    @property
    def held(self) -> bool:
        """Whether no text is begun for now."""
        return self._held

    @property
    def refusal(self) -> str:
        """Why no more requests are taken for now, in a sentence; empty if they are."""
        return self._refusal

    def hold(self, refusal: str = "") -> None:
        """Take no more requests for now, and say so, or, without a refusal, begin none of those that wait."""
        with self._changed:
            self._refusal, self._held = refusal, not refusal
            self._changed.notify_all()

    def resume(self) -> None:
        with self._changed:
            self._refusal, self._held = "", False
            self._changed.notify_all()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, prepare: Prepare, listener: Listener) -> Ticket:
        """Ask for a text.

        Raises:
            TextQueueFull: Too many wait.
            TextCancelled: The queue is closed, or takes no requests for now.
        """
        ticket = Ticket(prepare, listener, self._clock())
        with self._changed:
            if self._broken:
                raise TextCancelled(_BROKEN)
            if self._closed:
                raise TextCancelled("The device is shutting down and takes no new texts.")
            if self._refusal:
                raise TextCancelled(self._refusal)
            free = 0 if self._held else self.at_once - len(self._current)
            if self._most is not None and len(self._waiting) >= self._most + free:
                raise TextQueueFull(self._most, at_once=self.at_once, retry_after_s=self._retry_after_s())
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give a text up, wherever it stands; one that has ended is left alone."""
        with self._changed:
            waits = ticket in self._waiting
            if waits:
                self._waiting.remove(ticket)
        ticket.cancellation.cancel()
        if waits:
            ticket.tell(Failed(TextCancelled(_GONE)))

    def close(self) -> None:
        """Take no more requests; those taken are served."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Close, and give up all that is not written yet."""
        self.close()
        with self._changed:
            left = [*self._waiting, *self._current]
        for ticket in left:
            self.cancel(ticket)

    def join(self) -> None:
        """Wait for the threads to end, after `close` or `abandon`; those that were never started have."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _retry_after_s(self) -> int:
        """Return when a place is free: when a text under way ends, by how long texts usually take."""
        now = self._clock()
        # One that has outlasted the usual time is given as much again.
        left_s = min((abs((self._usual_s or 0.0) - (now - began)) for began in self._current.values()), default=0.0)
        return min(max(1, math.ceil(left_s)), _LONGEST_RETRY_S)

    def _work(self) -> None:
        try:
            self._serve_all()
        except BaseException:  # noqa: BLE001 - whatever it is, nobody is left waiting for an answer that never comes
            _log.exception("The thread that writes texts has ended for a reason that should not be possible.")
            with self._changed:
                self._closed = self._broken = True
                left = [*self._current, *self._waiting]
                self._current.clear()
                self._waiting.clear()
                self._changed.notify_all()
            for ticket in left:
                ticket.cancellation.cancel()
                ticket.tell(Failed(TextCancelled(_BROKEN)))
        with self._changed:
            self._working -= 1
            idle = not self._working
        if idle:
            self._on_idle()

    def _serve_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: (self._waiting and not self._held) or self._closed)
                if not self._waiting:
                    break
                ticket = self._waiting.popleft()
                self._current[ticket] = now = self._clock()
                ticket.waited_s = now - ticket.asked_at
            self._serve(ticket)
            with self._changed:
                self._current.pop(ticket, None)
                self._done += 1

    def _serve(self, ticket: Ticket) -> None:
        context = RequestContext(
            on_piece=ticket.tell,
            on_wait=lambda reason: ticket.tell(Delayed(reason)),
            on_turn=ticket.wait_longer,
            cancellation=ticket.cancellation,
        )
        ticket.begun = True
        try:
            text = self._write(ticket.prepare(), context)
        except Exception as error:  # noqa: BLE001 - one text's failure is not the next one's
            if not isinstance(error, DeviceError | DrafterError):
                _log.exception("A text failed for a reason that should not be possible.")
            ticket.tell(Failed(error))
        else:
            ticket.tell(text if not ticket.cancellation.requested else Failed(TextCancelled(_GONE), text))
        if not ticket.cancellation.requested:
            self._learn(ticket)

    def _learn(self, ticket: Ticket) -> None:
        with self._changed:
            took_s = self._clock() - self._current.get(ticket, self._clock())
            usual_s = took_s if self._usual_s is None else self._usual_s
            self._usual_s = usual_s + _LATEST_WEIGHT * (took_s - usual_s)

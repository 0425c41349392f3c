"""Queue of requests, and the streams that an application reads a generation from."""

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Self

from fleet_common.closing import Closing
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import DeviceError, RequestQueueFull, RequestTimeout, TextCancelled
from fleet_device.requests.generate import Cancellation, GeneratedText, GenerateRequest, Piece, RequestContext

_log = logging.getLogger(__name__)

_GONE: Final = "The request was cancelled: its reader has disconnected, or the device is shutting down."
_BROKEN: Final = "The device no longer runs requests; see its log, and restart it."
_LONGEST_RETRY_S: Final = 120

# Weight of the latest request in the usual duration.
_LATEST_WEIGHT: Final = 0.25


@dataclass(frozen=True, slots=True)
class Delayed:
    """No tokens come for now; `reason` is a sentence, once for each long wait."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed; `text` is what was generated if it was cancelled."""

    error: Exception
    text: GeneratedText | None = None


Listener = Callable[[Piece | Delayed | GeneratedText | Failed], None]
"""Receives, on one of the queue's threads, pieces, delays, and in the end a `GeneratedText` or `Failed`; must not
block."""

Prepare = Callable[[], GenerateRequest]
"""Makes the request when its turn has come, on one of the queue's threads: a long prompt takes time to encode."""

GenerateText = Callable[[GenerateRequest, RequestContext], GeneratedText]


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the queue.

    Attributes:
        asked_at: When the request arrived (monotonic seconds).
        timeout: Seconds from then on for which the application waits; None for no limit.
        waited_s: How long it waited for its turn and for the draft model.
    """

    prepare: Prepare
    listener: Listener
    asked_at: float = 0.0
    timeout: float | None = None
    begun: bool = False
    waited_s: float = 0.0
    cancellation: Cancellation = field(default_factory=Cancellation)

    def wait_longer(self, waited_s: float) -> None:
        self.waited_s += waited_s

    def tell(self, event: Piece | Delayed | GeneratedText | Failed) -> None:
        """Pass an event on; a listener that fails cancels the request."""
        try:
            self.listener(event)
        except Exception:  # noqa: BLE001 - the other requests go on
            _log.debug("A listener failed.", exc_info=True)
            self.cancellation.cancel()


class RequestQueue:
    """The queue and the threads that run requests, in order.

    `waiting` bounds the waiting requests, None for no bound; `at_once` those that run. `on_idle` is called when the
    queue is closed and empty. While `refusal` is a sentence, new requests are refused with it.
    """

    def __init__(
        self,
        run: GenerateText,
        *,
        waiting: int | None = None,
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._most = waiting
        self._clock = clock
        self._on_idle = on_idle
        self._waiting: deque[Ticket] = deque()
        self._current: dict[Ticket, float] = {}  # when running requests were begun
        self.closed = self.broken = False
        self.refusal = ""
        self._usual_s: float | None = None
        self.done = 0
        self._changed = threading.Condition()
        names = ["texts", *(f"texts-{number}" for number in range(2, at_once + 1))]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        self._working = at_once

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._current)

    @property
    def at_once(self) -> int:
        return len(self._threads)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, prepare: Prepare, listener: Listener, *, timeout: float | None = None) -> Ticket:
        """Add a request; raise RequestQueueFull if too many wait, TextCancelled if the queue accepts none."""
        ticket = Ticket(prepare, listener, self._clock(), timeout)
        with self._changed:
            if self.broken:
                raise TextCancelled(_BROKEN)
            if self.closed:
                raise TextCancelled("The device is shutting down and accepts no new requests.")
            if self.refusal:
                raise TextCancelled(self.refusal)
            free = self.at_once - len(self._current)
            if self._most is not None and len(self._waiting) >= self._most + free:
                raise RequestQueueFull(self._most, at_once=self.at_once, retry_after_s=self._retry_after_s())
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            waits = ticket in self._waiting
            if waits:
                self._waiting.remove(ticket)
        ticket.cancellation.cancel()
        if waits:
            ticket.tell(Failed(TextCancelled(_GONE)))

    def close(self) -> None:
        """Accept no more requests; those accepted are served."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        self.close()
        with self._changed:
            left = [*self._waiting, *self._current]
        for ticket in left:
            self.cancel(ticket)

    def join(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _retry_after_s(self) -> int:
        """Return when a running request probably ends, by the usual duration."""
        now = self._clock()
        # One that has exceeded the usual duration is expected to take as long again.
        left_s = min((abs((self._usual_s or 0.0) - (now - began)) for began in self._current.values()), default=0.0)
        return min(max(1, math.ceil(left_s)), _LONGEST_RETRY_S)

    def _work(self) -> None:
        try:
            self._serve_all()
        except BaseException:  # noqa: BLE001 - no caller may wait for ever
            _log.exception("The thread that runs requests has ended because of a defect.")
            with self._changed:
                self.closed = self.broken = True
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
                self._changed.wait_for(lambda: self._waiting or self.closed)
                if not self._waiting:
                    break
                ticket = self._waiting.popleft()
                self._current[ticket] = now = self._clock()
                ticket.waited_s = now - ticket.asked_at
            self._serve(ticket)
            with self._changed:
                self._current.pop(ticket, None)
                self.done += 1

    def _serve(self, ticket: Ticket) -> None:
        context = RequestContext(
            on_piece=ticket.tell,
            on_wait=lambda reason: ticket.tell(Delayed(reason)),
            on_turn=ticket.wait_longer,
            cancellation=ticket.cancellation,
            deadline=None if ticket.timeout is None else ticket.asked_at + ticket.timeout,
        )
        ticket.begun = True
        try:
            text = self._run(ticket.prepare(), context)
        except Exception as error:  # noqa: BLE001 - the next requests go on
            if not isinstance(error, DeviceError | DrafterError):
                _log.exception("A request failed because of a defect.")
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


_Happened = GenerateRequest | Piece | Delayed | GeneratedText | Failed


class _Stream:
    """Common part of both streams: the request's place in the queue, and its end."""

    def __init__(self, requests: RequestQueue, prepare: Prepare, listener: Listener, *, timeout: float | None) -> None:
        self._timeout = timeout
        self._end: GeneratedText | Failed | None = None
        self._cancelled = self._closed = False
        self._requests = requests
        self._ticket = requests.submit(prepare, listener, timeout=timeout)

    def cancel(self) -> None:
        """End the generation where it is. `result` and the iterator still return what was generated."""
        self._cancelled = True
        self._requests.cancel(self._ticket)

    def close(self) -> None:
        """Cancel the request; no more pieces come. Idempotent."""
        self._closed = True
        if self._end is None:
            self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_ticket"):
            self.close()

    def _note(self, event: Piece | Delayed | GeneratedText | Failed) -> None:
        if isinstance(event, GeneratedText | Failed):
            self._end = event

    def _raise_failure(self) -> None:
        if isinstance(self._end, Failed) and not self._cancelled:
            raise self._end.error

    def _whole(self, end: GeneratedText | Failed) -> GeneratedText:
        if isinstance(end, GeneratedText):
            return end
        if self._cancelled and end.text is not None:
            return end.text
        raise end.error

    def _late(self) -> RequestTimeout:
        self.close()
        return RequestTimeout(f"The request was not complete after {self._timeout:g} s, and is cancelled.")


class TextStream(_Stream, Closing, Iterator[str]):
    """A running or waiting generation: iterate over its pieces as they are verified.

    It is cancelled when a loop over it is left, for example with `break`, and when the stream is closed, left as a
    context manager, or dropped. It continues whether or not anybody reads: a slow reader delays nothing.

    One thread reads; `cancel` and `close` may be called from any, and from a signal handler.

    Iteration, `request` and `result` raise what the request has failed with:

    - `EdgeUnavailable`: no edge answers.
    - `SessionRefused`: the edge refused it.
    - `SessionFailed`, `ProtocolViolation`: the session failed.
    - `PromptTooLong`, `ChatError`, `DrafterError`: the draft model cannot run it.
    - `TextCancelled`: the device was closed.
    - `RequestTimeout`: nothing more came within `timeout` seconds from the beginning.

    Attributes:
        on_wait: Receives, on the thread that reads, why no tokens come, once for each wait of more than ten seconds;
            set it.
    """

    def __init__(
        self,
        requests: RequestQueue,
        prepare: Callable[[], GenerateRequest],
        *,
        timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._events: queue.SimpleQueue[_Happened] = queue.SimpleQueue()
        self.on_wait: Callable[[str], None] = lambda _reason: None
        self._request: GenerateRequest | None = None
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout
        events = self._events  # the queue must not keep an unread stream alive

        def begin() -> GenerateRequest:
            request = prepare()
            events.put(request)
            return request

        super().__init__(requests, begin, events.put, timeout=timeout)

    def __iter__(self) -> Iterator[str]:  # noqa: PYI034 - a generator, which a loop closes when it is left
        return (piece.text for piece in self.pieces() if piece.text)

    def __next__(self) -> str:
        while (piece := self._next()) is not None:
            if piece.text:
                return piece.text
        raise StopIteration

    def pieces(self) -> Iterator[Piece]:
        """Iterate over the pieces with their numbers of tokens, also those that complete no text."""
        try:
            while (piece := self._next()) is not None:
                yield piece
        finally:  # also when a loop is left, even if somebody keeps the stream
            self.close()

    def request(self) -> GenerateRequest:
        """Wait until the request is begun, and return it: the prompt's token ids, policy and seed."""
        if self._request is None and self._end is None:
            self._next_event()
        if self._request is None:
            assert isinstance(self._end, Failed)
            raise self._end.error
        return self._request

    def result(self) -> GeneratedText:
        """Wait for the end, and return the text; if it was cancelled, what was generated until then."""
        while self._end is None:
            self._next_event()
        return self._whole(self._end)

    def _next(self) -> Piece | None:
        while self._end is None and not self._closed:
            if isinstance(event := self._next_event(), Piece):
                return event
        self._raise_failure()
        return None

    def _next_event(self) -> _Happened:
        left_s = None if self._deadline is None else max(0.0, self._deadline - self._clock())
        try:
            event = self._events.get(timeout=left_s)
        except queue.Empty:
            self._deadline = None
            raise self._late() from None
        match event:
            case GenerateRequest():
                self._request = event
            case Delayed():
                self.on_wait(event.reason)
            case _:
                self._note(event)
        return event


class AsyncTextStream(_Stream):
    """A running or waiting generation for asyncio: iterate over its pieces as they are verified, with `async for`.

    It is cancelled when a loop over it is left, when the task that waits for it is cancelled, and when it is closed,
    left as a context manager, or dropped. Iteration and `result` raise what a `TextStream` does, and `InvalidRequest`
    for a grammar that cannot be used.
    """

    def __init__(self, requests: RequestQueue, prepare: Prepare, *, timeout: float | None = None) -> None:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Piece | Delayed | GeneratedText | Failed]()
        self._events = events
        self._deadline = None if timeout is None else loop.time() + timeout

        def listen(event: Piece | Delayed | GeneratedText | Failed) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        super().__init__(requests, prepare, listen, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for piece in self.pieces():
                if piece.text:
                    yield piece.text
        finally:
            self.close()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Iterate over the pieces with their numbers of tokens, also those that complete no text."""
        try:
            while self._end is None and not self._closed:
                if isinstance(event := await self._next_event(), Piece):
                    yield event
            self._raise_failure()
        finally:  # also when a loop is left, even if somebody keeps the stream
            self.close()

    async def result(self) -> GeneratedText:
        """Wait for the end, and return the text; if it was cancelled, what was generated until then."""
        while self._end is None:
            await self._next_event()
        return self._whole(self._end)

    async def _next_event(self) -> Piece | Delayed | GeneratedText | Failed:
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            self._deadline = None
            raise self._late() from None
        except asyncio.CancelledError:
            self.close()
            raise
        self._note(event)
        return event

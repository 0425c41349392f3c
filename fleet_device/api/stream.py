"""Streams: a text as server-sent events, as it grows, with comments while it does not.

A comment begins with a colon; clients pass over it, and whatever stands between them and the device sees that the
connection is alive.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fleet_device.api.problems import problem_of
from fleet_device.api.replies import DONE, Reply, event
from fleet_device.client.request import Piece
from fleet_device.client.retry import REPORT_AFTER_S
from fleet_device.texts.generate import GeneratedText
from fleet_device.texts.queue import Delayed, Failed, Ticket

_log = logging.getLogger(__name__)

Event = Piece | Delayed | GeneratedText | Failed
Events = asyncio.Queue[tuple[int, Event]]
"""What becomes of the choices of an answer, each with its number."""

Happened = tuple[int, Event | None]
Pause = Callable[[float], Awaitable[None]]

HEARTBEAT_S: Final = 5.0
"""Seconds without anything to send after which a stream sends a comment."""

_ALIVE: Final = b": waiting\n\n"
_QUEUED: Final = "Other texts are written first; this one waits for its turn."


class EventsResponse(StreamingResponse):
    """Server-sent events; whatever ends them, the client's leaving too, `at_end` is called."""

    def __init__(self, content: AsyncIterator[bytes], *, headers: dict[str, str], at_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store", **headers})
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


@dataclass(slots=True)
class TextEvents:
    """What becomes of the choices of one answer, in order.

    Attributes:
        events: As the queue of texts tells them.
        tickets: The places of the choices in it.
        pause: Sleeps for some seconds.
    """

    events: Events
    tickets: Sequence[Ticket]
    pause: Pause = asyncio.sleep
    _silent_s: float = 0.0

    async def end(self) -> list[GeneratedText]:
        """Wait for all of the whole texts.

        Raises:
            ApiProblem: One failed.
        """
        ended: dict[int, GeneratedText] = {}
        while len(ended) < len(self.tickets):
            number, current = await self.events.get()
            if isinstance(current, Failed):
                raise problem_of(current.error)
            if isinstance(current, GeneratedText):
                ended[number] = current
        return [ended[number] for number in range(len(self.tickets))]

    async def first(self) -> Happened:
        """Wait for what happens first, but not for long: None if that is nothing.

        Raises:
            ApiProblem: A text failed, so that the status can say so.
        """
        number, current = await self.next()
        if isinstance(current, Failed):
            raise problem_of(current.error)
        return number, current

    async def stream(self, reply: Reply, first: Happened) -> AsyncIterator[bytes]:
        """Send the texts as they grow. Whatever fails, the stream says so: its status is sent already."""
        try:
            for number in range(len(self.tickets)):
                for chunk in reply.first(number):
                    yield event(chunk)
            ended: list[GeneratedText] = []
            number, current = first
            while True:
                if isinstance(current, Failed):
                    # An error in the stream is what OpenAI's clients raise as one.
                    yield event(problem_of(current.error).body())
                    return
                for sent in self._sent(reply, number, current):
                    yield sent
                if isinstance(current, GeneratedText):
                    ended.append(current)
                    if len(ended) == len(self.tickets):
                        break
                number, current = await self.next()
            for chunk in reply.end(ended):
                yield event(chunk)
            yield DONE
        except Exception as error:  # noqa: BLE001 - a connection is not to be cut without a word
            _log.exception("A stream failed for a reason that should not be possible.")
            yield event(problem_of(error).body())

    def comment_or(self, current: Piece | Delayed | None, piece: Callable[[str], bytes]) -> bytes:
        """Return what is to be sent of what has happened, a piece as `piece` makes it."""
        match current:
            case Piece():
                return piece(current.text)
            case Delayed():
                return comment(current.reason)
        return self._alive()

    def _sent(self, reply: Reply, number: int, current: Piece | Delayed | GeneratedText | None) -> list[bytes]:
        """Return what is to be sent of what has happened."""
        match current:
            case Piece():
                return [event(chunk) for chunk in reply.pieces(current, number)]
            case GeneratedText():
                return [event(chunk) for chunk in reply.last(current, number)]
            case Delayed():
                return [comment(current.reason)]
        return [self._alive()]

    def _alive(self) -> bytes:
        # Why else nothing comes, the text's session says.
        waits = not any(ticket.begun for ticket in self.tickets)
        says_why = waits and self._silent_s - HEARTBEAT_S < REPORT_AFTER_S <= self._silent_s
        return comment(_QUEUED) if says_why else _ALIVE

    async def next(self) -> Happened:
        """Wait for what happens next; None if nothing has for `HEARTBEAT_S`."""
        coming = asyncio.ensure_future(self.events.get())
        beat = asyncio.ensure_future(self.pause(HEARTBEAT_S))
        try:
            await asyncio.wait({coming, beat}, return_when=asyncio.FIRST_COMPLETED)
            number, current = coming.result() if coming.done() else (0, None)
        finally:
            beat.cancel()
            coming.cancel()
        self._silent_s = 0.0 if current is not None else self._silent_s + HEARTBEAT_S
        return number, current


def comment(sentence: str) -> bytes:
    """Return a sentence as a comment of a stream; one line, whatever is in it."""
    return b": " + " ".join(sentence.split()).encode() + b"\n\n"

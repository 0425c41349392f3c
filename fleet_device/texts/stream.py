"""TextStream: the pieces of a text as it is written, and in the end the whole text."""

import queue
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from fleet_device.client.request import GenerateRequest, Piece
from fleet_device.texts.generate import GeneratedText
from fleet_device.texts.queue import Delayed, Failed, TextQueue

_Happened = GenerateRequest | Piece | Delayed | GeneratedText | Failed


class TextStream(Iterator[str]):
    """A text that is being written, or waits its turn: iterate over its pieces as they are verified.

    The text is given up when the stream is closed, left as a context manager, or dropped, as a loop does that is left
    with `break`. It is written whether or not anybody reads: a slow reader holds nobody up.

    One thread reads; `cancel` and `close` may be called from any, and from a signal handler.

    Iteration, `request` and `result` raise what the text has failed with:

    - `EdgeUnavailable`: no edge answers.
    - `SessionRefused`: the edge declined it.
    - `SessionFailed`, `ProtocolViolation`: it could not be brought to its end.
    - `PromptTooLong`, `ChatError`, `DrafterError`: the draft model cannot write it.
    - `TextCancelled`: the device was closed.

    Args:
        texts: The queue of the device's texts.
        prepare: Makes the request, on the queue's thread.

    Attributes:
        on_wait: Told, on the thread that reads, why no text comes, once for each wait of more than ten seconds; set it.
    """

    def __init__(self, texts: TextQueue, prepare: Callable[[], GenerateRequest]) -> None:
        self._events: queue.SimpleQueue[_Happened] = queue.SimpleQueue()
        self.on_wait: Callable[[str], None] = lambda _reason: None
        self._request: GenerateRequest | None = None
        self._end: GeneratedText | Failed | None = None
        self._cancelled = self._closed = False
        self._texts = texts
        events = self._events  # the queue of texts must not keep a stream alive that nobody reads any more

        def begin() -> GenerateRequest:
            request = prepare()
            events.put(request)
            return request

        self._ticket = texts.submit(begin, events.put)

    def __next__(self) -> str:
        while (piece := self._next()) is not None:
            if piece.text:
                return piece.text
        raise StopIteration

    def pieces(self) -> Iterator[Piece]:
        """Iterate over the pieces with their numbers of tokens, those included that complete no text."""
        while (piece := self._next()) is not None:
            yield piece

    def request(self) -> GenerateRequest:
        """Wait until the text is begun, and return what is being written: the prompt's token ids, policy and seed."""
        if self._request is None and self._end is None:
            self._take()
        if self._request is None:
            assert isinstance(self._end, Failed)
            raise self._end.error
        return self._request

    def result(self) -> GeneratedText:
        """Wait for the end, and return the whole text. Of a text that was cancelled, what was written until then."""
        while self._end is None:
            self._take()
        if isinstance(self._end, GeneratedText):
            return self._end
        if self._cancelled and self._end.text is not None:
            return self._end.text
        raise self._end.error

    def cancel(self) -> None:
        """End the text where it is. The pieces written until then still come, and `result` has them all."""
        self._cancelled = True
        self._texts.cancel(self._ticket)

    def close(self) -> None:
        """Give the text up; no more pieces come. Idempotent."""
        self._closed = True
        if self._end is None:
            self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ticket"):
            self.close()

    def _next(self) -> Piece | None:
        """Return the next piece, or None at the end."""
        while self._end is None and not self._closed:
            if isinstance(event := self._take(), Piece):
                return event
        if isinstance(self._end, Failed) and not self._cancelled:
            raise self._end.error
        return None

    def _take(self) -> _Happened:
        event = self._events.get()
        match event:
            case GenerateRequest():
                self._request = event
            case Delayed():
                self.on_wait(event.reason)
            case GeneratedText() | Failed():
                self._end = event
        return event

"""Worker threads shared fairly between accounts, and live updates as server-sent events."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Final, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fleet_admin.dashboard.errors import Problem
from schemas.errors import FleetError

T = TypeVar("T")

_SHARE: Final = 3
_MAX_WAITING: Final = 8
"""Waiting requests of one account: a browser opens several pages at once."""


class Workers:
    """Threads that answer requests, shared so that a slow query or a busy account blocks nobody else.

    A thread that exceeds its time is not reused before the database has answered; the database's own time-outs end
    that. Called from one event loop.

    Args:
        threads: Maximum; a third of them for one account.
        answer_s: Time limit of one answer, including its wait.
    """

    def __init__(self, *, threads: int, answer_s: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dashboard")
        self._max_of_one = max(1, threads // _SHARE)
        self._answer_s = answer_s
        self._asked = Counter[str]()
        self._places: dict[str, asyncio.Semaphore] = {}

    async def run(self, work: Callable[[], T], *, account: str) -> T:
        """Run a function on a thread and return its result.

        Raises:
            Problem: It took too long, or the account has too many requests in progress.
        """
        if self._asked[account] >= self._max_of_one + _MAX_WAITING:
            raise Problem(429, "Your earlier requests are still running; try again soon.", retry_after_s=5)
        self._asked[account] += 1
        places = self._places.setdefault(account, asyncio.Semaphore(self._max_of_one))
        loop = asyncio.get_running_loop()

        def done() -> None:
            places.release()
            self._leave(account)

        def tell(_future: Future[T]) -> None:
            # The loop may have ended meanwhile.
            if not loop.is_closed():
                loop.call_soon_threadsafe(done)

        try:
            async with asyncio.timeout(self._answer_s):
                try:
                    await places.acquire()
                except BaseException:
                    self._leave(account)
                    raise
                future = self._pool.submit(work)
                future.add_done_callback(tell)
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Problem(
                503, f"The answer took more than {self._answer_s:g} s; choose a shorter time range or fewer columns."
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, account: str) -> None:
        self._asked[account] -= 1
        if not self._asked[account]:
            del self._asked[account]
            self._places.pop(account, None)


_LOOK_S: Final = 2.0
_ANYWAY_S: Final = 20.0
"""Reload without changes, because displayed ages grow."""

_LONGEST_S: Final = 600.0
"""Time after which a browser reconnects and sends its cookie again."""

_OF_ONE: Final = 12


class Live:
    """Server-sent events that make pages reload their parts. They carry no data: a page asks with its own rights.

    `look` returns when the log last changed, or None; it is called on a thread while pages are open. `most` limits the
    number of open pages.
    """

    def __init__(
        self,
        look: Callable[[], datetime | None],
        *,
        most: int,
        clock: Callable[[], float],
    ) -> None:
        self._look = look
        self._most = most
        self._clock = clock
        self._watching = Counter[str]()
        self._changed = asyncio.Condition()
        self._number = 0
        self._task: asyncio.Task[None] | None = None

    def response(self, *, account: str) -> Response:
        """Return a page's event stream; raises `Problem` if too many pages are watched."""
        if self._watching.total() >= self._most or self._watching[account] >= _OF_ONE:
            raise Problem(
                503, "Too many pages are live; this one becomes live when others are closed.", retry_after_s=60
            )
        self._watching[account] += 1  # now: many requests may arrive before the first stream begins
        return _Stream(self._events(), at_end=lambda: self._leave(account))

    async def _events(self) -> AsyncIterator[bytes]:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        began = self._clock()
        seen = self._number
        yield b"retry: 5000\n\n"
        while self._clock() - began < _LONGEST_S:
            async with self._changed:
                if self._number == seen:
                    await self._changed.wait()
                seen = self._number
            yield f"event: change\ndata: {seen}\n\n".encode()

    def _leave(self, account: str) -> None:
        self._watching[account] -= 1
        self._watching += Counter()  # forget those that are at zero

    async def _watch(self) -> None:
        last, notified = None, self._clock()
        while self._watching:
            await asyncio.sleep(_LOOK_S)
            try:
                latest = await asyncio.to_thread(self._look)
            except FleetError as error:
                logging.getLogger(__name__).warning("The session log could not be read: %s", error)
                continue
            if latest == last and self._clock() - notified < _ANYWAY_S:
                continue
            last, notified = latest, self._clock()
            async with self._changed:
                self._number += 1
                self._changed.notify_all()


class _Stream(StreamingResponse):
    """Server-sent events; `at_end` is called at the end, also if the page is closed before they begin."""

    def __init__(self, content: AsyncIterator[bytes], *, at_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()

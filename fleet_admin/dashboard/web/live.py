"""Live pages: server-sent events that say that something has changed; the pages then ask for themselves anew.

No data travels in the events: what a page shows, its own request asks for, with its own rights.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Final

from starlette.responses import Response, StreamingResponse

from fleet_admin.dashboard.errors import Problem
from schemas.errors import FleetError

_LOOK_S: Final = 2.0
_ANYWAY_S: Final = 20.0
"""Ages on a page grow although nothing happens."""

_LONGEST_S: Final = 600.0
"""After which a browser asks again, and shows its cookie again."""

_OF_ONE: Final = 12


class Live:
    """Tells pages that something has changed. Called from one event loop.

    Args:
        look: Returns when the log last changed, or None; called on a thread, while anybody watches.
        most: Most pages at once.
        clock: Monotonic seconds.
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
        """Return the stream of events for a page.

        Raises:
            Problem: Too many pages are watched.
        """
        if self._watching.total() >= self._most or self._watching[account] >= _OF_ONE:
            raise Problem(
                503, "Too many pages are kept up to date; this one is when others are closed.", retry_after_s=60
            )
        return StreamingResponse(self._events(account), media_type="text/event-stream")

    async def _events(self, account: str) -> AsyncIterator[bytes]:
        self._watching[account] += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            began = self._clock()
            seen = self._number
            yield b"retry: 5000\n\n"
            while self._clock() - began < _LONGEST_S:
                async with self._changed:
                    if self._number == seen:
                        await self._changed.wait()
                    seen = self._number
                yield f"event: change\ndata: {seen}\n\n".encode()
        finally:
            self._watching[account] -= 1
            self._watching += Counter()  # forget those that are at zero

    async def _watch(self) -> None:
        last, told = None, self._clock()
        while self._watching:
            await asyncio.sleep(_LOOK_S)
            try:
                latest = await asyncio.to_thread(self._look)
            except FleetError as error:
                logging.getLogger(__name__).warning("The log could not be looked at: %s", error)
                continue
            if latest == last and self._clock() - told < _ANYWAY_S:
                continue
            last, told = latest, self._clock()
            async with self._changed:
                self._number += 1
                self._changed.notify_all()

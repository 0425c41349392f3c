"""Workers: threads on which pages are made, shared out: one slow question or one busy account blocks nobody else.

A thread that a question holds beyond its time is not given to others before the database has answered; the database's
own time-outs end that.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from fleet_admin.dashboard.errors import Problem

T = TypeVar("T")

_SHARE: Final = 3
_MOST_WAITING: Final = 8
"""Questions of one account that wait for its share: a browser opens several pages at once."""


class Workers:
    """Runs functions on threads; called from one event loop.

    Args:
        threads: Most at once; a third of them for one account.
        answer_s: Longest time for one, in seconds, its wait counted in.
    """

    def __init__(self, *, threads: int, answer_s: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dashboard")
        self._most_of_one = max(1, threads // _SHARE)
        self._answer_s = answer_s
        self._asked = Counter[str]()
        self._places: dict[str, asyncio.Semaphore] = {}

    async def run(self, work: Callable[[], T], *, account: str) -> T:
        """Run a function and return what it returns.

        Raises:
            Problem: It took too long, or the account has too much under way.
        """
        if self._asked[account] >= self._most_of_one + _MOST_WAITING:
            raise Problem(429, "Your earlier questions are still being answered; try again soon.", retry_after_s=5)
        self._asked[account] += 1
        places = self._places.setdefault(account, asyncio.Semaphore(self._most_of_one))
        loop = asyncio.get_running_loop()

        def done() -> None:
            places.release()
            self._leave(account)

        def tell(_future: Future[T]) -> None:
            # The loop may have ended meanwhile, and its places with it.
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
                503, f"The answer took more than {self._answer_s:g} s; ask for a shorter time or for fewer things."
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, account: str) -> None:
        self._asked[account] -= 1
        if not self._asked[account]:
            del self._asked[account]
            self._places.pop(account, None)

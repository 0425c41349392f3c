import asyncio
import itertools
import threading
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import pytest
from starlette.responses import Response

from fleet_admin.dashboard import serving
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.serving import Live, Workers


def test_one_accounts_slow_questions_do_not_block_another() -> None:
    async def check() -> None:
        workers, over = Workers(threads=3, answer_s=30), threading.Event()
        slow = [asyncio.create_task(workers.run(over.wait, account="slow")) for _ in range(5)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(workers.run(lambda: "at once", account="quick"), 10) == "at once"
        assert not any(each.done() for each in slow)
        over.set()
        assert await asyncio.gather(*slow) == [True] * 5
        workers.close()

    asyncio.run(check())


def test_what_an_account_asks_beyond_its_share_is_refused() -> None:
    async def check() -> None:
        workers, over = Workers(threads=3, answer_s=30), threading.Event()
        asked = [asyncio.create_task(workers.run(over.wait, account="greedy")) for _ in range(9)]
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="earlier requests") as refused:
            await workers.run(lambda: None, account="greedy")
        assert refused.value.status == 429
        over.set()
        await asyncio.gather(*asked)
        await workers.run(lambda: None, account="greedy")
        workers.close()

    asyncio.run(check())


def test_an_answer_that_takes_too_long_is_given_up_and_its_thread_is_not_given_away() -> None:
    async def check() -> None:
        workers, over = Workers(threads=3, answer_s=0.05), threading.Event()
        with pytest.raises(Problem, match=r"0\.05") as given_up:
            await workers.run(over.wait, account="slow")
        assert given_up.value.status == 503
        # The account's only slot is still in use: its next request waits, others do not.
        with pytest.raises(Problem):
            await workers.run(lambda: None, account="slow")
        assert await workers.run(lambda: 1, account="quick") == 1
        over.set()
        workers.close()

    asyncio.run(check())


class OpenPage:
    """A page that receives the events of a response until it is closed."""

    def __init__(self, response: Response) -> None:
        self._events: asyncio.Queue[bytes] = asyncio.Queue()
        self._closed = asyncio.Event()
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        self._task = asyncio.create_task(response(scope, self._receive, self._send))

    async def next(self) -> str:
        return (await asyncio.wait_for(self._events.get(), 60.0)).decode()

    async def close(self) -> None:
        self._closed.set()
        await self._task

    async def _receive(self) -> dict[str, Any]:
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            self._events.put_nowait(message["body"])


def test_pages_that_are_watched_are_bounded_and_hear_of_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_LOOK_S", 0.0)
    times = itertools.count(1)

    async def check() -> None:
        live = Live(lambda: datetime.fromtimestamp(next(times), UTC), most=2, clock=lambda: 0.0)
        pages = [OpenPage(live.response(account=account)) for account in ("a", "b")]
        for page in pages:
            assert "retry" in await page.next()
        with pytest.raises(Problem, match="pages"):
            live.response(account="c")
        assert (await pages[0].next()).startswith("event: change")
        for page in pages:
            await page.close()
        live.response(account="c")

    asyncio.run(check())


@pytest.mark.parametrize("begun", [False, True], ids=["closed before they begin", "closed after they have begun"])
def test_pages_that_come_at_once_are_counted_before_their_streams_begin(begun: bool) -> None:
    async def check() -> None:
        live = Live(lambda: None, most=100, clock=lambda: 0.0)
        responses, refused = list[Response](), 0
        for _ in range(150):
            try:
                responses.append(live.response(account="a"))
            except Problem:
                refused += 1
        assert (len(responses), refused) == (serving._OF_ONE, 150 - serving._OF_ONE)
        pages = list(map(OpenPage, responses))
        for page in pages:
            if begun:
                await page.next()
            await page.close()
        live.response(account="a")

    asyncio.run(check())


def test_a_stream_ends_after_a_while_so_that_its_cookie_is_shown_again() -> None:
    async def check() -> None:
        now = [0.0]
        live = Live(lambda: None, most=2, clock=lambda: now[0])
        stream = live.response(account="a").body_iterator  # type: ignore[attr-defined]
        await anext(stream)
        now[0] = 601.0
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(check())

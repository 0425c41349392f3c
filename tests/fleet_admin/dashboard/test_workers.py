import asyncio
import threading

import pytest

from fleet_admin.dashboard.app import Workers
from fleet_admin.dashboard.errors import Problem
from tests.support.waiting import PATIENCE_S


def test_one_accounts_slow_questions_do_not_block_another() -> None:
    async def check() -> None:
        workers, over = Workers(threads=3, answer_s=PATIENCE_S), threading.Event()
        slow = [asyncio.create_task(workers.run(over.wait, account="slow")) for _ in range(5)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(workers.run(lambda: "at once", account="quick"), PATIENCE_S) == "at once"
        assert not any(each.done() for each in slow)
        over.set()
        assert await asyncio.gather(*slow) == [True] * 5
        workers.close()

    asyncio.run(check())


def test_what_an_account_asks_beyond_its_share_is_refused() -> None:
    async def check() -> None:
        workers, over = Workers(threads=3, answer_s=PATIENCE_S), threading.Event()
        asked = [asyncio.create_task(workers.run(over.wait, account="greedy")) for _ in range(9)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as refused:
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
        workers._answer_s = PATIENCE_S
        assert await workers.run(lambda: 1, account="quick") == 1
        over.set()
        workers.close()

    asyncio.run(check())

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fleet_device import AsyncDevice, RequestTimeout, TextCancelled
from tests.fleet_device.test_device import COUPLED, LONG, at_home
from tests.support.memory_device import TalkingDrafter, announce_edge, at_work, settings
from tests.support.memory_fleet import MemoryFleet
from tests.support.memory_link import MemoryLink
from tests.support.waiting import PATIENCE_S, until

ENDLESS: Any = {"raw": True, "max_new_tokens": 4000, "seed": 6, **COUPLED}


def made(fleet: MemoryFleet, **given: Any) -> AsyncDevice:
    return AsyncDevice(
        settings(**given),
        load=lambda _settings: TalkingDrafter(),
        make_link=lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
    )


@asynccontextmanager
async def open_device(**given: Any) -> AsyncIterator[tuple[AsyncDevice, MemoryFleet]]:
    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet):
        async with made(fleet, **given) as device:
            yield device, fleet


Script = Callable[[AsyncDevice, MemoryFleet], Coroutine[Any, Any, None]]


def run(script: Script, **given: Any) -> None:
    async def main() -> None:
        async with open_device(**given) as (device, fleet):
            await asyncio.wait_for(script(device, fleet), PATIENCE_S)

    asyncio.run(main())


def ended(fleet: MemoryFleet) -> Coroutine[Any, Any, None]:
    return asyncio.to_thread(until, lambda: len(fleet.edge.sessions) == 0)


def test_a_text_is_the_one_of_the_other_device_whole_and_in_pieces() -> None:
    with at_home() as (other, _):
        expected = other.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=6, **COUPLED).text

    async def script(device: AsyncDevice, _fleet: MemoryFleet) -> None:
        assert await device.wait_for_edge(10.0)
        assert await device.count_tokens("t1 t2", raw=True) == 2
        asked: Any = ENDLESS | {"max_new_tokens": LONG}
        texts = await asyncio.gather(*(device.generate("t1 t2", **asked) for _ in range(3)))
        assert [text.text for text in texts] == [expected] * 3
        stream = device.stream("t1 t2", **asked)
        pieces = [piece async for piece in stream]
        assert len(pieces) > 1
        assert "".join(pieces) == (await stream.result()).text == expected
        numbers = [piece.tokens async for piece in device.stream("t1 t2", **asked).pieces()]
        assert sum(numbers) == LONG

    run(script)


def test_leaving_a_loop_ends_the_session() -> None:
    async def script(device: AsyncDevice, fleet: MemoryFleet) -> None:
        kept = device.stream("t1 t2", **ENDLESS)
        async for _ in kept:
            break
        await ended(fleet)
        async with device.stream("t1 t2", **ENDLESS) as stream:
            async for _ in stream:
                stream.cancel()
            assert (await stream.result()).tokens
        await ended(fleet)

    run(script)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_request_is_cancelled_with_its_task(method: str) -> None:
    async def script(device: AsyncDevice, fleet: MemoryFleet) -> None:
        async def read() -> None:
            async for _ in device.stream("t1 t2", **ENDLESS):
                pass

        work: Any = read() if method == "stream" else device.generate("t1 t2", **ENDLESS)
        task = asyncio.create_task(work)
        await asyncio.to_thread(until, lambda: len(fleet.edge.sessions) > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended(fleet)

    run(script)


def test_a_timeout_ends_a_request_that_nobody_serves() -> None:
    async def script() -> None:
        fleet = MemoryFleet()
        announce_edge(fleet)
        with fleet.broker.running():  # nobody verifies
            async with made(fleet, answer_s=600.0) as device:
                with pytest.raises(RequestTimeout):
                    await device.generate("t1", timeout=0.01)
                waiting = asyncio.create_task(device.generate("t1"))
                await asyncio.to_thread(until, lambda: device._open is not None and device._open.queue.running > 0)
            with pytest.raises(TextCancelled):
                await waiting

    asyncio.run(script())

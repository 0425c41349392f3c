"""Several texts at once on one device, over the memory broker and a scripted edge."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_device.client.lanes import Handles
from schemas.policy import Mode
from tests.fleet_device.test_device import COUPLED, LONG, at_home
from tests.support.memory_fleet import MemoryFleet, lossless_text, terms
from tests.support.scripted_edge import LoneDevice
from tests.support.waiting import until


def expected(seed: int, length: int = LONG) -> tuple[int, ...]:
    return tuple(lossless_text(terms(seed, mode=Mode.COUPLED, max_new_tokens=length)))


@pytest.mark.parametrize("at_once", [2, 3])
def test_texts_that_are_written_at_once_are_each_the_target_s_own(at_once: int) -> None:
    seeds = range(12)
    with at_home(texts_at_once=at_once) as (device, fleet), ThreadPoolExecutor(6) as pool:
        most, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.0005):
                most[0] = max(most[0], len(fleet.edge.sessions))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        texts = pool.map(
            lambda seed: device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=seed, **COUPLED), seeds
        )
        assert [text.tokens for text in texts] == [expected(seed) for seed in seeds]
        stop.set()
        watcher.join()
    assert most[0] == at_once


def test_a_text_that_waits_for_ever_does_not_keep_the_other_from_being_written() -> None:
    with at_home(texts_at_once=2, open_s=600.0) as (device, fleet):
        long = device.stream("t1 t2", raw=True, max_new_tokens=4000, seed=6, **COUPLED)
        next(iter(long))
        assert device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=6, **COUPLED).tokens == expected(6)
        assert device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=7, **COUPLED).tokens == expected(7)
        long.close()
        until(lambda: len(fleet.edge.sessions) == 0)


def test_no_two_sessions_of_a_device_have_the_same_handle() -> None:
    handles = Handles()
    assert handles.claim(b"one", 7)
    assert handles.claim(b"one", 7)
    assert not handles.claim(b"two", 7)
    assert handles.claim(b"two", 8)
    assert handles.claim(b"one", 9)
    assert handles.claim(b"two", 7)
    handles.release(b"two")
    assert handles.claim(b"one", 7)


def test_a_text_whose_handle_another_one_has_asks_for_a_new_one() -> None:
    device = LoneDevice(MemoryFleet())
    fleet_handle = next(iter(_first_handles(device)))
    device.agent._handles.claim(b"another", fleet_handle)
    done = device.generate(mode=Mode.COUPLED)
    assert (done.resumes, done.tokens) == (1, expected(6, 8))


def _first_handles(device: LoneDevice) -> list[int]:
    """Return the handle that the edge gives next."""
    assert device._fleet is not None
    return [device._fleet.edge.sessions._next]

import pytest

from fleet_common.mqtt.connection import SilenceWatch
from tests.support.memory_fleet import Clock


@pytest.fixture
def time() -> Clock:
    return Clock()


def test_a_broker_that_says_nothing_is_asked_once_and_given_up_after_one_and_a_half_keepalives(time: Clock) -> None:
    silence = SilenceWatch(10.0, clock=time)
    asked, given_up = [], []
    for _ in range(200):
        if silence.asks(5):
            asked.append(time.seconds)
        if silence.given_up:
            given_up.append(time.seconds)
        time.seconds += 0.1
    assert asked == [pytest.approx(111.0, abs=0.11)]
    assert given_up[0] == pytest.approx(115.0, abs=0.21)
    assert silence.lasts_s == pytest.approx(20.0, abs=0.01)


def test_whatever_comes_begins_it_anew(time: Clock) -> None:
    silence = SilenceWatch(10.0, clock=time)
    asked = 0
    for received in range(20):
        for _ in range(14):  # nothing for 14 s, then something
            asked += silence.asks(received)
            assert not silence.given_up
            time.seconds += 1.0
    assert asked == 20


def test_a_process_that_was_stopped_first_asks(time: Clock) -> None:
    silence = SilenceWatch(10.0, clock=time)
    silence.asks(5)
    time.seconds += 40.0
    assert silence.asks(5)
    assert not silence.given_up
    time.seconds += 40.0
    assert not silence.asks(6), "what has come meanwhile is seen first"
    assert not silence.given_up

import pytest

from benchmarks.capacity.service_level import Client, TimedRequest, TimeWindow
from fleet_admin.advice import ServiceLevel

WINDOW = TimeWindow(10.0, 20.0)
LEVEL = ServiceLevel(tokens_per_s=8.0, gap_s=0.25)


def steady(begin: float, end: float, every: float, tokens: int = 1, *, ended: bool = False) -> TimedRequest:
    number = round((end - begin) / every)
    pieces = [(begin + n * every, tokens) for n in range(number)]
    return TimedRequest(begin - 1.0, pieces, pieces[-1][0] if ended else None)


@pytest.mark.parametrize(("every", "tokens", "at_level"), [(0.1, 1, True), (0.13, 1, False), (0.24, 2, True)])
def test_a_client_is_at_the_level_if_it_is_fast_enough(every: float, tokens: int, at_level: bool) -> None:
    client = Client([steady(9.0, 21.0, every, tokens)])
    assert client.at_level(WINDOW, LEVEL) is at_level
    assert client.pace(WINDOW) == pytest.approx(tokens / every, rel=0.03)


def test_large_pieces_far_apart_are_not_the_level_however_fast_they_are() -> None:
    client = Client([steady(9.0, 21.0, 0.4, 10)])
    assert client.pace(WINDOW) > 20.0
    assert client.gap_s(WINDOW) == pytest.approx(0.4)
    assert not client.at_level(WINDOW, LEVEL)


def test_one_wait_in_a_hundred_may_be_long() -> None:
    text = steady(10.0, 20.0, 0.05)
    text.pieces = [(at + (0.6 if at >= 15.0 else 0.0), tokens) for at, tokens in text.pieces]
    assert Client([text]).at_level(WINDOW, LEVEL)


def test_a_client_that_starves_towards_the_end_is_slower_for_it() -> None:
    text = steady(10.0, 12.0, 0.1)
    assert Client([TimedRequest(text.asked_at, text.pieces, text.pieces[-1][0])]).at_level(WINDOW, LEVEL)
    starved = Client([text])
    assert starved.pace(WINDOW) < 2.0
    assert max(text.gaps(WINDOW)) == pytest.approx(8.1)


def test_only_the_window_counts_and_texts_may_begin_and_end_in_it() -> None:
    client = Client([steady(8.0, 12.0, 0.1, ended=True), steady(15.0, 30.0, 0.1)])
    assert client.tokens(WINDOW) == 20 + 50
    assert client.pace(WINDOW) == pytest.approx((20 + 49) / (1.9 + 5.0))

from hypothesis import given
from hypothesis import strategies as st

from fleet_edge.guard.token_bucket import TokenBucket


def test_a_burst_goes_through_and_then_the_rate() -> None:
    bucket = TokenBucket(2.0, 10.0, now=0.0)
    assert [bucket.take(1.0, 0.0) == 0.0 for _ in range(12)] == [True] * 10 + [False] * 2
    assert [bucket.take(1.0, 1.0) == 0.0 for _ in range(3)] == [True, True, False]


def test_it_says_when_it_is_worth_asking_again() -> None:
    bucket = TokenBucket(2.0, 4.0, now=0.0)
    bucket.spend(7.0, 0.0)
    wait = bucket.wait_s(1.0, 0.0)
    assert wait == 2.0
    assert bucket.take(1.0, 1.9) > 0.0
    assert bucket.take(1.0, 2.0) == 0.0


def test_more_than_the_burst_is_taken_when_it_is_full_and_leaves_a_debt() -> None:
    bucket = TokenBucket(1.0, 4.0, now=0.0)
    assert bucket.take(10.0, 0.0) == 0.0
    assert bucket.wait_s(1.0, 0.0) == 7.0


def test_a_clock_that_stands_or_falls_back_fills_nothing() -> None:
    bucket = TokenBucket(1.0, 1.0, now=5.0)
    assert bucket.take(1.0, 5.0) == 0.0
    assert bucket.take(1.0, 3.0) > 0.0
    assert bucket.take(1.0, 5.5) > 0.0
    assert bucket.take(1.0, 6.0) == 0.0


@given(
    rate=st.floats(0.01, 1e6),
    burst=st.floats(1.0, 1e6),
    takes=st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.1, 100.0)), max_size=60),
)
def test_never_more_than_burst_and_rate(rate: float, burst: float, takes: list[tuple[float, float]]) -> None:
    bucket, now, taken, largest = TokenBucket(rate, burst, now=0.0), 0.0, 0.0, 0.0
    for pause, amount in takes:
        now += pause
        if bucket.take(amount, now) == 0.0:
            taken += amount
            largest = max(largest, amount)
    assert taken <= (burst + rate * now + largest) * (1 + 1e-9)

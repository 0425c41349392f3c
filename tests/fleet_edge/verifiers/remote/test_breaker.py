import random

from fleet_edge.verifiers.remote.endpoint import Breaker
from tests.support.memory_fleet import Clock


def breaker(clock: Clock) -> Breaker:
    return Breaker(clock, random.Random(1))


def test_a_failure_opens_it_until_a_trial_has_succeeded() -> None:
    one = breaker(Clock())
    assert one.failed("It is gone.")
    assert (one.closed, one.reason) == (False, "It is gone.")
    one.succeeded()  # an answer that was under way proves nothing of what comes
    assert not one.closed
    assert one.proved()
    assert one.closed
    assert not one.proved()


def test_what_may_be_the_requests_fault_opens_it_when_it_goes_on() -> None:
    one = breaker(Clock())
    assert not one.failed("Status 500.", suspect=True)
    assert not one.failed("Status 500.", suspect=True)
    one.succeeded()
    assert not one.failed("Status 500.", suspect=True)
    assert not one.failed("Status 500.", suspect=True)
    assert one.failed("Status 500.", suspect=True)


def test_trials_come_ever_more_seldom_and_never_stop() -> None:
    clock = Clock()
    one = breaker(clock)
    one.failed("It is gone.")
    waits = []
    for _ in range(12):
        waits.append(one.trial_in_s)
        clock.seconds += one.trial_in_s
        assert one.trial_in_s == 0.0
        one.disproved("It is gone.")
    assert 0.3 < waits[0] < 0.7
    assert waits[:4] == sorted(waits[:4])
    assert 11.0 < waits[-1] < 19.0

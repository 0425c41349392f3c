import random

import pytest

from fleet_edge.batching.step_cost import RunningRequests, StepCost
from tests.support.drafts import step_report


def test_requests_are_present_while_their_devices_draft() -> None:
    present = RunningRequests()
    present.on_step(step_report({1: 1, 2: 1}, step_s=0.02, at=10.0))
    present.on_step(step_report({3: 1}, step_s=0.02, at=10.5))
    assert present.count == 3
    present.on_step(step_report({3: 1}, step_s=0.02, at=11.2))
    assert present.count == 1


def test_where_steps_are_long_a_text_that_was_not_in_the_last_ones_is_present() -> None:
    present = RunningRequests()
    present.on_step(step_report({1: 1}, step_s=0.8, at=10.0))
    present.on_step(step_report({2: 1}, step_s=0.8, at=13.0))
    assert present.count == 2
    present.on_step(step_report({2: 1}, step_s=0.8, at=13.3))
    assert present.count == 1


def test_a_text_that_has_ended_is_gone_at_once() -> None:
    present = RunningRequests()
    present.on_step(step_report({1: 1, 2: 1}, step_s=0.02, at=10.0))
    present.forget(1)
    present.forget(7)
    assert present.count == 1


def test_a_text_that_was_granted_is_present_before_it_is_in_a_step_but_not_for_ever() -> None:
    present = RunningRequests()
    present.on_open(1)
    present.on_open(2)
    assert present.count == 2
    present.on_step(step_report({1: 1}, step_s=0.02, at=10.0))
    assert present.count == 2
    present.on_step(step_report({1: 1}, step_s=0.02, at=11.5))  # the other is open, and no session decodes
    assert present.count == 1


def test_the_recent_time_of_a_step_is_smoothed() -> None:
    """One quick step does not make all steps quick, and prompts alone are no steps that a draft waits for."""
    cost = StepCost(1)
    assert cost.recent_s == 0.0
    cost.on_step(step_report({1: 1}, step_s=0.1))
    assert cost.recent_s == pytest.approx(0.1)
    cost.on_step(step_report({}, step_s=9.0))
    cost.on_step(step_report({1: 1}, step_s=0.02))
    assert 0.02 < cost.recent_s < 0.1
    for _ in range(20):
        cost.on_step(step_report({1: 1}, step_s=0.02))
    assert cost.recent_s == pytest.approx(0.02, rel=0.01)


def measured(*, first_ms: float, token_ms: float, sessions: int = 1, least: int = 1, noise: float = 0.0) -> StepCost:
    cost, rng = StepCost(least), random.Random(1)
    for number in range(200):
        further = number % 5
        seconds = (first_ms + token_ms * (sessions + further)) * 1e-3 * (1.0 + noise * rng.uniform(-1.0, 1.0))
        cost.add_step(seconds, requests=sessions, further=further)
        cost.add_committed(sessions)
    return cost


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_what_a_token_more_costs_is_measured(noise: float) -> None:
    cost = measured(first_ms=20.0, token_ms=5.0, noise=noise)
    assert cost.token_s is not None
    # The estimate is conservative, because noise may look like a slope.
    assert 3.5e-3 < cost.token_s < 6.0e-3


def test_a_text_more_and_a_token_more_of_a_text_are_told_apart() -> None:
    """A request costs 4 ms; counted as token cost, it would make drafts look expensive to devices."""
    cost = StepCost(1)
    for number in range(200):
        requests, further = 1 + number % 4, (number // 4) % 7
        cost.add_step(0.010 + 0.004 * requests + 0.001 * further, requests=requests, further=further)
        cost.add_committed(requests)
    assert cost.token_s == pytest.approx(0.001, rel=0.2)


def test_what_was_learnt_at_other_loads_stays_known_while_all_draft_alike() -> None:
    """Sixteen devices with drafts of three tokens: their numbers correlate, and separate no costs."""
    cost = StepCost(1)
    for number in range(300):
        requests, further = 1 + number % 4, (number // 4) % 7
        cost.add_step(0.010 + 0.004 * requests + 0.001 * further, requests=requests, further=further)
        cost.add_committed(requests)
    for number in range(300):
        requests = 12 + number % 5
        cost.add_step(0.010 + 0.007 * requests, requests=requests, further=3 * requests)
        cost.add_committed(2 * requests)
    assert cost.token_s == pytest.approx(0.001, rel=0.3)


def test_where_edges_only_write_requests_alone_are_told() -> None:
    cost = StepCost(1)
    for number in range(200):
        requests = 1 + number % 4
        cost.add_step(0.010 + 0.004 * requests, requests=requests, further=0, verifies=False)
        cost.add_committed(requests)
    assert cost.token_s is None
    assert (cost.parts(4).step_s, cost.parts(4).token_s) == (None, None)


def test_steps_that_are_all_alike_tell_nothing() -> None:
    cost = StepCost(1)
    assert cost.token_s is None
    for _ in range(100):
        cost.add_step(0.02, requests=4, further=0)
        cost.add_committed(4)
    assert cost.token_s is None


def test_a_token_costs_nothing_less_than_nothing_and_no_more_than_the_mean_one() -> None:
    falling, steep = StepCost(1), StepCost(1)
    for number in range(200):
        further = number % 5
        falling.add_step(0.05 - 0.002 * further, requests=1, further=further)
        falling.add_committed(1)
        steep.add_step(0.001 * (1 + further) ** 3, requests=1, further=further)
        steep.add_committed(1)
    assert falling.token_s == 0.0
    assert steep.token_s is not None


def test_a_token_costs_what_it_does_at_the_present_load() -> None:
    """One core: 7 ms with one request, 1 ms with sixteen; in between loads change all the time."""
    cost, rng = StepCost(1), random.Random(2)
    for _ in range(400):
        requests = rng.choice((1, 2, 14, 15, 16))
        further = requests * rng.randrange(5)
        token_s = 0.007 if requests < 3 else 0.001
        cost.add_step(0.012 + 0.009 * requests + token_s * further, requests=requests, further=further)
        cost.add_committed(requests)
    told = {}
    for requests in (1, 16):
        cost.add_step(0.012 + 0.009 * requests, requests=requests, further=0, verifies=False)
        cost.add_committed(requests)
        told[requests] = cost.token_s
    assert told == {1: pytest.approx(0.007, rel=0.35), 16: pytest.approx(0.001, rel=0.35)}


def test_writing_and_verifying_are_told_apart() -> None:
    """Requests with one token each are computed at once; drafts of various lengths take more passes."""
    cost, rng = StepCost(1), random.Random(3)
    for number in range(400):
        requests = rng.randrange(2, 17)
        further = requests * rng.randrange(1, 5) if number % 2 else 0
        seconds = 0.060 + 0.006 * requests + 0.002 * further if further else 0.020 + 0.005 * requests
        cost.add_step(seconds, requests=requests, further=further, verifies=further > 0)
        cost.add_committed(requests)
    parts = cost.parts(16)
    assert parts.writing_s == pytest.approx(0.100, rel=0.03)
    assert parts.step_s == pytest.approx(0.060, rel=0.2)  # held back, as far as all steps say otherwise
    assert parts.request_s == pytest.approx(0.006, rel=0.25)
    assert parts.token_s == pytest.approx(0.002, rel=0.15)


def test_what_steps_take_that_write_is_known_however_long_ago_they_did() -> None:
    cost = StepCost(1)
    for number in range(50):
        requests = 2 + number % 8
        cost.add_step(0.020 + 0.005 * requests, requests=requests, further=0, verifies=False)
        cost.add_committed(requests)
    for number in range(5000):
        requests, further = 2 + number % 8, 4 + number % 5
        cost.add_step(0.100 + 0.010 * further, requests=requests, further=further)
        cost.add_committed(requests)
    assert cost.parts(8).writing_s == pytest.approx(0.060, rel=0.1)


def test_of_a_text_by_itself_the_steps_are_told_that_had_one() -> None:
    cost = StepCost(1)
    for number in range(400):
        requests, further = 1 + number % 2 * 15, number % 5
        token_s = 0.007 if requests == 1 else 0.001
        cost.add_step(0.012 + 0.009 * requests + token_s * further, requests=requests, further=further)
        cost.add_committed(requests)
    assert cost.parts(1).token_s == pytest.approx(0.007, rel=0.35)


def test_what_the_edge_guesses_right_makes_it_write_more_quickly() -> None:
    cost = StepCost(1)
    for number in range(50):
        requests = 2 + number % 8
        cost.add_step(0.020 + 0.005 * requests, requests=requests, further=requests, verifies=False)
        cost.add_committed(2 * requests)
    assert cost.parts(8).writing_s == pytest.approx(0.030, rel=0.1)


def test_a_token_that_its_device_gave_up_is_written_all_the_same() -> None:
    """A device that returns to drafting voids what the edge generates meanwhile."""
    cost = StepCost(1)
    for number in range(50):
        cost.add_step(0.050, requests=4, further=0, verifies=False)
        for _ in range(4 if number % 2 else 1):
            cost.add_committed(1)
    assert cost.parts(4).writing_s == pytest.approx(0.050)


def test_a_token_that_a_step_with_prompts_brings_does_not_count_as_written() -> None:
    cost = StepCost(1)
    for _ in range(50):
        cost.add_step(0.050, requests=4, further=0, verifies=False)
        cost.add_committed(4)
        cost.add_prompts(0.5, tokens=100)
        cost.add_committed(4)
    assert cost.parts(4).writing_s == pytest.approx(0.050)

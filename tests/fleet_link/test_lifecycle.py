import random

from fleet_link.lifecycle import Backoff


def delays(seed: int, count: int = 12) -> list[float]:
    backoff = Backoff(minimum_s=0.2, maximum_s=30.0, rng=random.Random(seed))
    return [backoff.next_delay_s() for _ in range(count)]


def test_each_delay_lies_in_the_upper_half_of_its_doubling_step() -> None:
    steps = [min(0.2 * 2**attempt, 30.0) for attempt in range(12)]
    for seed in range(50):
        assert all(step / 2 <= delay <= step for delay, step in zip(delays(seed), steps, strict=True))


def test_two_clients_do_not_come_back_together() -> None:
    assert delays(1) != delays(2)


def test_a_connection_that_held_begins_again_with_the_minimum() -> None:
    backoff = Backoff(minimum_s=0.2, maximum_s=30.0, rng=random.Random(0))
    for _ in range(10):
        backoff.next_delay_s()
    backoff.reset()
    assert backoff.next_delay_s() <= 0.2

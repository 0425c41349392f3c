from itertools import islice

import numpy as np

from benchmarks.capacity.devices import Arrival, Arrivals


def pauses(client: int, how: Arrivals, number: int = 2000, seed: int = 0) -> list[float]:
    asked = Arrival.of(client, "abc", how, pause_s=2.0, seed=seed)
    return [arrival.pause_s for arrival in islice(asked, number)]


def test_all_at_once_nobody_pauses() -> None:
    assert set(pauses(3, Arrivals.AT_ONCE)) == {0.0}


def test_poisson_arrivals_are_exponentially_distributed() -> None:
    found = np.array(pauses(0, Arrivals.POISSON))
    # Of 2,000 with mean 2 the mean has a standard error of 0.045, the share above the mean one of 0.011: 4 of each.
    assert abs(found.mean() - 2.0) < 0.18
    assert abs((found > 2.0).mean() - np.exp(-1.0)) < 0.044


def test_a_seed_repeats_its_arrivals_and_clients_differ() -> None:
    assert pauses(1, Arrivals.POISSON) == pauses(1, Arrivals.POISSON)
    assert pauses(1, Arrivals.POISSON) != pauses(2, Arrivals.POISSON)
    assert pauses(1, Arrivals.POISSON) != pauses(1, Arrivals.POISSON, seed=1)


def test_each_client_begins_with_another_text_and_goes_through_all() -> None:
    asked = [Arrival.of(client, "abc", Arrivals.AT_ONCE, pause_s=0.0, seed=0) for client in range(4)]
    texts = ["".join(arrival.text for arrival in islice(each, 4)) for each in asked]
    assert texts == ["abca", "bcab", "cabc", "abca"]

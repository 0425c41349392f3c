import pytest

from fleet_edge.verifiers.remote.pool import Affinity

URLS = [f"http://10.0.0.{number}:8000" for number in range(4)]


def test_a_sequence_stays_where_it_is() -> None:
    affinity = Affinity(URLS)
    first = {key: affinity.place(key, available=URLS) for key in range(100)}
    assert {key: affinity.place(key, available=URLS) for key in range(100)} == first


def test_two_edges_place_alike() -> None:
    one, other = Affinity(URLS), Affinity(list(reversed(URLS)))
    assert [one.place(key, available=URLS) for key in range(50)] == [
        other.place(key, available=URLS) for key in range(50)
    ]


@pytest.mark.parametrize("number", [1, 2, 3, 16, 100, 1000])
def test_no_endpoint_has_much_more_than_its_share(number: int) -> None:
    affinity = Affinity(URLS)
    for key in range(number):
        affinity.place(key * 7919, available=URLS)
    assert sum(affinity.loads.values()) == number
    assert max(affinity.loads.values()) <= 1.25 * number / len(URLS) + 1


def test_only_the_sequences_of_an_endpoint_that_goes_move() -> None:
    affinity = Affinity(URLS)
    first = {key: affinity.place(key, available=URLS) for key in range(200)}
    left = [url for url in URLS if url != URLS[1]]
    then = {key: affinity.place(key, available=left) for key in range(200)}
    assert all(then[key] == first[key] for key in first if first[key] != URLS[1])
    assert URLS[1] not in then.values()
    assert affinity.loads[URLS[1]] == 0
    assert max(affinity.loads.values()) <= 1.25 * 200 / 3 + 1


def test_what_has_ended_counts_no_more() -> None:
    affinity = Affinity(URLS)
    for key in range(10):
        affinity.place(key, available=URLS)
        affinity.forget(key)
    affinity.forget(99)
    assert set(affinity.loads.values()) == {0}


def test_a_fork_goes_where_its_source_is_unless_that_one_has_its_share() -> None:
    affinity = Affinity(URLS)
    at = {key: affinity.place(key, available=URLS) for key in range(16)}
    source = min(at, key=lambda key: affinity.loads[at[key]])
    affinity.follow(100, source)
    assert affinity.place(100, available=URLS) == at[source]
    for key in range(101, 140):
        affinity.follow(key, source)
        affinity.place(key, available=URLS)
    assert max(affinity.loads.values()) <= 1.25 * 56 / len(URLS) + 1


def test_without_any_endpoint_there_is_no_place() -> None:
    with pytest.raises(ValueError, match="no endpoint"):
        Affinity(URLS).place(1, available=[])

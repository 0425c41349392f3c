"""The fair queue: order, bounds, and each key's share whatever the others do."""

from collections import Counter, deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_common.fair_queue import FairQueue

KEYS = st.sampled_from("abcd")
COSTS = st.sampled_from([0.5, 1.0, 3.0, 250.0])


def taken(queue: FairQueue[str, tuple[str, int]], number: int) -> Iterator[tuple[str, int]]:
    for _ in range(number):
        entry = queue.take()
        assert entry is not None
        yield entry


def test_a_backlog_of_one_key_delays_another_by_one_entry() -> None:
    queue = FairQueue[str, tuple[str, int]](bound=10_000)
    for number in range(5_000):
        queue.put("hostile", ("hostile", number))
    queue.put("honest", ("honest", 0))
    assert ("honest", 0) in list(taken(queue, 2))


def test_keys_share_by_cost_and_not_by_entries() -> None:
    queue = FairQueue[str, tuple[str, int]](bound=10_000, quantum=10.0)
    for number in range(2_000):
        queue.put("small", ("small", number), cost=1.0)
        queue.put("large", ("large", number), cost=25.0)
    costs = Counter[str]()
    for key, _ in taken(queue, 1_000):
        costs[key] += {"small": 1, "large": 25}[key]
    assert costs["large"] == pytest.approx(costs["small"], abs=35)


def test_an_entry_of_many_quanta_comes_out_at_once_where_nothing_else_waits() -> None:
    queue = FairQueue[str, tuple[str, int]](bound=10)
    queue.put("a", ("a", 0), cost=1e12)
    assert queue.take() == ("a", 0)


def test_a_full_queue_takes_room_from_the_key_that_holds_most() -> None:
    queue = FairQueue[str, tuple[str, int]](bound=4)
    for number in range(3):
        assert queue.put("hostile", ("hostile", number)) is None
    assert queue.put("honest", ("honest", 0)) is None
    assert queue.put("hostile", ("hostile", 3)) == ("hostile", 3)
    assert queue.put("honest", ("honest", 1)) == ("hostile", 2)
    assert queue.put("other", ("other", 0)) in {("hostile", 1), ("honest", 1)}
    assert len(queue) == 4


def test_no_key_that_holds_less_than_its_share_loses_anything() -> None:
    queue = FairQueue[str, tuple[str, int]](bound=100)
    honest = [("honest", number) for number in range(20)]
    lost = []
    for number in range(1_000):
        lost += [queue.put(hostile, (hostile, number)) for hostile in ("h1", "h2", "h3")]
        if number % 50 == 0:
            lost.append(queue.put("honest", honest[number // 50]))
    assert not set(lost) & set(honest)
    assert queue.waiting("honest") == 20


@given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "put", "put", "take", "back", "drop"]), KEYS, COSTS), max_size=120)
)
@settings(max_examples=300, deadline=None)
def test_it_is_a_queue_for_each_key_under_one_bound(steps: list[tuple[str, str, float]]) -> None:
    bound = 12
    queue = FairQueue[str, tuple[str, int]](bound=bound, quantum=2.0)
    model: dict[str, deque[tuple[str, int]]] = {key: deque() for key in "abcd"}
    last: tuple[str, int] | None = None
    for number, (what, key, cost) in enumerate(steps):
        entry = (key, number)
        total = sum(map(len, model.values()))
        if what == "put":
            dropped = queue.put(key, entry, cost=cost)
            if total < bound:
                assert dropped is None
            elif dropped != entry:
                assert dropped is not None
                assert dropped == model[dropped[0]].pop()
                assert len(model[dropped[0]]) >= len(model[key])
            if dropped != entry:
                model[key].append(entry)
        elif what == "take":
            peeked = queue.peek()
            last = queue.take()
            assert last == peeked
            assert (last is None) == (total == 0)
            if last is not None:
                assert last == model[last[0]].popleft()
        elif what == "back" and last is not None:
            queue.put_back(last[0], last, cost=cost)
            model[last[0]].appendleft(last)
            last = None
        elif what == "drop" and model[key]:
            assert queue.drop_newest(key) == model[key].pop()
        assert len(queue) == sum(map(len, model.values()))
        assert all(queue.waiting(each) == len(model[each]) for each in model)
        assert sorted(queue) == sorted(entry for each in model.values() for entry in each)

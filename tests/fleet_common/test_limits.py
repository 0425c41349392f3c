from collections import Counter, deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st

from fleet_common.limits import Connections, FairQueue, TokenBucket, network_of

KEYS = st.sampled_from("abcd")
COSTS = st.sampled_from([0.5, 1.0, 3.0, 250.0])


def taken(queue: FairQueue[str, tuple[str, int]], number: int) -> Iterator[tuple[str, int]]:
    for _ in range(number):
        entry = queue.pop()
        assert entry is not None
        yield entry


def test_keys_share_by_cost_and_not_by_entries() -> None:
    queue = FairQueue[str, tuple[str, int]](bound=10_000, quantum=10.0)
    for number in range(2_000):
        queue.put("small", ("small", number), cost=1.0)
        queue.put("large", ("large", number), cost=25.0)
    costs = Counter[str]()
    for key, _ in taken(queue, 1_000):
        costs[key] += {"small": 1, "large": 25}[key]
    assert costs["large"] == pytest.approx(costs["small"], abs=35)


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
                assert dropped == model[dropped[0]].pop()
                assert len(model[dropped[0]]) >= len(model[key])
            if dropped != entry:
                model[key].append(entry)
        elif what == "take":
            peeked = queue.peek()
            last = queue.pop()
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


def test_it_says_when_it_is_worth_asking_again() -> None:
    bucket = TokenBucket(2.0, 4.0, now=0.0)
    bucket.spend(7.0, 0.0)
    wait = bucket.wait_s(1.0, 0.0)
    assert wait == 2.0
    assert bucket.try_spend(1.0, 1.9) > 0.0
    assert bucket.try_spend(1.0, 2.0) == 0.0


def test_more_than_the_burst_is_taken_when_it_is_full_and_leaves_a_debt() -> None:
    bucket = TokenBucket(1.0, 4.0, now=0.0)
    assert bucket.try_spend(10.0, 0.0) == 0.0
    assert bucket.wait_s(1.0, 0.0) == 7.0


def test_a_clock_that_stands_or_falls_back_fills_nothing() -> None:
    bucket = TokenBucket(1.0, 1.0, now=5.0)
    assert bucket.try_spend(1.0, 5.0) == 0.0
    assert bucket.try_spend(1.0, 3.0) > 0.0
    assert bucket.try_spend(1.0, 5.5) > 0.0
    assert bucket.try_spend(1.0, 6.0) == 0.0


@given(
    rate=st.floats(0.01, 1e6),
    burst=st.floats(1.0, 1e6),
    takes=st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.1, 100.0)), max_size=60),
)
def test_never_more_than_burst_and_rate(rate: float, burst: float, takes: list[tuple[float, float]]) -> None:
    bucket, now, taken, largest = TokenBucket(rate, burst, now=0.0), 0.0, 0.0, 0.0
    for pause, amount in takes:
        now += pause
        if bucket.try_spend(amount, now) == 0.0:
            taken += amount
            largest = max(largest, amount)
    assert taken <= (burst + rate * now + largest) * (1 + 1e-9)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def table(most: int = 3, **given: float) -> Connections[str]:
    return Connections(most, clock=Clock(), **given)


def test_the_oldest_of_the_busiest_network_ends_first() -> None:
    known = table(4)
    for name, address in (("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.2"), ("d", "10.0.0.3")):
        assert known.add(name, address) is None
    assert known.add("e", "10.0.0.4") == "b"
    assert known.add("f", "10.0.0.4") == "a", "all have as many, but for the newest"


def test_what_is_answered_stays_and_a_new_one_is_refused_if_all_are() -> None:
    known = table(2)
    known.add("a", "10.0.0.1")
    known.add("b", "10.0.0.1")
    known.note("a", waits=False)
    assert known.add("c", "10.0.0.1") == "b"
    known.note("c", waits=False)
    assert known.add("d", "10.0.0.1") == "d"
    assert len(known) == 2
    known.note("c", waits=True)
    assert known.add("d", "10.0.0.1") == "c"
    known.discard("a")
    known.discard("a")
    assert known.add("e", "10.0.0.1") is None


def test_an_answer_that_is_not_taken_ends_where_there_is_a_limit() -> None:
    known = table(2, answer_s=3.0)
    for name in ("a", "b"):
        known.add(name, "10.0.0.1")
        known.note(name, waits=False)
    assert known.add("c", "10.0.0.2") == "c"
    assert known.add("c", "10.0.0.2") == "a"


def test_a_request_that_comes_in_drops_is_overdue() -> None:
    clock = Clock()
    known: Connections[str] = Connections(9, clock=clock)
    known.add("slow", "10.0.0.1")
    known.add("answered", "10.0.0.1")
    known.note("answered", waits=False)
    for _ in range(5):
        clock()
        known.note("slow", waits=True)  # another drop
    assert known.overdue(wait_s=3.0) == ["slow"]
    assert known.overdue(wait_s=99.0, answer_s=1.0) == ["answered"]
    clock()
    known.note("answered", waits=True)
    assert known.overdue(wait_s=3.0) == ["slow"], "its time begins again with each answer"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("unknown", "unknown", True),
    ],
)
def test_networks(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["10.0.0.1", "10.0.0.2"]), st.booleans()), max_size=40))
def test_there_are_never_more_than_the_most(steps: list[tuple[int, str, bool]]) -> None:
    known: Connections[int] = Connections(3, clock=Clock())
    there: set[int] = set()
    for number, address, waits in steps:
        if number in there:
            known.note(number, waits=waits)
        else:
            there.add(number)
            ends = known.add(number, address)
            there.discard(-1 if ends is None else ends)
        assert len(known) == len(there) <= 3

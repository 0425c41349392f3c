"""Which connections end first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_common.connections import Connections, network_of


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

"""When a text that goes on without an edge asks for one again."""

import pytest

from fleet_device.client.rejoining import Rejoining


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rejoining(clock: Clock) -> Rejoining:
    alone = Rejoining(clock)
    alone.alone("The edge is gone.")
    return alone


def test_an_edge_is_asked_for_after_five_seconds(rejoining: Rejoining, clock: Clock) -> None:
    clock.now += 4.9
    assert not rejoining.is_due
    assert rejoining.left_s == pytest.approx(0.1)
    clock.now += 0.2
    assert rejoining.is_due
    assert rejoining.left_s == 0.0


def test_an_edge_that_is_back_is_asked_sooner_but_not_at_once(rejoining: Rejoining, clock: Clock) -> None:
    rejoining.hasten()
    assert rejoining.left_s == pytest.approx(1.0)
    clock.now += 3.0
    rejoining.hasten()
    assert rejoining.is_due


def test_an_edge_has_a_second_to_answer(rejoining: Rejoining, clock: Clock) -> None:
    rejoining.ask()
    assert rejoining.asking
    assert rejoining.left_s == pytest.approx(1.0)
    clock.now += 1.0
    assert rejoining.is_due
    rejoining.alone(rejoining.cause)
    assert not rejoining.asking
    assert rejoining.left_s == pytest.approx(5.0)


def test_an_edge_that_refuses_is_asked_no_sooner_than_it_says(rejoining: Rejoining) -> None:
    rejoining.ask()
    rejoining.alone("The edge is full.", pause_s=30.0)
    assert rejoining.cause == "The edge is full."
    assert rejoining.left_s == pytest.approx(35.0)


def test_where_no_edge_is_there_it_is_put_off(rejoining: Rejoining, clock: Clock) -> None:
    clock.now += 10.0
    rejoining.put_off()
    assert not rejoining.asking
    assert rejoining.left_s == pytest.approx(5.0)

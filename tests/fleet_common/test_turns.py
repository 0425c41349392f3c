import threading

import pytest

from fleet_common.turns import Turns
from tests.support.waiting import until


def test_a_turn_is_handed_on_in_the_order_in_which_it_was_asked_for() -> None:
    turns, order = Turns(), list[int]()

    def take(number: int) -> None:
        for _ in range(3):
            with turns:
                order.append(number)
                # Whoever gives it back here asks for it again while the others wait.
                if len(order) <= 6:
                    until(lambda: turns.waiting == 2)

    with turns:
        threads = []
        for number in range(3):
            threads.append(threading.Thread(target=take, args=(number,), daemon=True))
            threads[-1].start()
            until(lambda: turns.waiting == len(threads))
    for thread in threads:
        thread.join(10.0)
    assert order == [0, 1, 2] * 3


def test_one_holds_it_at_a_time() -> None:
    turns, inside, most = Turns(), list[int](), list[int]()

    def take(number: int) -> None:
        for _ in range(200):
            with turns:
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=take, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert max(most) == 1
    assert len(most) == 800


def test_an_error_gives_it_back() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns:
        raise ZeroDivisionError
    with turns:
        pass

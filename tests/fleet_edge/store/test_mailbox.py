import threading

from fleet_edge.store.mailbox import Mailbox
from fleet_edge.store.records.record import Record
from tests.fleet_edge.store import samples


def _rounds(start: int, stop: int) -> list[Record]:
    return [samples.judged(round=number) for number in range(start, stop)]


def _filled(count: int, *, capacity: int = 100) -> Mailbox:
    mailbox = Mailbox(capacity)
    for record in _rounds(0, count):
        mailbox.put(record)
    return mailbox


def test_records_are_taken_in_order_and_can_be_put_back() -> None:
    mailbox = _filled(5)
    taken = mailbox.take(3)
    assert taken == _rounds(0, 3)
    mailbox.put_back(taken)
    assert mailbox.take(10) == _rounds(0, 5)


def test_records_that_find_no_room_are_counted() -> None:
    mailbox = _filled(7, capacity=5)
    assert (len(mailbox), mailbox.dropped) == (5, 2)
    assert mailbox.take(10) == _rounds(0, 5)


def test_a_closed_mailbox_takes_nothing_and_keeps_what_it_has() -> None:
    mailbox = _filled(2)
    mailbox.close()
    mailbox.put(samples.judged())
    assert (len(mailbox), mailbox.dropped) == (2, 1)
    mailbox.drop_all()
    assert (len(mailbox), mailbox.dropped) == (0, 3)


def test_waiting_ends_with_the_count_the_time_or_the_end() -> None:
    mailbox = _filled(3)
    assert mailbox.wait(3, timeout_s=0.0)
    assert not mailbox.wait(4, timeout_s=0.0)
    waiter = threading.Thread(target=mailbox.wait, args=(4,), kwargs={"timeout_s": 30.0})
    waiter.start()
    mailbox.put(samples.judged())
    waiter.join(10)
    assert not waiter.is_alive()
    mailbox.close()
    assert not mailbox.wait(100, timeout_s=30.0)


def test_an_urgent_record_wakes_those_who_wait_for_one_until_it_is_taken() -> None:
    mailbox = _filled(2)
    assert mailbox.put(samples.judged(), urgent=True)
    assert not mailbox.wait(100, timeout_s=30.0, or_urgent=True), "it returns at once, and says that there are not 100"
    assert not mailbox.wait(4, timeout_s=0.0)
    mailbox.take(10)
    assert not mailbox.wait(1, timeout_s=0.0, or_urgent=True)

import pytest

from broker_config.monitoring import DROPPED, MOST_SHARED, NOTICES, SHARED, LimitWatch


def test_only_what_is_new_is_told() -> None:
    watch = LimitWatch()
    told = [watch.take(DROPPED, value) for value in (b"0", b"3", b"3", b"5", b"1", b"nonsense", b"\xff", "²".encode())]
    new = [event.sentence.split()[4] if event else "none" for event in told]
    assert new == ["none", "3", "none", "2", "1", "none", "none", "none"]


def test_shared_subscriptions_are_told_of_when_there_are_too_many_and_when_they_grow() -> None:
    watch = LimitWatch()
    counts = (1, MOST_SHARED, MOST_SHARED + 1, MOST_SHARED + 1, 5000, 4000, 3, MOST_SHARED + 2)
    told = [watch.take(SHARED, b"%d" % count) for count in counts]
    assert [event is not None for event in told] == [False, False, True, False, True, False, False, True]
    assert {event.limit for event in told if event} == {"subscriptions"}
    assert watch.take(SHARED, b"nonsense") is None


@pytest.mark.parametrize(
    ("line", "limit", "who"),
    [
        (b"2026-01-01T00:00:00: Outgoing messages are being dropped for client d-1.", "queue", "d-1"),
        (b"Dropping too large outgoing PUBLISH for d-1 (1039 bytes)", "packet", "d-1"),
        (b"Client connection from 10.0.0.9 denied: max_connections exceeded.", "connections", "10.0.0.9"),
    ],
)
def test_a_line_of_the_log_names_the_client(line: bytes, limit: str, who: str) -> None:
    event = LimitWatch().take(NOTICES, line)
    assert (event.limit, event.who) == (limit, who)
    assert who in event.sentence


def test_other_lines_tell_nothing() -> None:
    assert LimitWatch().take(NOTICES, b"New client connected from 10.0.0.9:1 as d-1 (p5, c1, k15, u'd-1').") is None


def test_what_could_move_a_terminals_cursor_is_replaced() -> None:
    event = LimitWatch().take(NOTICES, b"Outgoing messages are being dropped for client d\x1b[2J.")
    assert event.who == "d\ufffd[2J"

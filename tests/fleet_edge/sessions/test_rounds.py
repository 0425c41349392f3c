from fleet_edge.sessions.rounds import Rounds


def test_verdicts_are_remembered_for_twice_the_window() -> None:
    rounds = Rounds(window=2)
    for round_ in range(5):
        rounds.remember(round_, b"%d" % round_)
    assert [rounds.verdict(round_) for round_ in range(6)] == [None, b"1", b"2", b"3", b"4", None]


def test_a_round_has_passed_once_it_or_a_later_one_is_answered() -> None:
    rounds = Rounds(window=2)
    assert not rounds.passed(0)
    rounds.remember(3, b"")
    rounds.remember(2, b"")
    assert [rounds.passed(round_) for round_ in range(5)] == [True, True, True, True, False]


def test_a_round_is_seen_for_the_first_time_once_in_whatever_order_it_comes() -> None:
    rounds = Rounds(window=2)
    assert [rounds.first_seen(round_) for round_ in (1, 0, 1, 0, 2)] == [True, True, False, False, True]


def test_what_came_so_long_ago_that_it_is_forgotten_is_not_taken_for_new() -> None:
    rounds = Rounds(window=2)
    assert all(rounds.first_seen(round_) for round_ in range(6))
    assert not any(rounds.first_seen(round_) for round_ in range(6))

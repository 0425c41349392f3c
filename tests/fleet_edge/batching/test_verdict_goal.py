"""Verdict goal: new sessions are refused, with a time to come back, before those that are served wait too long."""

from fleet_edge.batching.verdict_goal import VerdictGoal


def loaded(goal_s: float, *, verdict_s: float, sessions: int) -> VerdictGoal:
    goal = VerdictGoal(goal_s)
    for step in range(50):
        goal.verified(verdict_s, sessions=sessions, at=100.0 + step * verdict_s)
    return goal


def test_without_a_goal_nobody_is_refused() -> None:
    assert loaded(0.0, verdict_s=30.0, sessions=1000).retry_s(100.0) == 0.0


def test_a_session_is_refused_where_the_goal_would_be_missed_with_it() -> None:
    now = 100.0 + 50 * 0.08
    assert loaded(0.1, verdict_s=0.08, sessions=8).retry_s(now, growing_s=0.08) == 0.0  # 0.08 and an eighth of it
    assert loaded(0.1, verdict_s=0.08, sessions=2).retry_s(now, growing_s=0.08) > 0.0  # 0.08 and half of it
    assert loaded(0.1, verdict_s=0.08, sessions=1).retry_s(now) == 0.0  # what it would be is not known
    assert loaded(0.1, verdict_s=0.09, sessions=1).retry_s(now) > 0.0


def test_those_that_were_just_granted_count_though_no_step_has_had_them() -> None:
    goal, now = loaded(0.1, verdict_s=0.08, sessions=8), 104.0
    assert goal.retry_s(now, growing_s=0.08) == 0.0
    goal.granted(now)
    assert goal.retry_s(now, growing_s=0.08) == 0.0
    goal.granted(now)
    assert goal.retry_s(now, growing_s=0.08) > 0.0
    goal.verified(0.08, sessions=8, at=105.5)
    assert goal.retry_s(105.5, growing_s=0.08) == 0.0


def test_an_edge_that_nobody_uses_any_more_takes_sessions_again() -> None:
    goal = loaded(0.1, verdict_s=0.2, sessions=8)
    assert goal.retry_s(110.0) > 0.0
    assert goal.retry_s(113.0) == 0.0
    goal.verified(0.02, sessions=1, at=113.0)  # what was before is forgotten
    assert goal.retry_s(113.0) == 0.0


def test_who_is_refused_is_told_when_a_text_is_likely_to_end_each_later_than_the_one_before() -> None:
    goal = loaded(0.1, verdict_s=0.2, sessions=8)
    assert goal.retry_s(110.0) == 5.0  # nothing is known
    goal.ended(100.0)
    goal.ended(108.0)
    assert [goal.retry_s(110.0) for _ in range(3)] == [8.0, 16.0, 24.0]
    goal.ended(116.0)
    goal.verified(0.2, sessions=8, at=116.0)
    assert goal.retry_s(116.0) == 8.0
    assert [goal.retry_s(116.0) for _ in range(50)][-1] == 60.0

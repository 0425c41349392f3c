"""Drain: hands over the sessions that are still open when an edge ends."""

from fleet_edge.answers.answers import Answers
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import SessionTable
from fleet_edge.store.records.segments import LeaveReason
from schemas.reasons import EndReason


def hand_over(sessions: SessionTable, *, answers: Answers, scheduler: Scheduler) -> int:
    """Forget all sessions and log it. Their devices hear of it by this edge's state, and resume elsewhere.

    A text that has ended is not handed over, though its Close is still to come: nobody will open it again, and the log
    would have to call it lost one day.

    Returns:
        Number of sessions that go on elsewhere.
    """
    handed_over = 0
    for session in sessions:
        reason = _known_end(session)
        if reason is None:
            handed_over += 1
            answers.left(session, LeaveReason.HANDED_OVER)
        else:
            answers.ended(session, reason)
        sessions.remove(session)
        scheduler.forget(session)
    return handed_over


def _known_end(session: EdgeSession) -> EndReason | None:
    """Return how a text has ended; None if it goes on, as far as the edge knows."""
    if not session.finished:
        return None
    if session.tokens[-1] in session.limits.end_tokens:
        return EndReason.STOP
    return EndReason.LENGTH if session.committed >= session.limits.max_new_tokens else EndReason.FAILED

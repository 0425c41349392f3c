"""Reply messages of an edge: granted, refused, failed to judge, ended."""

from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.sessions.machine import EdgeSession
from schemas.fields import MAX_LABEL, MAX_SENTENCE, EdgeLoad
from schemas.messages import Close, Closed, Draft, Fault, Open, Opened, Refused
from schemas.reasons import EndReason


def opened(
    session: EdgeSession,
    *,
    edge: str,
    target: str,
    lease_s: float,
    load: EdgeLoad,
) -> Opened:
    """Return the grant of a session.

    Args:
        session: As it begins, or goes on.
        edge: This edge's name.
        target: The target model's name.
        lease_s: Seconds of silence after which the session is lost.
        load: What the edge does at present.
    """
    return Opened(
        session=session.session,
        attempt=session.attempt,
        handle=session.handle,
        edge=edge,
        target=target[:MAX_LABEL],
        position=session.committed,
        max_new_tokens=session.limits.max_new_tokens,
        max_draft=session.limits.max_draft,
        window=session.limits.window,
        lease_s=lease_s,
        end_tokens=tuple(sorted(session.limits.end_tokens)),
        logprobs=session.logprobs,
        load=load,
    )


def refused(message: Open, error: OpenRefused) -> Refused:
    """Return the refusal of an Open."""
    return Refused(session=message.session, code=error.code, sentence=str(error)[:MAX_SENTENCE], retry_s=error.retry_s)


def fault(draft: Draft | None, error: DraftFault) -> Fault:
    """Return the fault of a draft, or of a message that could not be read."""
    return Fault(
        handle=draft.handle if draft else None,
        round=draft.round if draft else None,
        code=error.code,
        action=error.action,
        sentence=str(error)[:MAX_SENTENCE],
        retry_s=error.retry_s,
    )


def closed(session: EdgeSession, reason: EndReason) -> Closed:
    """Return the last word on a session."""
    counters = session.counters
    return Closed(
        session=session.session,
        attempt=session.attempt,
        reason=reason,
        tokens=session.committed,
        rounds=counters.rounds,
        mean_batch=counters.mean_batch or 0.0,
        queue_ms=counters.queue_ms,
        compute_ms=counters.compute_ms,
        reused=counters.reused_tokens,
    )


def closed_elsewhere(message: Close) -> Closed:
    """Return the last word on a session that this edge does not know: it has nothing of its own to tell."""
    return Closed(
        session=message.session,
        reason=message.reason,
        tokens=message.tokens,
        rounds=0,
        mean_batch=0.0,
        queue_ms=0.0,
        compute_ms=0.0,
    )

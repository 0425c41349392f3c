from fleet_edge.answers import messages
from fleet_edge.counters import SegmentCounters
from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.sessions.limits import SessionLimits
from schemas.fields import EdgeLoad
from schemas.reasons import Action, EndReason, FaultCode, RefusalCode
from tests.support.drafts import draft, edge_session, open_message


def test_a_grant_names_the_session_and_its_limits() -> None:
    limits = SessionLimits(max_new_tokens=20, max_draft=4, window=2, vocabulary=10, end_tokens=frozenset({9, 0, 5}))
    session = edge_session(attempt=3, resume=(4, 5), limits=limits)
    load = EdgeLoad(texts=2, text_ms=4.5, token_ms=1.25)
    granted = messages.opened(session, edge="edge-1", target="t" * 5000, lease_s=60.0, load=load)
    assert (granted.session, granted.attempt, granted.handle, granted.position) == (b"session1", 3, 7, 2)
    assert (granted.max_new_tokens, granted.max_draft, granted.window, granted.lease_s) == (20, 4, 2, 60.0)
    assert granted.end_tokens == (0, 5, 9)
    assert len(granted.target) == 200
    assert granted.load == load


def test_sentences_are_cut_to_what_a_message_holds() -> None:
    assert len(messages.refused(open_message(), OpenRefused(RefusalCode.BUSY, "x" * 5000)).sentence) == 500
    error = DraftFault(FaultCode.DESYNC, Action.RESUME, "x" * 5000)
    assert len(messages.fault(draft(), error).sentence) == 500


def test_a_fault_names_its_draft_where_there_is_one() -> None:
    error = DraftFault(FaultCode.MALFORMED, Action.GIVE_UP, "Nonsense.")
    told = messages.fault(draft(round_=5), error)
    assert (told.handle, told.round, told.code, told.action) == (7, 5, FaultCode.MALFORMED, Action.GIVE_UP)
    told = messages.fault(None, error)
    assert (told.handle, told.round, told.sentence) == (None, None, "Nonsense.")


def test_the_last_word_tells_what_the_edge_has_counted() -> None:
    session = edge_session(attempt=1, resume=(4, 5))
    session.counters = SegmentCounters(rounds=2, batch_sum=5, queue_ms=7.0)
    last = messages.closed(session, EndReason.LOST)
    assert (last.attempt, last.reason, last.tokens) == (1, EndReason.LOST, 2)
    assert (last.rounds, last.mean_batch, last.queue_ms) == (2, 2.5, 7.0)

import itertools

import pytest

from fleet_edge.errors import DraftFault
from fleet_edge.sessions.states import TRANSITIONS, SessionEvent, SessionState, next_state
from schemas.reasons import Action, FaultCode
from tests.support.drafts import arrived, close, draft, edge_session

OVER = {SessionState.FINISHED, SessionState.FAILED}


def test_every_state_is_reached_from_the_first_and_every_one_can_end() -> None:
    reached = {SessionState.DRAFTING}
    while more := {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached:
        reached |= more
    assert reached == set(SessionState)
    assert all(next_state(state, SessionEvent.ENDED) in OVER for state in SessionState)


def test_nothing_leads_out_of_the_end_and_a_failure_stays() -> None:
    assert all(after in OVER for (before, _), after in TRANSITIONS.items() if before in OVER)
    assert {after for (before, _), after in TRANSITIONS.items() if before is SessionState.FAILED} == {
        SessionState.FAILED
    }


@pytest.mark.parametrize(
    ("state", "event"),
    [pair for pair in itertools.product(SessionState, SessionEvent) if pair not in TRANSITIONS],
)
def test_what_is_not_in_the_table_is_refused(state: SessionState, event: SessionEvent) -> None:
    with pytest.raises(ValueError, match=f"{state.name}"):
        next_state(state, event)


def test_a_session_that_has_failed_answers_drafts_with_the_fault_also_after_its_close() -> None:
    session = edge_session()
    session.fail(DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, "It cannot go on."))
    session.close(close(tokens=0))
    assert session.state is SessionState.FAILED
    with pytest.raises(DraftFault, match="It cannot go on"):
        session.admit(arrived(draft((4, 5))))

import itertools

import pytest

from fleet_edge.errors import DraftFault
from fleet_edge.sessions.states import TRANSITIONS, EdgeSessionEvent, EdgeSessionState, next_state
from schemas.reasons import Action, FaultCode
from tests.support.drafts import arrived, close, draft, edge_session

OVER = {EdgeSessionState.FINISHED, EdgeSessionState.FAILED}


def test_every_state_is_reached_from_the_first_and_every_one_can_end() -> None:
    reached = {EdgeSessionState.DRAFTING}
    while more := {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached:
        reached |= more
    assert reached == set(EdgeSessionState)
    assert all(next_state(state, EdgeSessionEvent.ENDED) in OVER for state in EdgeSessionState)


def test_nothing_leads_out_of_the_end_and_a_failure_stays() -> None:
    assert all(after in OVER for (before, _), after in TRANSITIONS.items() if before in OVER)
    assert {after for (before, _), after in TRANSITIONS.items() if before is EdgeSessionState.FAILED} == {
        EdgeSessionState.FAILED
    }


@pytest.mark.parametrize(
    ("state", "event"),
    [pair for pair in itertools.product(EdgeSessionState, EdgeSessionEvent) if pair not in TRANSITIONS],
)
def test_what_is_not_in_the_table_is_refused(state: EdgeSessionState, event: EdgeSessionEvent) -> None:
    with pytest.raises(ValueError, match=f"{state.name}"):
        next_state(state, event)


def test_a_session_that_has_failed_answers_drafts_with_the_fault_also_after_its_close() -> None:
    session = edge_session()
    session.fail(DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, "It cannot go on."))
    session.close(close(tokens=0))
    assert session.state is EdgeSessionState.FAILED
    with pytest.raises(DraftFault, match="It cannot go on"):
        session.admit(arrived(draft((4, 5))))

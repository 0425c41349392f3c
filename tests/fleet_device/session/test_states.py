import itertools

import pytest

from fleet_device.session.states import TRANSITIONS, SessionEvent, SessionState, next_state


def test_every_state_is_reached_from_the_first_and_every_one_can_end() -> None:
    reached = {SessionState.NEW}
    while True:
        more = {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(SessionState)
    assert all(next_state(state, SessionEvent.ENDED) is SessionState.ENDED for state in SessionState)


def test_nothing_leads_out_of_the_end() -> None:
    assert {event for state, event in TRANSITIONS if state is SessionState.ENDED} == {SessionEvent.ENDED}


@pytest.mark.parametrize(
    ("state", "event"),
    [pair for pair in itertools.product(SessionState, SessionEvent) if pair not in TRANSITIONS],
)
def test_what_is_not_in_the_table_is_refused(state: SessionState, event: SessionEvent) -> None:
    with pytest.raises(ValueError, match=f"{state.name}"):
        next_state(state, event)


def test_a_draft_is_sent_only_while_drafting_and_corrected_only_while_correcting() -> None:
    def states(event: SessionEvent) -> set[SessionState]:
        return {state for state, each in TRANSITIONS if each is event}

    assert states(SessionEvent.DRAFT_SENT) == states(SessionEvent.DRAFT_SENT_AHEAD) == {SessionState.DRAFTING}
    assert states(SessionEvent.CORRECTED) == {SessionState.CORRECTING}

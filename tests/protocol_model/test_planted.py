"""The model finds what it is meant to find: each planted fault, within few runs."""

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.protocol_model.machine import ProtocolModel
from tests.protocol_model.planted import Planted, planted
from tests.protocol_model.test_late_messages import (
    test_a_verdict_of_an_edge_that_was_left_is_not_taken_for_that_of_another as late_verdict,
)
from tests.protocol_model.test_protocol_model import MANY

# They are found to be reported, not to be made small.
FIRST = settings(MANY, phases=(Phase.generate,), report_multiple_bugs=False)
LATE = {Planted.START, Planted.STALE}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(Planted) - LATE))
def test_a_planted_fault_is_found(kind: Planted) -> None:
    with planted(kind), pytest.raises(AssertionError):
        run_state_machine_as_test(ProtocolModel, settings=FIRST)


@pytest.mark.parametrize("kind", sorted(LATE))
def test_a_late_verdict_is_taken_for_another(kind: Planted) -> None:
    with planted(kind), pytest.raises(AssertionError):
        late_verdict()

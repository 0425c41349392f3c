import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.protocol_model.machine import ProtocolModel

# Deterministic runs; python -m tests.protocol_model.check makes random ones.
FEW = settings(max_examples=40, stateful_step_count=50, derandomize=True, database=None, deadline=None)
MANY = settings(FEW, max_examples=400)


def test_the_protocol_keeps_its_promises_in_some_runs() -> None:
    run_state_machine_as_test(ProtocolModel, settings=FEW)


@pytest.mark.exhaustive
def test_the_protocol_keeps_its_promises_in_many_runs() -> None:
    run_state_machine_as_test(ProtocolModel, settings=MANY)

"""Requests that are longer than the draft model's context."""

import pytest

from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import Generation
from schemas.policy import Mode
from tests.support.memory_fleet import MemoryFleet
from tests.support.scripted_edge import LoneDevice

CONTEXT = 24
LENGTH = 40


def _generate(pacing: FixedPacing, *, prompt: int, context: int) -> Generation:
    device = LoneDevice(MemoryFleet(), pacing=pacing, context=context)
    tokens = [1 + index % 4 for index in range(prompt)]
    return device.generate(mode=Mode.COUPLED, prompt=tokens, most=LENGTH)


@pytest.mark.parametrize("pacing", [FixedPacing(3), FixedPacing(2, ahead=True)], ids=["waiting", "ahead"])
@pytest.mark.parametrize("prompt", [2, CONTEXT - 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 5 * CONTEXT])
def test_a_request_outgrows_the_draft_model_and_goes_on_to_the_same_output(pacing: FixedPacing, prompt: int) -> None:
    small, large = (_generate(pacing, prompt=prompt, context=context) for context in (CONTEXT, 4096))
    assert (small.tokens, small.reason) == (large.tokens, large.reason)
    room = max(0, CONTEXT - prompt)
    assert small.counters.edge_only >= len(small.tokens) - room - 1
    assert bool(small.counters.drafted) == (room > 0)
    assert large.counters.edge_only == 0

import random
from collections.abc import Sequence

import pytest

from fleet_device.pacing.contract import FixedPacing
from sampling.distribution import shape
from sampling.drawing import coupled_token
from schemas.messages import Open
from schemas.policy import Mode
from tests.support.memory_fleet import END, TARGET, Device, MemoryFleet, run, terms

LENGTH = 60


def own_text(asked: Open) -> list[int]:
    """Return the edge's own draws, one after another, without the rest of the system."""
    text: list[int] = []
    while len(text) < asked.max_new_tokens and (not text or text[-1] != END):
        p = shape(TARGET.logits((*asked.prompt, *text)), asked.policy)
        text.append(coupled_token(p, asked.policy.seed, len(text)))
    return text


def asked_of(seed: int, mode: Mode, temperature: float, prompt: Sequence[int] = (1, 2)) -> Open:
    return terms(seed, mode=mode, max_new_tokens=LENGTH, temperature=temperature, prompt=prompt)


def edge_only(asked: Open, *, write: int = 16) -> tuple[list[int], MemoryFleet]:
    fleet = MemoryFleet()
    device = Device(fleet, "device-1", asked, length=0, ahead=False, pacing=FixedPacing(write, edge_only=True))
    run(fleet, [device], random.Random(1))
    return list(device.session.committed), fleet


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.8])
def test_a_text_is_what_the_edge_draws_token_by_token(mode: Mode, temperature: float) -> None:
    for seed in range(4):
        asked = asked_of(seed, mode, temperature, prompt=(1, 2, 3, 4, 5) * 3)
        text, fleet = edge_only(asked, write=1 + 7 * seed)
        assert text == own_text(asked)
        (session,) = fleet.known.values()
        assert session.counters.edge_only == len(text)
        assert session.counters.speculated == 0


def test_each_request_to_write_is_one_round_in_the_log() -> None:
    asked = asked_of(3, Mode.RESIDUAL, 0.0)
    _, fleet = edge_only(asked)
    rounds = fleet.sink.of("round")
    assert [record.form for record in rounds] == ["written"] * len(rounds)
    assert len({record.round for record in rounds}) == len(rounds) >= LENGTH // 16
    assert [record.base for record in rounds] == sorted({record.base for record in rounds})
    assert all(record.drafted == record.tested == 0 for record in rounds)
    assert all(record.uplink_bytes > 0 and record.downlink_bytes > 0 and record.batch == 1 for record in rounds)

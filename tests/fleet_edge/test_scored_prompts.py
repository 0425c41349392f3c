import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fleet_device.pacing.contract import EDGE_ONLY_TOKENS, FixedPacing
from fleet_edge.batching.steps import StepReport
from fleet_edge.errors import OpenRefused
from fleet_edge.sessions.admission import SessionOffer, grant
from fleet_edge.verifiers.contract import Item, Logits, TargetInfo
from schemas.messages import Fault, Refused
from schemas.reasons import Action, RefusalCode
from tests.support.drafts import VOCABULARY, open_message
from tests.support.memory_fleet import TARGET, Device, MemoryFleet, run, terms

MAX_ROWS = 64


def scoring(fleet: MemoryFleet, number: int, prompt: Sequence[int], *, logprobs: int = 1) -> Device:
    asked = terms(number, prompt=prompt, max_new_tokens=6).model_copy(update={"logprobs": logprobs, "echo": True})
    pacing = FixedPacing(EDGE_ONLY_TOKENS, edge_only=True)
    return Device(fleet, f"device-{number}", asked, length=0, ahead=False, pacing=pacing)


def prompt(number: int, *, length: int = 100) -> tuple[int, ...]:
    return tuple(1 + (place * (number + 1) + place // 7) % 5 for place in range(length))


def assert_scored(device: Device) -> None:
    tokens = device.terms.prompt
    assert len(device.session.prompt_logprobs) == len(tokens) - 1
    for place, each in enumerate(device.session.prompt_logprobs, start=1):
        logits = TARGET.logits(tokens[:place]).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert each.logprob == pytest.approx(exact[tokens[place]], abs=1e-4)
        assert each.values == pytest.approx([exact.max()], abs=1e-4)


def watched(fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch) -> list[list[Item]]:
    steps: list[list[Item]] = []
    score = fleet.verifier.score

    def watch(items: Sequence[Item]) -> Logits:
        steps.append(list(items))
        return score(items)

    monkeypatch.setattr(fleet.verifier, "score", watch)
    return steps


@pytest.mark.parametrize("kv_tokens", [1 << 20, 260], ids=["roomy", "evicting"])
@pytest.mark.parametrize("sharing", ["all", "off"])
def test_prompts_of_many_devices_are_scored_a_part_in_each_step(
    kv_tokens: int, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = MemoryFleet(kv_tokens=kv_tokens, settings={"prefix_sharing": sharing})
    steps = watched(fleet, monkeypatch)
    # The last two have one prompt: what one has computed is no use to the other, which needs logits.
    devices = [scoring(fleet, number, prompt(min(number, 3))) for number in range(5)]
    run(fleet, devices, random.Random(1))
    for device in devices:
        assert_scored(device)
    assert max(sum(item.rows for item in items if item.rows > 1) for items in steps) <= MAX_ROWS
    assert sum(item.rows for items in steps for item in items if len(item.tokens) > 1) >= 5 * 99


def test_the_share_of_a_device_pays_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = MemoryFleet()
    seen: list[int] = []
    on_step = fleet.edge.scheduler.on_step

    def watch(report: StepReport) -> None:
        seen.append(report.batch.prefilled)
        on_step(report)

    monkeypatch.setattr(fleet.edge.scheduler, "on_step", watch)
    run(fleet, [scoring(fleet, 1, prompt(1))], random.Random(0))
    assert sum(seen) == 99


def test_a_prompt_whose_logits_are_no_numbers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = MemoryFleet()
    device = scoring(fleet, 1, prompt(1))
    score = fleet.verifier.score

    def spoilt(items: Sequence[Item]) -> Logits:
        logits = score(items)
        logits[-1] = float("nan")
        return logits

    monkeypatch.setattr(fleet.verifier, "score", spoilt)
    device.act()
    fleet.settle()
    (fault,) = (message for message in device.messages if isinstance(message, Fault))
    assert fault.action is Action.GIVE_UP


TARGET_INFO = TargetInfo("toy", VOCABULARY, context=32, end_tokens=(0, 3))


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1, "resume": (4,)}])
def test_what_cannot_be_scored_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(OpenRefused) as caught:
        grant(open_message(echo=True, **fields), target=TARGET_INFO, offer=SessionOffer())
    assert caught.value.code is RefusalCode.LOGPROBS
    grant(open_message(echo=True, logprobs=0, resume=()), target=TARGET_INFO, offer=SessionOffer())


@pytest.mark.parametrize(("logprobs", "fits"), [(0, True), (5, False)])
def test_log_probabilities_that_no_message_can_hold_are_refused(logprobs: int, fits: bool) -> None:
    fleet = MemoryFleet(max_packet_bytes=2048)
    device = scoring(fleet, 1, prompt(1), logprobs=logprobs)
    device.act()
    fleet.settle()
    refused = [message for message in device.messages if isinstance(message, Refused)]
    assert [message.code for message in refused] == ([] if fits else [RefusalCode.LOGPROBS])
    if fits:
        run(fleet, [device], random.Random(0))
        assert len(device.session.prompt_logprobs) == 99

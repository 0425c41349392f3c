import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fleet_device.errors import ProtocolViolation, SessionRefused
from fleet_device.requests.generate import RequestContext
from fleet_device.session.sequence import CommittedTokens
from schemas.fields import TokenLogprobs
from schemas.policy import Mode
from schemas.reasons import RefusalCode
from schemas.topics import Topic
from tests.support.memory_fleet import TARGET, ChangingPacing, MemoryFleet
from tests.support.newer_release import rewrite
from tests.support.scripted_edge import LoneDevice

LENGTH = 40


def written(
    device: LoneDevice, *, mode: Mode = Mode.RESIDUAL, logprobs: int | None = 2
) -> tuple[list[int], list[TokenLogprobs]]:
    tokens, told = list[int](), list[TokenLogprobs]()

    def take(new: CommittedTokens) -> None:
        tokens.extend(new.ids)
        told.extend(new.logprobs)

    device.generate(mode=mode, most=LENGTH, logprobs=logprobs, context=RequestContext(on_tokens=take))
    return tokens, told


def assert_exact(tokens: Sequence[int], told: Sequence[TokenLogprobs], *, prompt: Sequence[int] = (1, 2)) -> None:
    assert len(tokens) == len(told) > 0
    for place, (token, each) in enumerate(zip(tokens, told, strict=True)):
        logits = TARGET.logits((*prompt, *tokens[:place])).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert each.logprob == pytest.approx(exact[token], abs=1e-4)
        assert each.values == pytest.approx(sorted(exact, reverse=True)[:2], abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", [Mode.RESIDUAL, Mode.COUPLED])
def test_whatever_is_drafted_or_written_and_however_often_the_edge_restarts(seed: int, mode: Mode) -> None:
    fleet = MemoryFleet()
    device = LoneDevice(fleet, pacing=ChangingPacing(rng=random.Random(seed)))

    def disturb(wait: int) -> None:
        if wait in {4, 12}:
            fleet.restart_edge()

    device.inbox.on_wait = disturb
    assert_exact(*written(device, mode=mode))


def test_an_edge_that_does_not_know_the_question_is_named() -> None:
    fleet = MemoryFleet()

    def older(topic: Topic, content: Any) -> Any:
        if topic is Topic.OPEN:
            content.pop("logprobs")
        return content

    rewrite(fleet.broker, older)
    with pytest.raises(SessionRefused) as caught:
        written(LoneDevice(fleet))
    assert caught.value.code is RefusalCode.LOGPROBS


def test_an_edge_that_tells_too_few_is_found_out() -> None:
    fleet = MemoryFleet()

    def forgetful(topic: Topic, content: Any) -> Any:
        return content[:10] if topic is Topic.VERDICT else content

    rewrite(fleet.broker, forgetful)
    with pytest.raises(ProtocolViolation):
        written(LoneDevice(fleet))


PROMPT = (1, *(2 + number % 4 for number in range(150)))


@pytest.mark.parametrize("restarts", [(), (2, 5), (4,)])
@pytest.mark.parametrize("mode", [Mode.RESIDUAL, Mode.COUPLED])
def test_a_prompt_is_scored_and_the_text_is_the_same(mode: Mode, restarts: Sequence[int]) -> None:
    fleet = MemoryFleet()
    device = LoneDevice(fleet)
    device.inbox.on_wait = lambda wait: fleet.restart_edge() if wait in restarts else None
    scored = device.generate(mode=mode, most=LENGTH, prompt=PROMPT, logprobs=2, echo=True)
    assert_exact(PROMPT[1:], scored.prompt_logprobs, prompt=PROMPT[:1])
    assert scored.unverified == scored.counters.drafted == 0
    if mode is Mode.COUPLED:
        assert scored.tokens == LoneDevice(MemoryFleet()).generate(mode=mode, most=LENGTH, prompt=PROMPT).tokens


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    scored = LoneDevice(MemoryFleet()).generate(prompt=(1,), logprobs=0, echo=True)
    assert scored.prompt_logprobs == ()
    assert scored.tokens


def test_an_edge_that_does_not_score_a_prompt_is_found_out() -> None:
    fleet = MemoryFleet()

    def older(topic: Topic, content: Any) -> Any:
        return content[:12] if topic is Topic.VERDICT else content

    rewrite(fleet.broker, older)
    with pytest.raises(ProtocolViolation):
        LoneDevice(fleet).generate(logprobs=2, echo=True)

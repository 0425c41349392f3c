from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from benchmarks.remote import Oracle, check_greedy, check_sampled
from fleet_device.requests.generate import GenerateRequest
from sampling.distribution import shape
from schemas.policy import Mode, SamplingPolicy
from tests.support.inference_server import InferenceServer
from tests.support.markov import MarkovScript
from tests.support.scripted_verifier import ScriptedVerifier

SIZE, TOP, END = 12, 10, 0
SCRIPT = MarkovScript(size=SIZE, seed=5, sharpness=1.0, period=4)
PROMPT = [3, 4]
Draw = Callable[[Sequence[int], SamplingPolicy, np.random.Generator], int]


@pytest.fixture
def oracle() -> Iterator[Oracle]:
    with InferenceServer(ScriptedVerifier(SCRIPT, SCRIPT.words, context=200), SCRIPT.words, max_model_len=200) as one:
        asked = Oracle(one.url, headers={}, vocabulary=SIZE)
        yield asked
        asked.close()


def sampled(text: Sequence[int], policy: SamplingPolicy, rng: np.random.Generator) -> int:
    dist = shape(SCRIPT.logits(text), policy)
    return int(rng.choice(dist.ids, p=dist.probs / dist.probs.sum()))


def too_cold(text: Sequence[int], policy: SamplingPolicy, rng: np.random.Generator) -> int:
    return sampled(text, policy.model_copy(update={"temperature": policy.temperature * 0.6}), rng)


def second_best(text: Sequence[int], _policy: SamplingPolicy, _rng: np.random.Generator) -> int:
    return int(np.argsort(SCRIPT.logits(text))[-2])


@dataclass
class Counters:
    tested: int = 4
    accepted: int = 3


@dataclass
class Text:
    tokens: tuple[int, ...]
    counters: Counters = field(default_factory=Counters)


@dataclass
class Devices:
    draw: Draw

    def write(self, requests: Sequence[GenerateRequest]) -> list[Any]:
        return [Text(self._text(each, np.random.default_rng(number))) for number, each in enumerate(requests)]

    def _text(self, request: GenerateRequest, rng: np.random.Generator) -> tuple[int, ...]:
        text: list[int] = []
        while len(text) < request.max_new_tokens and text[-1:] != [END]:
            text.append(self.draw([*request.prompt, *text], request.policy, rng))
        return tuple(text)


def test_the_oracle_says_what_the_server_computes_and_writes(oracle: Oracle) -> None:
    row = oracle.row(PROMPT, TOP)
    known = np.isfinite(row)
    wanted = SCRIPT.logits(PROMPT).astype(np.float64)
    wanted -= np.log(np.exp(wanted).sum())
    assert known.sum() == TOP
    np.testing.assert_allclose(row[known], wanted[known], atol=1e-5)
    text = list(PROMPT)
    for _ in range(6):
        text.append(int(np.argmax(SCRIPT.logits(text))))
    assert oracle.greedy(PROMPT, 6) == tuple(text[2:])


@pytest.mark.parametrize("mode", list(Mode))
def test_sampled_texts_are_held_against_the_servers_law(oracle: Oracle, mode: Mode) -> None:
    def check(draw: Draw) -> Any:
        devices: Any = Devices(draw)
        return check_sampled(devices, oracle, PROMPT, mode=mode, texts=2000, top=TOP, ends=[END])

    right = check(sampled)
    assert right.passed, right
    assert right.acceptance == 0.75
    assert not check(too_cold).passed
    assert check(second_best).p == 0.0


def test_greedy_texts_are_held_against_the_servers_own(oracle: Oracle) -> None:
    def check(draw: Draw) -> Any:
        devices: Any = Devices(draw)
        return check_greedy(devices, oracle, [[1], [2], PROMPT], length=8, dtype="float32", ends=[END])

    assert check(sampled).passed
    assert check(sampled).equal == 3
    wrong = check(second_best)
    assert (wrong.passed, wrong.equal, len(wrong.gaps)) == (False, 0, 3)
    assert min(wrong.gaps) > 0.0

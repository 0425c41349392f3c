"""Checks of texts that an edge writes over inference servers: against what a server reports and generates alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Final

import numpy as np

from benchmarks.harness import together
from benchmarks.remote.oracle import Oracle
from dssd.distribution import shape
from fleet_device.client.agent import Agent
from fleet_device.requests.generate import GenerateRequest, Generation
from schemas.policy import Mode, SamplingPolicy
from tests.support.statistics import ALARM, p_value

_TIE: Final = {"float32": 1e-2, "bfloat16": 0.5}
_PAIR: Final = 2  # tokens of a sampled text: the second is verified in the same answer as the first


@dataclass(frozen=True, slots=True)
class Job:
    """A text to be generated: prompt, policy with the seed, and most tokens."""

    prompt: Sequence[int]
    policy: SamplingPolicy
    length: int


class Devices:
    """Devices, connected; each drafts with a context of its own."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self._agents = agents

    def write(self, jobs: Sequence[Job]) -> list[Generation]:
        """Generate all texts, as many at a time as there are devices."""
        done: dict[int, Generation] = {}
        queue, taking = iter(list(enumerate(jobs))), Lock()

        def serve(agent: Agent) -> None:
            while True:
                with taking:
                    taken = next(queue, None)
                if taken is None:
                    return
                number, job = taken
                done[number] = agent.generate(
                    GenerateRequest(tuple(job.prompt), policy=job.policy, max_new_tokens=job.length)
                )

        together([partial(serve, agent) for agent in self._agents])
        return [done[number] for number in range(len(jobs))]


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy texts, compared with the server's own.

    Attributes:
        texts: How many.
        equal: Of these, equal token by token.
        gaps: Of the others, how far the log-probabilities of the two best tokens lie apart where the texts part.
        acceptance: Accepted of tested draft tokens.
        tie: What counts as a tie: the server's own rounding may decide there, in either way.
    """

    texts: int
    equal: int
    gaps: list[float]
    acceptance: float
    tie: float

    @property
    def passed(self) -> bool:
        """Whether texts part nowhere but at ties."""
        return all(gap < self.tie for gap in self.gaps)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Texts of two tokens held against the server's log-probabilities."""

    mode: Mode
    texts: int
    outcomes: int
    p: float
    acceptance: float

    @property
    def passed(self) -> bool:
        """Whether texts follow the server's distribution."""
        return self.p > ALARM


@dataclass(frozen=True, slots=True)
class Repeats:
    """Coupled texts written alone, and again with others."""

    texts: int
    equal: int
    tokens: int
    common: int


def check_greedy(
    devices: Devices, oracle: Oracle, prompts: Sequence[Sequence[int]], *, length: int, dtype: str, ends: Sequence[int]
) -> Greedy:
    """Write greedy texts through the system, and have the server write the same prompts."""
    policy = SamplingPolicy(temperature=0.0, seed=1)
    done = devices.write([Job(prompt, policy, length) for prompt in prompts])
    gaps, equal = [], 0
    for prompt, text in zip(prompts, done, strict=True):
        own = _until_end(oracle.greedy(prompt, length), ends)
        if text.tokens == own:
            equal += 1
            continue
        at = _common(text.tokens, own)
        best = np.sort(oracle.row([*prompt, *own[:at]], _PAIR))[-_PAIR:]
        gaps.append(float(best[1] - best[0]))
    return Greedy(len(done), equal, gaps, _acceptance(done), _TIE[dtype])


def check_sampled(
    devices: Devices, oracle: Oracle, prompt: Sequence[int], *, mode: Mode, texts: int, top: int, ends: Sequence[int]
) -> Sampled:
    """Write many texts of two tokens, and hold them against the law of the server's log-probabilities by chi-square."""
    policy = SamplingPolicy(mode=mode, temperature=0.9, top_k=min(20, top), top_p=0.95, seed=0)
    first = shape(oracle.row(prompt, top), policy)
    law: dict[tuple[int, int], float] = {}
    for token, p in zip(first.ids.tolist(), first.probs.tolist(), strict=True):
        if token in ends:
            law[token, token] = p
            continue
        second = shape(oracle.row([*prompt, token], top), policy)
        law |= {(token, then): p * q for then, q in zip(second.ids.tolist(), second.probs.tolist(), strict=True)}
    done = devices.write(
        [Job(prompt, policy.model_copy(update={"seed": 1 + number}), _PAIR) for number in range(texts)]
    )
    places = {pair: at for at, pair in enumerate(law)}
    counts = np.zeros(len(places) + 1, dtype=np.int64)  # the last is what the law rules out
    for text in done:
        counts[places.get((text.tokens[0], text.tokens[-1]), len(places))] += 1
    expected = np.array([*law.values(), 0.0])
    return Sampled(mode, texts, len(law), p_value(counts, expected), _acceptance(done))


def check_repeats(devices: Devices, prompts: Sequence[Sequence[int]], *, length: int, top: int) -> Repeats:
    """Write coupled texts one after the other, then all at once."""
    jobs = [
        Job(prompt, SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=min(50, top), seed=number), length)
        for number, prompt in enumerate(prompts)
    ]
    alone = [devices.write([job])[0].tokens for job in jobs]
    together = [done.tokens for done in devices.write(jobs)]
    common = [_common(one, other) for one, other in zip(alone, together, strict=True)]
    equal = sum(one == other for one, other in zip(alone, together, strict=True))
    return Repeats(len(jobs), equal, sum(map(len, alone)), sum(common))


def _acceptance(done: Sequence[Any]) -> float:
    tested = sum(text.counters.tested for text in done)
    return float(sum(text.counters.accepted for text in done) / max(1, tested))


def _until_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Return a text up to its end token, included."""
    for at, token in enumerate(tokens):
        if token in ends:
            return tuple(tokens[: at + 1])
    return tuple(tokens)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens before two texts part."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))

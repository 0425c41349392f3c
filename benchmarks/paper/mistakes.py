"""Mistakes of published code, made again in our own words on a toy pair whose joint law is known.

A text is written by split speculative decoding in residual mode, drafts of two tokens, all in this process: the same
functions as in service, but for the one that is replaced. What comes out is held against the law by chi-square.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.exactness.laws import LENGTH, fold_ends
from dssd.counter_rng import Purpose, random_uniform
from dssd.distribution import TOTAL, Dist, shape
from dssd.sampling import Proposal, accepts, draw, propose, residual
from schemas.policy import Mode, SamplingPolicy
from tests.support.statistics import ALARM, p_value, total_variation
from tests.support.toy_pair import END_TOKENS, PROMPT, TEMPERATURE, ToyPair

__all__ = ["WAYS", "Verdict", "Way", "Writer", "hold"]

Accept = Callable[[float, int, float], bool]
Correct = Callable[["Position"], int]

_DRAFT: Final = 2
_LONG: Final = 128


@dataclass(frozen=True, slots=True)
class Position:
    """A rejected position.

    Attributes:
        p: The target's shaped distribution.
        proposal: What was rejected.
        target: The target's raw logits, `[vocabulary]`.
        draft: The draft model's.
        uniform: The random number of the correction.
    """

    p: Dist
    proposal: Proposal
    target: NDArray[Any]
    draft: NDArray[Any]
    uniform: float


def _correct(position: Position) -> int:
    assert position.proposal.quantized is not None
    return draw(residual(position.p, position.proposal.quantized), position.uniform)


def _accept_inverted(p: float, count: int, uniform: float) -> bool:
    return uniform * p < count / TOTAL


def _correct_from_logits(position: Position) -> int:
    rest = np.maximum(0.0, position.target - position.draft)
    return draw(Dist(np.arange(len(rest)), rest / rest.sum()), position.uniform)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of deciding.

    Attributes:
        what: For the reader.
        accept: Whether a draft token stands, by p(x), 65,536 q(x) and a uniform number.
        correct: Draws the token in the place of a rejected one.
        cache: Whether the target keeps what it has computed.
        exact: Whether texts follow the law.
    """

    what: str
    accept: Accept = accepts
    correct: Correct = _correct
    cache: bool = True
    exact: bool = True


WAYS: Final = MappingProxyType(
    {
        "ours": Way("accepts with p/q, corrects from max(0, p - q)"),
        "ratio inverted": Way("accepts with q/p", accept=_accept_inverted, exact=False),
        "raw logits": Way("corrects from the difference of raw logits", correct=_correct_from_logits, exact=False),
        "both": Way("both of these", accept=_accept_inverted, correct=_correct_from_logits, exact=False),
        "no cache": Way("as ours, but the target computes the whole text for each draft", cache=False),
    }
)
"""By name: ours, and each mistake."""


@dataclass(slots=True)
class Writer:
    """Writes texts of the toy pair.

    Attributes:
        way: How it decides.
        pair: The languages.
        computed: Tokens that the target has computed.
        written: Tokens of all texts.
    """

    way: Way
    pair: ToyPair = field(default_factory=ToyPair.standard)
    computed: int = 0
    written: int = 0

    def write(self, policy: SamplingPolicy, *, length: int, ends: Sequence[int] = END_TOKENS) -> list[int]:
        """Return a text.

        Args:
            policy: Residual, with the seed.
            length: Tokens, at most.
            ends: Tokens that end it.
        """
        text: list[int] = []
        known = 0  # tokens that the target has computed and keeps
        while len(text) < length and not (text and text[-1] in ends):
            draft = self._draft(text, policy, length=length, ends=ends)
            whole = len(PROMPT) + len(text) + len(draft)
            self.computed += whole - known
            before = len(text)
            self._judge(text, draft, policy, length=length, ends=ends)
            if self.way.cache:
                known = len(PROMPT) + min(len(text), before + len(draft)) - (len(text) <= before + len(draft))
        self.written += len(text)
        return text

    def _draft(
        self, text: Sequence[int], policy: SamplingPolicy, *, length: int, ends: Sequence[int]
    ) -> list[Proposal]:
        draft: list[Proposal] = []
        while len(draft) < _DRAFT and len(text) + len(draft) < length and not (draft and draft[-1].token in ends):
            logits = self.pair.draft.logits((*PROMPT, *text, *(each.token for each in draft)))
            draft.append(propose(shape(logits, policy), policy=policy, position=len(text) + len(draft)))
        return draft

    def _judge(
        self, text: list[int], draft: Sequence[Proposal], policy: SamplingPolicy, *, length: int, ends: Sequence[int]
    ) -> None:
        number = partial(random_uniform, policy.seed)
        for proposal in draft:
            place = len(text)
            logits = self.pair.target.logits((*PROMPT, *text))
            p = shape(logits, policy)
            assert proposal.count is not None
            if self.way.accept(p.probability(proposal.token), proposal.count, number(place, Purpose.ACCEPT)):
                text.append(proposal.token)
                continue
            mine = self.pair.draft.logits((*PROMPT, *text))
            rejected = Position(p, proposal, logits, mine, number(place, Purpose.RESIDUAL))
            text.append(self.way.correct(rejected))
            return
        if len(text) < length and not (text and text[-1] in ends):
            p = shape(self.pair.target.logits((*PROMPT, *text)), policy)
            text.append(draw(p, number(len(text), Purpose.BONUS)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the test says of a way.

    Attributes:
        name: Of the way.
        what: It does.
        texts: Written.
        p: Chi-square p-value under the target's law; 0 below 10^-300.
        distance: Total variation distance from it.
        exact: Whether texts should follow it.
        computed_per_token: Tokens that the target computes for each of a text of 128.
    """

    name: str
    what: str
    texts: int
    p: float
    distance: float
    exact: bool
    computed_per_token: float

    @property
    def as_it_should_be(self) -> bool:
        """Whether the test said what it should."""
        return (self.p >= ALARM) == self.exact


def hold(name: str, *, texts: int, first_seed: int) -> Verdict:
    """Write texts in one way, and hold them against the law.

    Args:
        name: Of the way.
        texts: How many.
        first_seed: The seeds follow on.
    """
    way = WAYS[name]
    expected = fold_ends(ToyPair.standard().target.joint(PROMPT, length=LENGTH, policy=_policy(0)), END_TOKENS)
    counts = np.zeros(expected.shape, dtype=np.int64)
    writer = Writer(way)
    for seed in range(first_seed, first_seed + texts):
        text = writer.write(_policy(seed), length=LENGTH)
        counts[(*text, *[text[-1]] * (LENGTH - len(text)))] += 1
    long = Writer(way)
    long.write(_policy(first_seed), length=_LONG, ends=())
    found, wanted = counts.ravel(), expected.ravel()
    return Verdict(
        name,
        way.what,
        texts,
        p_value(found, wanted),
        total_variation(found, wanted),
        way.exact,
        long.computed / long.written,
    )


def _policy(seed: int) -> SamplingPolicy:
    """Return a policy that rules no token out, so that no mistake is found by a text that cannot be."""
    return SamplingPolicy(mode=Mode.RESIDUAL, temperature=TEMPERATURE, top_k=0, top_p=1.0, seed=seed)

"""Evidence of one case: outputs compared with what is expected of them, by three tests."""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.exactness.cases import LENGTH, Variant
from fleet_device.session.sequence import TokenOrigin
from schemas.policy import Mode
from tests.support.reference import TOTAL, quantized, shaped
from tests.support.score_test import (
    LOG_P,
    Outcomes,
    Scored,
    ScoreTest,
    coupled,
    dependence,
    residual,
    untested,
)
from tests.support.statistics import ALARM, p_value
from tests.support.toy_devices import OriginatedText, Tally
from tests.support.toy_grammar import allowed
from tests.support.toy_pair import END_TOKENS, Languages, ToyPair

CORRECTED = {TokenOrigin.DRAFTED: False, TokenOrigin.CORRECTED: True}


@dataclass(frozen=True, slots=True)
class Evidence:
    """p-values; None where nothing is random.

    Attributes:
        joint: Chi-square of the joint distribution of the first tokens.
        score: Score test of all tokens, directed at small mistakes.
        dependence: Correlation of outputs of neighbouring seeds, and of successive ones of a device.
        impossible: Outputs with a token that is impossible there, each of which is a p-value of 0.
    """

    joint: float | None
    score: float | None
    dependence: float | None
    impossible: int = 0

    @property
    def p_values(self) -> dict[str, float | None]:
        return {"joint": self.joint, "score": self.score, "dependence": self.dependence}

    @property
    def follows(self) -> bool:
        return all(value is None or value > ALARM for value in self.p_values.values())


@dataclass(slots=True)
class Expectation:
    """What may become of each token of a case, from the languages and the reference of shaping alone."""

    case: Variant
    _known: dict[tuple[Hashable, bool], Outcomes] = field(default_factory=dict)
    _pair: ToyPair = field(init=False)
    _prompt: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._pair, self._prompt = self.case.pair, self.case.prompt

    def outcomes(self, text: Sequence[int], *, tested: bool) -> Outcomes:
        """Return the outcomes of the token after a text.

        Args:
            text: The tokens before it.
            tested: Whether a draft token was verified there.
        """
        prefix = (*self._prompt, *text)
        state = prefix if self.case.by_prefix else self._pair.target.state(prefix)
        found = self._known.get((state, tested))
        if found is None:
            p, q = self.rows(text)
            if not tested:
                found = untested(p, q)
            elif self.case.mode is Mode.COUPLED:
                found = coupled(p, q)
            else:
                found = residual(p, q)
            self._known[state, tested] = found
        return found

    def rows(self, text: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """Return p after a text, and q as it is drawn from; p in its place if only the device knows q."""
        prefix, policy = (*self._prompt, *text), self.case.policy(0).after(self._prompt, text, END_TOKENS)
        kept = self._pair.target.ids if self.case.grammar is None else allowed(text, end=END_TOKENS[0])
        p = shaped(self._pair.target.logits(prefix), policy, allowed=kept)
        if self.case.languages is Languages.UNLIKE:
            return p, p
        q = shaped(self._pair.draft.logits(prefix), policy, allowed=kept)
        return p, q if policy.mode is Mode.COUPLED else {token: n / TOTAL for token, n in quantized(q).items()}


def evidence(case: Variant, tally: Tally) -> Evidence:
    expected, score, places = Expectation(case), ScoreTest(), {token: n for n, token in enumerate(case.pair.target.ids)}
    counts = np.zeros((len(places),) * LENGTH, dtype=np.int64)
    scored: dict[int, Scored] = {}
    impossible = 0
    for seed, text in tally.texts.items():
        scored[seed] = _add(score, expected, text)
        impossible += len(scored[seed]) < len(text)
        head = [places[token] for token, _ in text[:LENGTH]]
        counts[(*head, *[head[-1]] * (LENGTH - len(head)))] += 1
    neighbours = {(seed, seed + 1) for seed in tally.texts if seed + 1 in tally.texts}
    successive = {pair for order in tally.orders for pair in itertools.pairwise(order)}
    joint = p_value(counts.ravel(), case.joint.ravel())
    return Evidence(
        joint=joint if joint < 1.0 else None,  # only one outcome, or none that is expected often enough
        score=score.p_value(),
        dependence=dependence([(scored[one], scored[other]) for one, other in neighbours | successive]),
        impossible=impossible,
    )


def _add(score: ScoreTest, expected: Expectation, text: OriginatedText) -> Scored:
    scored: list[tuple[float, float]] = []
    tokens, case = [token for token, _ in text], expected.case
    for place, (token, origin) in enumerate(text):
        corrected = CORRECTED.get(origin) if case.verified_exactly else None
        outcomes = expected.outcomes(tokens[:place], tested=corrected is not None)
        score.add(outcomes, (token, corrected))
        if (token, corrected) not in outcomes.scores:
            break
        scores = outcomes.scores[token, corrected]
        scored.append((float(scores[LOG_P]), float(outcomes.covariance[LOG_P, LOG_P])))
    return scored

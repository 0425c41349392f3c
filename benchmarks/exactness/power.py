"""Power of the statistics of the exactness proof: the share of repetitions in which they find a small mistake.

Outputs of toy pairs are drawn in numpy, drafted and verified token by token as in the system, but with mistakes of a
few percent. `joint` is the chi-square test of the first three tokens, `score` the test that is directed at such
mistakes (`tests/support/score_test.py`). Without a mistake the share is the rate of false alarms. Takes 10 minutes.
"""

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from benchmarks.exactness.cases import LENGTH, LONG, Variant
from benchmarks.exactness.evidence import Expectation
from benchmarks.harness import Bench, SuiteReport, number_of, say, table
from sampling.distribution import Ids
from sampling.downlink import FormName
from schemas.policy import Mode
from tests.support.markov import MarkovScript
from tests.support.score_test import Float, ScoreTest
from tests.support.statistics import ALARM, p_value
from tests.support.toy_pair import END_TOKENS, PROMPT, Languages

MISTAKES: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "none": {},
        "acceptance 1 % low": {"kept": 0.99},
        "acceptance 2 % low": {"kept": 0.98},
        "acceptance 5 % low": {"kept": 0.95},
        "q reported 2 % high": {"reported": 1.02},
        "3 % of corrections drawn from p": {"from_p": 0.03},
        "10 % of corrections drawn from p": {"from_p": 0.1},
    }
)

SETTINGS: Final = (
    (Variant(Mode.RESIDUAL, FormName.AUTO, 2), 20_000),
    (Variant(Mode.RESIDUAL, FormName.AUTO, 8, languages=Languages.NEAR, tokens=LONG), 20_000 * LENGTH // LONG),
    (Variant(Mode.RESIDUAL, FormName.AUTO, 8, languages=Languages.NEAR, tokens=LONG), 1_000),
)
"""Cases and their sessions: of the benchmark, and of the planted faults of the tests."""


def _outcomes(p: Float, q: Float, *, kept: float = 1.0, reported: float = 1.0, from_p: float = 0.0) -> Float:
    """Return the probabilities of all tokens as accepted, then as corrections.

    Args:
        p: The target's distribution.
        q: The draft model's.
        kept: Share of the accepted tokens that stay accepted.
        reported: Factor on the reported q.
        from_p: Share of the corrections that are drawn from p.
    """
    accepted = kept * np.minimum(q, p / reported)
    rest = np.maximum(0.0, p - q)
    drawn = (1.0 - from_p) * rest / rest.sum() + from_p * p if rest.any() else p
    return np.concatenate([accepted, (1.0 - accepted.sum()) * drawn])


class Simulation:
    """Outputs of a case in residual mode, drafts of a fixed length."""

    def __init__(self, case: Variant) -> None:
        target = case.pair.target
        assert isinstance(target, MarkovScript)
        self._case, self._size, self._joint = case, target.size, case.joint.ravel()
        expected = Expectation(case)
        # A state is a phase of the language and the token before.
        texts = [[*[0] * phase, last] for phase in range(target.period) for last in range(target.size)]
        self._rows = np.array([[self._dense(part) for part in expected.rows(text)] for text in texts])
        self._laws = [[expected.outcomes(text, tested=tested) for text in texts] for tested in (False, True)]
        self._phases = target.period

    def p_values(self, sessions: int, mistake: Mapping[str, float], random: np.random.Generator) -> tuple[float, float]:
        """Return the p-values of the joint distribution and of the score test."""
        size, ends = self._size, self._case.tokens
        # Without a draft: as accepted, though that counts as no outcome of a draft.
        own = np.concatenate([self._rows[:, 0], np.zeros_like(self._rows[:, 0])], axis=1)
        drafted = np.array([_outcomes(p, q, **mistake) for p, q in self._rows])
        mass = np.cumsum(np.stack([own, drafted]), axis=2)
        counts = np.zeros((2, len(self._rows), 2 * size), dtype=np.int64)
        text = np.zeros((sessions, ends), dtype=np.int64)
        alive, place = np.arange(sessions), np.zeros(sessions, dtype=np.int64)
        for offset in range(ends):
            last = text[alive, offset - 1] if offset else np.full(sessions, PROMPT[-1])
            # `texts` of state 0 are one token, after a prompt of one.
            state = (offset - 1) % self._phases * size + last
            tested = ((place[alive] < (self._case.draft_length or 0)) & (offset < ends - 1)).astype(np.int64)
            among = mass[tested, state]
            drawn = (among < random.random((len(alive), 1)) * among[:, -1:]).sum(axis=1)
            np.add.at(counts, (tested, state, drawn), 1)
            text[alive, offset] = drawn % size
            place[alive] = np.where((tested == 1) & (drawn < size), place[alive] + 1, 0)
            alive = alive[~np.isin(drawn % size, END_TOKENS)]
        return self._joint_p(text), self._score_p(counts)

    def _joint_p(self, text: Ids) -> float:
        shape = (self._size,) * LENGTH
        # An output that has ended is filled with its end, which is token 0.
        return p_value(
            np.bincount(np.ravel_multi_index(text[:, :LENGTH].T, shape), minlength=self._size**LENGTH), self._joint
        )

    def _score_p(self, counts: Ids) -> float:
        score = ScoreTest()
        for tested, state, drawn in zip(*np.nonzero(counts), strict=True):
            outcome = (int(drawn % self._size), bool(drawn >= self._size) if tested else None)
            score.add(self._laws[tested][state], outcome, times=int(counts[tested, state, drawn]))
        value = score.p_value()
        assert value is not None
        return value

    def _dense(self, dist: Mapping[int, float]) -> Float:
        row = np.zeros(self._size)
        row[list(dist)] = list(dist.values())
        return row


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=number_of(int, 1), default=200, help="of each mistake (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)


def run(bench: Bench) -> SuiteReport:
    rows = []
    for case, sessions in SETTINGS:
        simulation, random = Simulation(case), np.random.default_rng(bench.options.seed)
        for name, mistake in MISTAKES.items():
            say(f"{case.name}, {sessions} sessions, {name}")
            found = [simulation.p_values(sessions, mistake, random) for _ in range(bench.options.repeats)]
            joint, score = (np.array(found) < ALARM).mean(axis=0).tolist()
            rows.append({"case": case.name, "sessions": sessions, "mistake": name, "joint": joint, "score": score})
    columns = {"case": "", "sessions": "d", "mistake": "", "joint": ".3f", "score": ".3f"}
    table(rows, columns, title=f"share with a p-value below {ALARM:g}")
    return SuiteReport(rows)

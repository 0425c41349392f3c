"""Chance that a number of sessions shows a planted mistake, from a recorded run of many sessions.

A mistake makes a chi-square statistic noncentral, in proportion to the sessions. The recorded p-values give the
noncentrality of a session, and so the distribution of the statistic for any number of them. Or it makes outputs
impossible: one of them suffices.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from scipy import stats

from benchmarks.exactness.cases import Variant
from tests.support.statistics import ALARM, degrees

RECORDED: Final = Path(__file__).parents[1] / "results" / "exactness-faults.json"
"""Output of `exactness system --only fault: --json FILE`."""

FOUND: Final = 0.99
"""With this chance or more, a mistake that is not found is a failure of the proof."""

_MIN_P: Final = 1e-300  # in place of one that is too small for a float
_SCORES: Final = 5
_MAX_SESSIONS: Final = 1 << 24


def chance(case: Variant, sessions: int) -> float:
    """Return the chance that one of the tests finds a mistake; 1 if it is not recorded, because nothing excuses it."""
    row = _recorded().get(case.name)
    if row is None:
        return 1.0
    by_p = [
        noncentral(
            p or _MIN_P,
            _degrees(case, kind, row["sessions"]),
            row["sessions"],
            _degrees(case, kind, sessions),
            sessions,
        )
        for kind, p in row["p_values"].items()
        if p or (p is not None and not row["impossible"])  # 0 may only say that an output was impossible
    ]
    possible: float = 1.0 - row["impossible"] / row["sessions"]
    return max([1.0 - possible**sessions, *by_p])


def noncentral(p: float, freedom: int, sessions: int, freedom_then: int, sessions_then: int) -> float:
    """Return the chance of an alarm in `sessions_then` sessions, given the p-value of one run of `sessions`."""
    if not freedom or not freedom_then:
        return 0.0
    excess = max(0.0, float(stats.chi2.isf(p, freedom)) - freedom) / sessions
    return float(stats.ncx2.sf(stats.chi2.isf(ALARM, freedom_then), freedom_then, excess * sessions_then))


def sessions_for(case: Variant, found: float = FOUND) -> int:
    """Return how many sessions find a mistake with the chance `found`."""
    low, high = 0, 1
    while high < _MAX_SESSIONS and chance(case, high) < found:
        low, high = high, 2 * high
    while high - low > 1 + low // 100:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(case, middle) >= found else (middle, high)
    return high


def _degrees(case: Variant, kind: str, sessions: int) -> int:
    return {"joint": degrees(_joint(case), sessions), "score": _SCORES, "dependence": 1}[kind]


@cache
def _joint(case: Variant) -> Any:  # noqa: ANN401 - of numpy
    return case.joint.ravel()


@cache
def _recorded() -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in json.loads(RECORDED.read_text(encoding="utf-8"))["rows"]}

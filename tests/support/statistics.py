"""Chi-square with small cells pooled, for the proofs of exactness."""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALARM = 1e-4
"""p-value below which a distribution is rejected: with fresh seeds, a false alarm once in 10,000 runs per assertion."""


def p_value(counts: NDArray[np.int64], law: NDArray[np.float64]) -> float:
    """Return the chi-square p-value of `counts` under `law`; cells expecting fewer than 5 are pooled.

    It is 0 if something was drawn that `law` excludes.
    """
    law = law / law.sum()
    expected = law * counts.sum()
    if counts[law == 0.0].any():
        return 0.0
    large = expected >= 5.0
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    if wanted[-1] < 5.0:
        if len(wanted) == 1:
            return 1.0
        smallest = int(np.argmin(wanted[:-1]))
        wanted[smallest] += wanted[-1]
        observed[smallest] += observed[-1]
        wanted, observed = wanted[:-1], observed[:-1]
    if len(wanted) < 2:
        return 1.0
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


def degrees(law: NDArray[np.float64], number: int) -> int:
    """Return the degrees of freedom of `p_value` for a number of draws."""
    expected = law / law.sum() * number
    large = expected >= 5.0
    return max(0, int(large.sum()) + bool(expected[~large].sum() >= 5.0) - 1)


def total_variation(counts: NDArray[np.int64], law: NDArray[np.float64]) -> float:
    return float(np.abs(counts / counts.sum() - law / law.sum()).sum() / 2)


def total_variation_noise(law: NDArray[np.float64], draws: int) -> float:
    """Return a bound that the empirical distance exceeds with probability below 10^-6.

    Its mean is at most the sum over tokens of sqrt(p (1 - p) / n) / 2, and it moves by at most 1/n with one draw
    (McDiarmid).
    """
    law = law / law.sum()
    return float(np.sqrt(law * (1 - law) / draws).sum() / 2 + np.sqrt(np.log(1e6) / (2 * draws)))

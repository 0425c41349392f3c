"""Slope of noisy samples by Theil and Sen: the median of the slopes of all pairs, which single outliers do not move.

Its confidence interval takes samples for independent, which those of memory are not quite: take them far enough apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import theilslopes

__all__ = ["Slope", "robust_slope"]


@dataclass(frozen=True, slots=True)
class Slope:
    """A slope, in units of y per unit of x.

    Attributes:
        value: The median of the pairs' slopes.
        low: Lower end of its 95 % confidence interval.
        high: Upper end.
        samples: It is made of.
    """

    value: float
    low: float
    high: float
    samples: int


def robust_slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Return the slope of points (x, y), whose x differ; None of fewer than three.

    Takes time and memory in the square of their number: a few hundred are enough.
    """
    if len(points) < 3:
        return None
    found = theilslopes([y for _, y in points], [x for x, _ in points], alpha=0.95)
    return Slope(float(found.slope), float(found.low_slope), float(found.high_slope), len(points))

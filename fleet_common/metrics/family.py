"""Metric families: what a metric is called and means, and what it is now.

Counting needs no library: a counter is a number, a histogram a list of numbers. `exposition` writes them down.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

PREFIX: Final = "dssd_"
"""What the names of all our metrics begin with."""


class Kind(StrEnum):
    """How a metric behaves."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """What is known of a metric before anything is counted.

    Attributes:
        name: With the prefix; a counter's ends in `_total`, as it is queried.
        kind: How it behaves.
        meaning: One sentence.
        labels: Names of its labels. A label has few values: no devices, no sessions.
    """

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()

    def of(self, value: float) -> "Family":
        """Return the family with one value and no labels."""
        return Family(self, values={(): value})

    def by(self, values: Mapping[str, float]) -> "Family":
        """Return the family with a value for each value of its one label."""
        return Family(self, values={(label,): value for label, value in sorted(values.items())})

    def spread(self, histogram: "Histogram") -> "Family":
        """Return the family of a histogram."""
        return Family(self, histogram=histogram)


@dataclass(slots=True)
class Histogram:
    """How often a quantity was how large. Added to by one thread, read by any.

    Attributes:
        bounds: Upper bounds of the buckets, rising; the last bucket has none.
        counts: Of each bucket, those above all bounds last.
        total: Sum of what was observed.
    """

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def quantile(self, share: float, *, since: Sequence[int] = ()) -> float | None:
        """Return an upper bound of the value below which so large a share of what was observed lies.

        Args:
            share: From 0 to 1.
            since: The counts of an earlier time: only what came later counts.

        Returns:
            A bound of a bucket; infinite in the last one; None if nothing was observed.
        """
        before = since or [0] * len(self.counts)
        counts = [now - then for now, then in zip(list(self.counts), before, strict=True)]
        wanted, seen = share * sum(counts), 0
        if not sum(counts):
            return None
        for bound, count in zip([*self.bounds, float("inf")], counts, strict=True):
            seen += count
            if seen >= wanted and count:
                return bound
        return float("inf")


@dataclass(frozen=True, slots=True)
class Family:
    """A metric and what it is now.

    Attributes:
        metric: Which.
        values: By the values of its labels.
        histogram: Or how its values are spread.
    """

    metric: Metric
    values: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    histogram: Histogram | None = None

    def buckets(self) -> Iterable[tuple[str, float]]:
        """Yield the upper bounds, as text, and the number of values up to each."""
        assert self.histogram is not None
        seen = 0
        for bound, count in zip([*self.histogram.bounds, float("inf")], list(self.histogram.counts), strict=True):
            seen += count
            yield ("+Inf" if bound == float("inf") else f"{bound:g}"), seen

"""Distribution of a measure: counts in buckets that grow by a fixed factor, so that any two can be added."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

_BUCKETS_PER_DOUBLING: Final = 8
_LEAST: Final = -8 * _BUCKETS_PER_DOUBLING  # 4 µs, in ms
_MOST: Final = 24 * _BUCKETS_PER_DOUBLING  # 4.6 hours


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often values (ms) fell into each bucket: bucket `i` holds those from 2^(i/8) to below 2^((i+1)/8).

    A quantile is exact to within 5 %.
    """

    counts: Mapping[int, int]

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Count values (ms). Those not above zero are in the lowest bucket, too large ones in the last."""
        counts: dict[int, int] = {}
        for value in values:
            place = _LEAST if value <= 0 else math.floor(math.log2(value) * _BUCKETS_PER_DOUBLING)
            bucket = min(max(place, _LEAST), _MOST)
            counts[bucket] = counts.get(bucket, 0) + 1
        return cls(counts)

    @classmethod
    def read(cls, text: str) -> Self:
        pairs = (pair.split(":") for pair in text.split())
        return cls({int(bucket): int(count) for bucket, count in pairs})

    @classmethod
    def total(cls, parts: Iterable["Distribution"]) -> Self:
        counts: dict[int, int] = {}
        for part in parts:
            for bucket, count in part.counts.items():
                counts[bucket] = counts.get(bucket, 0) + count
        return cls(counts)

    def __str__(self) -> str:
        return " ".join(f"{bucket}:{count}" for bucket, count in sorted(self.counts.items()))

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def quantile(self, share: float) -> float | None:
        """Return the value (ms) that the given share of all values does not exceed; None of nothing."""
        wanted = share * self.count
        passed = 0
        for bucket, count in sorted(self.counts.items()):
            passed += count
            if passed >= wanted:
                return float(2.0 ** ((bucket + 0.5) / _BUCKETS_PER_DOUBLING))
        return None

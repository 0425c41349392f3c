"""Session affinity by consistent hashing: which endpoint computes a sequence, so that its prefix is cached there.

Each endpoint stands at many points of a ring, by its address alone; a sequence goes to the first endpoint from its own
point on. An endpoint that comes or goes therefore moves only its own share of the sequences. None takes much more
than its share: one that has is passed over ("Consistent Hashing with Bounded Loads", arXiv 1608.01350).
"""

import bisect
import hashlib
import math
from collections.abc import Collection, Sequence
from typing import Final

__all__ = ["Affinity"]

_POINTS: Final = 64
_LOAD_FACTOR: Final = 1.25


class Affinity:
    """The endpoints of all sequences.

    Args:
        endpoints: Their addresses.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        points = sorted((_hash(f"{name}#{number}"), name) for name in endpoints for number in range(_POINTS))
        self._points = [point for point, _ in points]
        self._names = [name for _, name in points]
        self._at: dict[int, str] = {}
        self._loads = dict.fromkeys(endpoints, 0)

    def place(self, sequence: int, *, available: Collection[str]) -> str:
        """Return the endpoint of a sequence, among those that are available.

        A sequence stays where it is as long as that one is available: its keys and values are there.

        Raises:
            ValueError: None is available.
        """
        at = self._at.get(sequence)
        if at is not None and at in available:
            return at
        self.forget(sequence)
        chosen = self._choose(sequence, available)
        self._at[sequence] = chosen
        self._loads[chosen] += 1
        return chosen

    def follow(self, sequence: int, source: int) -> None:
        """Place a sequence where another is, unless that endpoint has its share: their prefix is cached there."""
        at = self._at.get(source)
        if at is not None and sequence not in self._at and self._loads[at] < self._bound(self._loads):
            self._at[sequence] = at
            self._loads[at] += 1

    def forget(self, sequence: int) -> None:
        """A sequence has ended."""
        at = self._at.pop(sequence, None)
        if at is not None:
            self._loads[at] -= 1

    @property
    def loads(self) -> dict[str, int]:
        """Sequences by endpoint."""
        return dict(self._loads)

    def _choose(self, sequence: int, available: Collection[str]) -> str:
        if not available:
            raise ValueError("There is no endpoint to choose from.")
        bound = self._bound(available)
        start = bisect.bisect(self._points, _hash(str(sequence)))
        for step in range(len(self._names)):
            name = self._names[(start + step) % len(self._names)]
            if name in available and self._loads[name] < bound:
                return name
        raise AssertionError("the bound is above the mean, so one is below it")

    def _bound(self, available: Collection[str]) -> int:
        """Return how many sequences one of them may have."""
        return math.ceil(_LOAD_FACTOR * (1 + sum(self._loads[name] for name in available)) / len(available))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

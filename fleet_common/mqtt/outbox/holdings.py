"""Holdings: how much each key holds of something bounded, and which holds most, in logarithmic time."""

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
SPARE = 64  # outdated records kept before they are cleared away


class Holdings(Generic[K]):
    """Amounts by key, in whole numbers."""

    def __init__(self) -> None:
        self._amounts: dict[K, int] = {}
        # Amounts as they were, the largest first; each key has a record of no less than it holds.
        self._records: list[tuple[int, int, K]] = []
        self._serial = 0  # keys need no order

    def of(self, key: K) -> int:
        return self._amounts.get(key, 0)

    def add(self, key: K, amount: int) -> None:
        """Let a key hold so much more."""
        self._amounts[key] = self.of(key) + amount
        if len(self._records) > SPARE + 2 * len(self._amounts):
            self._records = []
            for each in self._amounts:
                self._record(each)
        else:
            self._record(key)

    def remove(self, key: K, amount: int) -> None:
        """Let a key hold so much less."""
        self._amounts[key] -= amount
        if not self._amounts[key]:
            del self._amounts[key]

    def largest(self) -> tuple[K | None, int]:
        """Return the key that holds most, and how much; None and 0 if none holds anything."""
        while self._records:
            amount, _, key = self._records[0]
            if self.of(key) == -amount:
                return key, -amount
            heapq.heappop(self._records)
            if self.of(key):
                self._record(key)
        return None, 0

    def _record(self, key: K) -> None:
        self._serial += 1
        heapq.heappush(self._records, (-self._amounts[key], self._serial, key))

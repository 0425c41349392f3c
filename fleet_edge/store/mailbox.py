"""Mailbox of the writer: bounded, and never a reason to wait for whoever puts a record in."""

import threading
from collections import deque
from collections.abc import Sequence

from fleet_edge.store.records.record import Record


class Mailbox:
    """A bounded queue between threads.

    Args:
        capacity: Records that it holds; `put` drops beyond that.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._records: deque[Record] = deque()
        self._changed = threading.Condition()
        self._marks: list[int] = []
        self._urgent = False
        self._closed = False
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def dropped(self) -> int:
        return self._dropped

    def put(self, record: Record, *, urgent: bool = False) -> bool:
        """Add a record, or drop and count it if there is no room or the mailbox is closed. Never blocks.

        Args:
            record: The record.
            urgent: Whether to wake whoever waits for what is urgent.

        Returns:
            Whether there was room.
        """
        with self._changed:
            if self._closed or len(self._records) >= self._capacity:
                self._dropped += 1
                return False
            self._records.append(record)
            self._urgent = self._urgent or urgent
            # Waking a waiter for every record would cost more than the record.
            if urgent or (self._marks and len(self._records) >= min(self._marks)):
                self._changed.notify_all()
            return True

    def take(self, limit: int) -> list[Record]:
        """Remove and return up to `limit` of the oldest records."""
        with self._changed:
            taken = [self._records.popleft() for _ in range(min(limit, len(self._records)))]
            self._urgent = self._urgent and bool(self._records)
            return taken

    def put_back(self, records: Sequence[Record]) -> None:
        """Return records just taken to the front; they had room before, so they have it again."""
        with self._changed:
            self._records.extendleft(reversed(records))

    def drop_all(self) -> None:
        """Drop and count all that is left."""
        with self._changed:
            self._dropped += len(self._records)
            self._records.clear()

    def wait(self, count: int, *, timeout_s: float, or_urgent: bool = False) -> bool:
        """Wait until there are `count` records, or an urgent one; return whether there are `count`.

        A closed mailbox does not wait.
        """
        with self._changed:
            self._marks.append(count)
            self._changed.wait_for(
                lambda: self._closed or (or_urgent and self._urgent) or len(self._records) >= count, timeout_s
            )
            self._marks.remove(count)
            return len(self._records) >= count

    def close(self) -> None:
        """Take nothing more, and wake whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

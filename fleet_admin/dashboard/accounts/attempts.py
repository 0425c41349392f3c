"""Attempts to log in: bounded by address and by account, so that guessing takes years and nobody is shut out."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

__all__ = ["Attempts"]

_MOST_KEPT: Final = 10_000


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Attempts:
    """Token buckets of attempts that failed.

    An account's bucket counts only addresses from which nobody has logged in under it: whoever guesses a colleague's
    password does not shut the colleague out.

    Args:
        clock: Monotonic seconds.
        burst: Failures that are free.
        every_s: Seconds after which one more is.
    """

    def __init__(self, clock: Callable[[], float], *, burst: int = 8, every_s: float = 15.0) -> None:
        self._clock = clock
        self._burst = burst
        self._every_s = every_s
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._lock = Lock()

    def take(self, *, address: str, account: str | None = None) -> float:
        """Begin an attempt: it counts as failed until it has succeeded, since many may be under way at once.

        Returns:
            0 if it may be made now, else how long to wait, in seconds.
        """
        with self._lock:
            buckets = [self._filled(key) for key in self._keys(address, account)]
            wait_s = max((1.0 - bucket.left) * self._every_s for bucket in buckets)
            if wait_s > 0:
                return wait_s
            for bucket in buckets:
                bucket.left -= 1.0
            return 0.0

    def succeeded(self, *, address: str, account: str) -> None:
        """Give an attempt back, and note that this address knows the account's password."""
        with self._lock:
            for key in self._keys(address, account):
                bucket = self._filled(key)
                bucket.left = min(bucket.left + 1.0, float(self._burst))
            self._known[address, account] = None
            self._known.move_to_end((address, account))
            while len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)

    def _keys(self, address: str, account: str | None) -> list[tuple[str, str]]:
        keys = [("address", address)]
        if account is not None and (address, account) not in self._known:
            keys.append(("account", account))
        return keys

    def _filled(self, key: tuple[str, str]) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(float(self._burst), now)
            while len(self._buckets) > _MOST_KEPT:
                # The one that was asked for longest ago is the fullest.
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        bucket.left = min(bucket.left + (now - bucket.at) / self._every_s, float(self._burst))
        bucket.at = now
        return bucket

"""Attempts to log in: bounded for each account, each address and altogether, since a password's check is expensive.

Strangers to an account share its bucket. A browser that has logged in under the account before has one of its own, so
that nobody who guesses keeps it out, not even from the same address. An attempt that succeeds costs nothing.

Buckets are found by a keyed hash among a fixed number: invented names neither fill the memory nor renew the bucket of a
real one.
"""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

from fleet_common.limits import TokenBucket, network_of

_SLOTS: Final = 4096
"""Buckets of a kind. Two names that share one have half of it each; which do is a secret of the process."""

_STRANGERS: Final = "strangers"
_FAMILIAR: Final = "familiar"

_RATES: Final[dict[str, tuple[float, float]]] = {
    # Strangers' guesses at one account: 14,400 a day.
    "account": (1 / 6, 30.0),
    # One address, whatever names it gives: well below all that strangers have together.
    "address": (0.5, 30.0),
    "browser": (1 / 6, 30.0),
    # Checks altogether: each takes some 0.2 s of a core. Strangers cannot use up what familiar browsers have.
    _STRANGERS: (1.0, 60.0),
    _FAMILIAR: (1.0, 60.0),
}
"""Attempts a second, and how many at once, by kind of bucket."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Who tries to log in.

    Attributes:
        address: From where.
        account: Under which name.
        browser: The browser's token, if it has logged in under that name before.
    """

    address: str
    account: str
    browser: str | None = None

    def buckets(self) -> list[tuple[str, str]]:
        """Return the kinds and names of the buckets that it is taken from."""
        if self.browser is not None:
            return [("browser", self.browser), (_FAMILIAR, "")]
        return [("address", network_of(self.address)), ("account", self.account), (_STRANGERS, "")]


class Attempts:
    """The buckets. For use from any thread.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._salt = secrets.token_bytes(16)
        self._buckets: dict[tuple[str, int], TokenBucket] = {}
        self._lock = Lock()

    def take(self, attempt: Attempt) -> float:
        """Begin an attempt: it counts as failed until it has succeeded, since many may run at once.

        Returns:
            0 if it may be made now, else how long to wait, in seconds.
        """
        with self._lock:
            now = self._clock()
            buckets = [self._bucket(kind, name, now) for kind, name in attempt.buckets()]
            wait_s = max(bucket.wait_s(1.0, now) for bucket in buckets)
            if wait_s == 0.0:
                for bucket in buckets:
                    bucket.spend(1.0, now)
            return wait_s

    def succeeded(self, attempt: Attempt) -> None:
        with self._lock:
            now = self._clock()
            for kind, name in attempt.buckets():
                self._bucket(kind, name, now).spend(-1.0, now)

    def _bucket(self, kind: str, name: str, now: float) -> TokenBucket:
        digest = hashlib.blake2b(f"{kind} {name}".encode("utf-8", "replace"), key=self._salt, digest_size=8).digest()
        key = kind, int.from_bytes(digest, "big") % _SLOTS
        if (bucket := self._buckets.get(key)) is None:
            rate, burst = _RATES[kind]
            bucket = self._buckets[key] = TokenBucket(rate, burst, now=now)
        return bucket

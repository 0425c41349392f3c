"""Token bucket: a rate with a burst, in whatever unit is metered."""


class TokenBucket:
    """Fills at a rate up to a burst; what is metered is taken out of it. Full at the beginning.

    Args:
        rate: Filled in a second.
        burst: Most that it holds.
        now: Seconds on the clock of the other calls.
    """

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, *, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def take(self, amount: float, now: float) -> float:
        """Take an amount out if it is there.

        An amount above the burst is there when the bucket is full: it leaves a debt.

        Returns:
            0.0 if it was taken; else the seconds until it would be there.
        """
        wait = self.wait_s(amount, now)
        if wait == 0.0:
            self._level -= amount
        return wait

    def spend(self, amount: float, now: float) -> None:
        """Take out what has been used already, into debt if it must be."""
        self._fill(now)
        self._level -= amount

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until an amount is there; 0.0 if it is."""
        self._fill(now)
        missing = min(amount, self.burst) - self._level
        if missing <= 0.0:
            return 0.0
        return missing / self.rate if self.rate > 0.0 else float("inf")

    def used(self, now: float) -> float:
        """Return how much is missing to a full bucket. Callable on any thread."""
        return max(0.0, self.burst - self._level - self.rate * max(0.0, now - self._at))

    def _fill(self, now: float) -> None:
        if now > self._at:
            self._level = min(self.burst, self._level + self.rate * (now - self._at))
            self._at = now

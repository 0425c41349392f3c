"""Strikes: what a device does against the protocol or above its quotas, and when that shuts it out for a time.

A strike is what a sound device does rarely and a hostile or broken one all the time: a message that is none, a session
or a text that the edge does not know, a message above a quota. Strikes are forgotten at a rate, so that what counts is
how fast they come. Half of what shuts a device out slows it: each of its messages then weighs as much as several.
"""

from dataclasses import dataclass, field
from typing import Final

from pydantic import BaseModel, ConfigDict

from fleet_common.limits import TokenBucket
from fleet_common.settings import setting

_SLOWED: Final = 0.5
FORGIVEN: Final = 3.0
"""Times its last fence that a device must keep the peace for the next fence to be as short as the first."""


class FenceSettings(BaseModel):
    """The section `[fence]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    strikes: float = setting(
        300.0, "Strikes after which a device is quarantined.", unit="strikes", in_flags=False, ge=1, le=1e9
    )
    forgiven_per_s: float = setting(
        10.0, "Strikes that expire.", unit="strikes per second", in_flags=False, gt=0, le=1e9
    )
    first_s: float = setting(
        10.0,
        "Length of the first quarantine; each further one is twice as long.",
        unit="seconds",
        in_flags=False,
        gt=0,
        le=1e9,
    )
    most_s: float = setting(3600.0, "Length of the longest quarantine.", unit="seconds", in_flags=False, gt=0, le=1e9)


@dataclass(slots=True)
class Strikes:
    """One device's strikes, and how long it has been shut out for them.

    Attributes:
        settings: When that is, and for how long.
        now: Seconds on the clock of the other calls.
        level: How often in a row it was shut out.
    """

    settings: FenceSettings
    now: float
    level: int = 0
    _left: TokenBucket = field(init=False)
    _last_s: float = 0.0
    _until: float = 0.0

    def __post_init__(self) -> None:
        self._forget(self.now)

    def add(self, weight: float, now: float) -> float:
        """Count a strike.

        Returns:
            Seconds for which the device is shut out by it; 0.0 if it is not.
        """
        self._left.spend(weight, now)
        if self._left.wait_s(0.0, now) == 0.0:
            return 0.0
        if now - self._until > FORGIVEN * self._last_s:
            self.level = 0
        self._last_s = min(self.settings.first_s * 2.0**self.level, self.settings.most_s)
        self.level = min(self.level + 1, 64)
        self._until = now + self._last_s
        self._forget(self._until)
        return self._last_s

    def used(self, now: float) -> float:
        """Return the strikes that are not forgotten yet."""
        return self._left.used(now)

    @property
    def last_s(self) -> float:
        """How long the device was shut out the last time."""
        return self._last_s

    def since_s(self, now: float) -> float:
        """Return the seconds since that time was over; negative while it lasts."""
        return now - self._until

    def restore(self, strikes: float, *, level: int, last_s: float, since_s: float, now: float) -> None:
        """Go on where another run of the edge ended."""
        self._forget(now)
        self._left.spend(strikes, now)
        self.level, self._last_s, self._until = level, last_s, now - since_s

    def slowed(self, now: float) -> bool:
        """Whether the device has come half of the way."""
        return self._left.wait_s(_SLOWED * self.settings.strikes, now) > 0.0

    def _forget(self, now: float) -> None:
        self._left = TokenBucket(self.settings.forgiven_per_s, self.settings.strikes, now=now)

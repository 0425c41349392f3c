"""Share of the target model's time that grammars of one device may take while other devices are served.

What a grammar costs, its masks and the rows of tokens that it forces, makes a step longer for everybody in it. A device
that is alone is not limited.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fleet_common.limits import TokenBucket
from fleet_edge.sessions.guesses import MAX_GUESS

_SHARE: Final = 0.2
"""Of the time, for the masks of one device. Those of a schema take 1 to 3 % of a step of 40 ms."""

_BURST_S: Final = 0.25

_FORCED_BESIDE: Final = 8
"""Forced tokens of one device that are guessed in a step along with other devices' drafts."""

_ACTIVE_S: Final = 0.5
"""A device counts as served for this long after a verdict: it drafts meanwhile."""


@dataclass(slots=True)
class GrammarShare:
    """Counts the masks of each device. Times are monotonic seconds."""

    _budgets: dict[str, TokenBucket] = field(default_factory=dict)
    _served: dict[str, float] = field(default_factory=dict)  # when, by device, of late

    def served(self, devices: Iterable[str], now: float) -> None:
        """Note the devices that a step has served."""
        self._served = {device: at for device, at in self._served.items() if now - at <= _ACTIVE_S}
        self._served.update(dict.fromkeys(devices, now))

    def spend(self, device: str, seconds: float, now: float) -> None:
        """Count the time that a device's grammar took."""
        if seconds <= 0.0:
            return
        budget = self._budgets.get(device)
        if budget is None:
            full = [name for name, each in self._budgets.items() if each.wait_s(each.burst, now) == 0.0]
            for name in full:
                del self._budgets[name]
            budget = self._budgets[device] = TokenBucket(_SHARE, _BURST_S, now=now)
        budget.spend(seconds, now)

    def over(self, device: str, now: float) -> bool:
        """Whether a device's grammars have had their share while others are served."""
        budget = self._budgets.get(device)
        return budget is not None and budget.wait_s(0.0, now) > 0.0 and self._others_served(device, now)

    def most_forced(self, device: str, guessed: int, now: float) -> int:
        """Return how many forced tokens of a device may be guessed in a step, in which some are already."""
        return max(0, _FORCED_BESIDE - guessed) if self._others_served(device, now) else MAX_GUESS

    def _others_served(self, device: str, now: float) -> bool:
        return any(name != device and now - at <= _ACTIVE_S for name, at in self._served.items())

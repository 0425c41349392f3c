"""Fairness: which work may wait while other devices are verified, and which sessions keep their KV memory.

Endless prompts and drafts that are rarely accepted would let one device slow down all others. While other devices are
verified, such background work gets a small share of the time; on an idle edge it does not wait. Ordinary prompts are
not background work: a device has a credit of prompt tokens that are computed at once, and earns more with committed
tokens. Grammars of one device get a bounded share too, because their masks and forced tokens lengthen everybody's step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fleet_common.limits import TokenBucket
from fleet_edge.sessions.ngrams import MAX_SPECULATED

_HALF_LIFE_S: Final = 2.0
_OF_SILENCE: Final = 0.25
_CREDIT: Final = 512.0
_CREDIT_PER_S: Final = 8.0
_EARNED_PER_TOKEN: Final = 16.0
_MOST_EARNED: Final = 4096.0
"""Credit in prompt tokens: initial, per second, per committed token, and its limit. A device that opens sessions
without generating runs out of credit soon."""

_LEAST_YIELD: Final = 0.15
_SHORT: Final = 4
"""Length of a draft (tokens) that pays even if it is rejected: five rows for one token."""

_JUDGED_AT_LEAST: Final = 64.0
_MEMORY: Final = 512.0
"""Tokens computed after which half of a device's draft statistics is forgotten."""


@dataclass(slots=True)
class _Drafts:
    computed: float = 0.0
    committed: float = 0.0


@dataclass(slots=True)
class _Credit:
    given: TokenBucket
    earned: float = 0.0

    def left(self, now: float) -> bool:
        return self.earned >= 1.0 or self.given.wait_s(1.0, now) == 0.0

    def spend(self, tokens: float, now: float) -> None:
        paid = min(tokens, self.earned)
        self.earned -= paid
        self.given.spend(tokens - paid, now)

    def give_back(self, tokens: float) -> None:
        self.earned = min(_MOST_EARNED, self.earned + tokens)

    def earn(self, committed: int) -> None:
        self.earned = min(_MOST_EARNED, self.earned + _EARNED_PER_TOKEN * committed)


@dataclass(slots=True)
class BackgroundWork:
    """Decides which work may wait, and when it may run. Times are monotonic seconds.

    `share` is the share of the computing time for background work while others are served. Time in which nothing is
    computed does not count: devices that pause between drafts would earn background time for somebody else.
    """

    share: float = 0.05
    _foreground_s: float = 0.0
    _background_s: float = 0.0
    _ended_at: float | None = None  # the latest step
    _served_at: float = -math.inf  # the latest step with other work
    _drafts: dict[str, _Drafts] = field(default_factory=dict)
    _credits: dict[str, _Credit] = field(default_factory=dict)

    def may_run(self) -> bool:
        """Return whether background work may delay others in the next step."""
        return self._background_s * (1.0 - self.share) <= self._foreground_s * self.share

    def quiet_s(self, now: float) -> float:
        """Return how long background work may take while no other work is here.

        Whatever arrives meanwhile waits for its end: for a fraction of the time in which nothing has arrived.
        """
        return _OF_SILENCE * (now - self._served_at)

    def stepped(self, *, started: float, ended: float, tokens: int, background: int) -> None:
        """Count a step; `background` of its `tokens` were background work."""
        kept = 1.0 if self._ended_at is None else 0.5 ** ((ended - self._ended_at) / _HALF_LIFE_S)
        mine = (ended - started) * background / tokens if tokens else 0.0
        self._background_s = self._background_s * kept + mine
        self._foreground_s = self._foreground_s * kept + ended - started - mine
        self._ended_at = ended
        if background < tokens:
            self._served_at = ended

    def judged(self, device: str, *, computed: int, committed: int) -> None:
        """Count drafts of a device: `computed` tokens verified, `committed` tokens gained."""
        drafts = self._drafts.setdefault(device, _Drafts())
        kept = 0.5 ** (computed / _MEMORY)
        drafts.computed = drafts.computed * kept + computed
        drafts.committed = drafts.committed * kept + committed
        if (credit := self._credits.get(device)) is not None:
            credit.earn(committed)

    def wasteful(self, device: str) -> bool:
        drafts = self._drafts.get(device)
        return drafts is not None and (
            drafts.computed >= _JUDGED_AT_LEAST and drafts.committed < _LEAST_YIELD * drafts.computed
        )

    def longest_draft(self, device: str, most: int) -> int:
        """Return the longest draft to grant a device's next session: short after wasteful drafts."""
        return min(most, _SHORT) if self.wasteful(device) else most

    def has_credit(self, device: str, now: float) -> bool:
        """Whether prompt tokens of a device are computed at once."""
        return self._credit(device, now).left(now)

    def prefilled(self, device: str, tokens: int, now: float) -> None:
        self._credit(device, now).spend(tokens, now)

    def left_out(self, device: str, tokens: int) -> None:
        """Return the credit of prompt tokens that were removed from a step again."""
        self._credits[device].give_back(tokens)

    def _credit(self, device: str, now: float) -> _Credit:
        credit = self._credits.get(device)
        if credit is None:
            credit = self._credits[device] = _Credit(TokenBucket(_CREDIT_PER_S, _CREDIT, now=now))
        return credit


_SHARE: Final = 0.2
"""Share of the time for the masks of one device. Those of a schema take 1 to 3 % of a step of 40 ms."""

_BURST_S: Final = 0.25

_FORCED_BESIDE: Final = 8
"""Forced tokens of one device that are speculated in a step with other devices' drafts."""

_ACTIVE_S: Final = 0.5
"""Seconds after a verdict for which a device counts as served, because it is drafting."""


@dataclass(slots=True)
class GrammarShare:
    """Grammar time of each device, limited only while other devices are served. Times are monotonic seconds."""

    _budgets: dict[str, TokenBucket] = field(default_factory=dict)
    _served: dict[str, float] = field(default_factory=dict)  # when, by device, of late

    def served(self, devices: Iterable[str], now: float) -> None:
        self._served = {device: at for device, at in self._served.items() if now - at <= _ACTIVE_S}
        self._served.update(dict.fromkeys(devices, now))

    def spend(self, device: str, seconds: float, now: float) -> None:
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
        """Whether a device's grammars have used their share while others are served."""
        budget = self._budgets.get(device)
        return budget is not None and budget.wait_s(0.0, now) > 0.0 and self._others_served(device, now)

    def most_forced(self, device: str, guessed: int, now: float) -> int:
        """Return how many more forced tokens of a device may be speculated in a step."""
        return max(0, _FORCED_BESIDE - guessed) if self._others_served(device, now) else MAX_SPECULATED

    def _others_served(self, device: str, now: float) -> bool:
        return any(name != device and now - at <= _ACTIVE_S for name, at in self._served.items())


_ABSENT_S: Final = 2.0
"""Seconds without a step after which a session loses its turn."""


@dataclass(slots=True)
class MemoryTurns:
    """Turns in KV memory where it does not suffice for all busy sessions. Times are monotonic seconds.

    Bringing a session in means computing all its tokens again, so it stays until as many tokens were verified as were
    computed to bring it in. Then at most about half of the computation is repeated.
    """

    _owed: dict[int, int] = field(default_factory=dict)  # tokens computed to come in, less those verified since
    _used_at: dict[int, float] = field(default_factory=dict)

    def computed(self, handle: int, *, prefilled: int, verified: int, at: float) -> None:
        """Count a session's part of a step: `prefilled` tokens to bring it in, `verified` other tokens."""
        self._owed[handle] = self._owed.get(handle, 0) + prefilled - verified
        self._used_at[handle] = at

    def lasts(self, handle: int, *, now: float) -> bool:
        return self._owed.get(handle, 0) > 0 and now - self._used_at[handle] <= _ABSENT_S

    def balance(self, handle: int) -> int:
        """Return how many more tokens are to be verified until the session's turn is over; negative if it is over."""
        return self._owed.get(handle, 0)

    def end(self, handle: int) -> None:
        self._owed.pop(handle, None)
        self._used_at.pop(handle, None)

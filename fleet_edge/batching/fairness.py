"""Fairness: which work may wait while other devices are verified, and which sessions keep their KV memory.

Long prompts and drafts that are rarely accepted would let one device slow down all others. So while other devices are
served, prompts, masks and forced tokens of one device get a bounded share of the time each. Prompts above it, and
drafts that are rarely accepted, are background work with a small share; on an idle edge they do not wait.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fleet_common.limits import TokenBucket
from fleet_edge.batching.steps import StepReport
from fleet_edge.sessions.grammars import MAX_FORCED

_HALF_LIFE_S: Final = 2.0
_LEAST_YIELD: Final = 0.15
_SHORT: Final = 4
"""Length of a draft (tokens) that pays even if it is rejected: five rows for one token."""

_LEAST_VERIFIED: Final = 64.0
_MEMORY: Final = 512.0
"""Tokens computed after which half of a device's draft statistics is forgotten."""


@dataclass(slots=True)
class _Drafts:
    computed: float = 0.0
    committed: float = 0.0


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
    _drafts: dict[str, _Drafts] = field(default_factory=dict)

    def may_run(self) -> bool:
        """Return whether background work may delay others in the next step."""
        return self._background_s * (1.0 - self.share) <= self._foreground_s * self.share

    def on_step(self, report: StepReport) -> None:
        ended, seconds, tokens = report.times.ended, report.times.seconds, report.batch.tokens
        background = sum(len(work.item.tokens) for work in report.batch.works if work.background)
        kept = 1.0 if self._ended_at is None else 0.5 ** ((ended - self._ended_at) / _HALF_LIFE_S)
        mine = seconds * background / tokens if tokens else 0.0
        self._background_s = self._background_s * kept + mine
        self._foreground_s = self._foreground_s * kept + seconds - mine
        self._ended_at = ended

    def count_drafts(self, device: str, *, computed: int, committed: int) -> None:
        """Count drafts of a device: `computed` tokens verified, `committed` tokens gained."""
        drafts = self._drafts.setdefault(device, _Drafts())
        kept = 0.5 ** (computed / _MEMORY)
        drafts.computed = drafts.computed * kept + computed
        drafts.committed = drafts.committed * kept + committed

    def wasteful(self, device: str) -> bool:
        drafts = self._drafts.get(device)
        return drafts is not None and (
            drafts.computed >= _LEAST_VERIFIED and drafts.committed < _LEAST_YIELD * drafts.computed
        )

    def longest_draft(self, device: str, most: int) -> int:
        """Return the longest draft to grant a device's next session: short after wasteful drafts."""
        return min(most, _SHORT) if self.wasteful(device) else most


_SHARE: Final = 0.2
"""Share of the time for each of: the masks of one device, its forced tokens, its prompts. Masks of a schema take 1 to
3 % of a step of 40 ms."""

_BURST_S: Final = 0.25
_PROMPTS_BURST_S: Final = 0.5

_FORCED_WITH_OTHERS: Final = 8
"""Forced tokens of one device that are speculated in a step with other devices' drafts."""

_ACTIVE_S: Final = 0.5
"""Seconds after a verdict for which a device counts as served, because it is drafting."""

_OF_SILENCE: Final = 0.25
"""Longest time of background work in a step, as a share of the time for which no other device was served."""


@dataclass(slots=True)
class _Shares:
    """Share of the time of each device. Times are monotonic seconds."""

    burst_s: float = _BURST_S
    _budgets: dict[str, TokenBucket] = field(default_factory=dict)

    def spend(self, device: str, seconds: float, now: float) -> None:
        if seconds <= 0.0:
            return
        budget = self._budgets.get(device)
        if budget is None:
            unused = [name for name, each in self._budgets.items() if each.wait_s(each.burst, now) == 0.0]
            for name in unused:
                del self._budgets[name]
            budget = self._budgets[device] = TokenBucket(_SHARE, self.burst_s, now=now)
        budget.spend(seconds, now)

    def used_up(self, device: str, now: float) -> bool:
        budget = self._budgets.get(device)
        return budget is not None and budget.wait_s(0.0, now) > 0.0


@dataclass(slots=True)
class DeviceShares:
    """Time of each device for what lengthens everybody's steps, limited only while other devices are served.

    Masks, rows of forced tokens, and prompts have a share each. Without masks a device waits. Without rows its forced
    tokens are computed one in a step, as others are. Without prompts those are background work. Times are monotonic
    seconds.
    """

    _masks: _Shares = field(default_factory=_Shares)
    _rows: _Shares = field(default_factory=_Shares)
    _prompts: _Shares = field(default_factory=lambda: _Shares(_PROMPTS_BURST_S))
    _latest: dict[str, float] = field(default_factory=dict)  # the two devices served last

    def on_step(self, report: StepReport, *, row_s: float) -> None:
        """Count the time of a step; `row_s` is what one more row costs."""
        now, token_s = report.times.ended, report.token_s
        self.note_served((work.session.device for work in report.batch.verifications), now)
        for work in report.batch.works:
            device = work.session.device
            if not work.background:
                self.spend(device, now, prompts_s=token_s * work.prefilled)
            if (constraint := work.session.constraint) is not None:
                masks_s = constraint.take_spent_s()
                work.session.counters.grammar_ms += masks_s * 1e3
                self.spend(device, now, masks_s=masks_s, rows_s=row_s * work.speculated)

    def note_served(self, devices: Iterable[str], now: float) -> None:
        for device in devices:
            self._latest.pop(device, None)
            self._latest[device] = now
        while len(self._latest) > 2:  # noqa: PLR2004 - of any two devices one is another
            del self._latest[next(iter(self._latest))]

    def spend(
        self, device: str, now: float, *, masks_s: float = 0.0, rows_s: float = 0.0, prompts_s: float = 0.0
    ) -> None:
        self._masks.spend(device, masks_s, now)
        self._rows.spend(device, rows_s, now)
        self._prompts.spend(device, prompts_s, now)

    def masks_over(self, device: str, now: float) -> bool:
        """Whether a device's masks have used their share while others are served."""
        return self._masks.used_up(device, now) and self._others_served(device, now)

    def prompts_over(self, device: str, now: float) -> bool:
        """Whether a device's prompts have used their share while others are served."""
        return self._prompts.used_up(device, now) and self._others_served(device, now)

    def most_forced(self, device: str, speculated: int, now: float) -> int:
        """Return how many more forced tokens of a device may be speculated in a step."""
        if not self._others_served(device, now):
            return MAX_FORCED
        return 0 if self._rows.used_up(device, now) else max(0, _FORCED_WITH_OTHERS - speculated)

    def quiet_s(self, devices: Iterable[str], now: float) -> float:
        """Return how long work of these devices may take in a step without delaying others by much.

        That is a fraction of the time for which the others were silent: then they are delayed by no more than that.
        """
        return _OF_SILENCE * min((self._silent_s(device, now) for device in devices), default=math.inf)

    def _others_served(self, device: str, now: float) -> bool:
        return self._silent_s(device, now) <= _ACTIVE_S

    def _silent_s(self, device: str, now: float) -> float:
        return min((now - at for name, at in self._latest.items() if name != device), default=math.inf)


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

    def on_step(self, report: StepReport) -> None:
        for work in report.batch.works:
            verified = work.verified - work.speculated
            self.count(work.session.handle, prefilled=work.prefilled, verified=verified, at=report.times.ended)

    def count(self, handle: int, *, prefilled: int, verified: int, at: float) -> None:
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

"""Fairness: which work waits while other devices are served, and which sessions keep their KV memory.

Prompts, masks, rows of forced tokens, and drafts that are almost never accepted are extra work: they lengthen the steps
of all devices. While others are served, extra work above a bounded share of the computing time waits. On an idle edge
nothing waits.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from fleet_edge.batching.step_cost import StepCost
from fleet_edge.batching.steps import StepReport
from fleet_edge.sessions.grammars import MAX_FORCED
from fleet_edge.sessions.machine import EdgeSession

_PROMPT_SHARE: Final = 1.0 / 3.0
"""Share of the computing time for the prompts of all devices; more if their equal parts are more."""

_MAX_BESIDE: Final = 0.5
"""Share of a step for prompts while others are served, since a prompt lengthens it by its duration without prompts."""

_SHARE: Final = 0.2
"""Share of the rest for the other extra work of all devices. Masks of a schema take 1 to 3 % of a step of 40 ms."""

_BURST_S: Final = 0.25
_BURST_STEPS: Final = 2.0
"""Extra work of a device that does not wait, the longer of: seconds, or multiples of a step without extra work."""

_PROMPTS: Final = 4.0
"""Factor on both for prompts: short ones are computed at once."""

_ROWS_STEPS: Final = 2.0
"""Longest time for the forced rows of a step with several devices, in steps without extra work."""

_WASTE: Final = 4.0
"""What a second of drafts that are almost never accepted counts: so they get a twentieth of the time."""

_ACTIVE_S: Final = 0.5
_ACTIVE_STEPS: Final = 4.0
"""Time after a verdict for which a device counts as served, because it is drafting: the longer of seconds, or steps."""

_OF_SILENCE: Final = 0.25
"""Longest time of waiting work in a step, as a share of the time for which no other device was served."""

_SMOOTHING: Final = 0.1
"""Weight of the latest step in the duration of a step without extra work."""

_MIN_YIELD: Final = 0.15
_SHORT: Final = 4
"""Length of a draft (tokens) that pays even if it is rejected: five rows for one token."""

_MIN_VERIFIED: Final = 64.0
_MEMORY: Final = 512.0
"""Tokens computed after which half of a device's draft statistics is forgotten."""


class Extra(Enum):
    """Kinds of extra work."""

    PROMPTS = auto()
    GRAMMAR = auto()  # masks, and rows of forced tokens
    DRAFTS = auto()  # those that are almost never accepted


@dataclass(slots=True)
class _Drafts:
    computed: float = 0.0
    committed: float = 0.0


@dataclass(slots=True)
class ExtraWork:
    """Decides which extra work waits. Times are monotonic seconds.

    A device has a deficit for each kind of extra work: what it has used and not paid back. Work waits while its deficit
    is above a burst. Each step pays back:

    - of prompts, a device's part of their share, or its equal part of the step, since devices need prompts as they
      need tokens;
    - of the rest, one share for all devices together, by deficit round robin (Shreedhar and Varghese, 1995).
    """

    _deficits: dict[tuple[str, Extra], float] = field(default_factory=dict)
    _served: dict[str, float] = field(default_factory=dict)  # time of the latest verdict, by device
    _drafts: dict[str, _Drafts] = field(default_factory=dict)
    _step_s: float = 0.0  # a step that verifies, without its extra work
    _row_s: float = 0.0
    _active_s: float = _ACTIVE_S

    def on_step(self, report: StepReport, cost: StepCost) -> None:
        now, seconds, works = report.times.ended, report.times.seconds, report.batch.works
        masks_s = [_take_masks_s(work.session) for work in works]
        token_s = max(0.0, seconds - sum(masks_s)) / max(1, report.batch.tokens)
        self._row_s = min(token_s, cost.token_s or token_s)
        prompt_s = min(token_s, cost.prompt_token_s or token_s)  # a step without prompts takes its time anyway
        self._active_s = max(_ACTIVE_S, _ACTIVE_STEPS * seconds)
        self.note_served((work.session.device for work in report.batch.verifications), now)
        if any(not work.background for work in works):
            self._pay_back(seconds, prompts_s=prompt_s * report.batch.prefilled)
        extra_s = 0.0
        for work, masks in zip(works, masks_s, strict=True):
            device = work.session.device
            prompts_s = prompt_s * work.prefilled
            grammar_s = masks + (self._row_s * work.speculated if work.session.constraint is not None else 0.0)
            extra_s += prompts_s + grammar_s
            if work.background:
                continue  # it has delayed nobody
            self.spend(device, Extra.PROMPTS, prompts_s, now)
            self.spend(device, Extra.GRAMMAR, grammar_s, now)
            if not work.decodes and self.wasteful(device):
                self.spend(device, Extra.DRAFTS, _WASTE * token_s * work.verified, now)
        if report.batch.verifications:
            step_s = max(0.0, seconds - extra_s)
            self._step_s = self._step_s + _SMOOTHING * (step_s - self._step_s) if self._step_s else step_s
        self._begin_round()

    def spend(self, device: str, kind: Extra, seconds: float, now: float) -> None:
        if seconds > 0.0 and self._others_served(device, now):
            self._deficits[device, kind] = self._deficit(device, kind) + seconds

    def note_served(self, devices: Iterable[str], now: float) -> None:
        self._served = {name: at for name, at in self._served.items() if now - at <= self._active_s}
        self._served |= dict.fromkeys(devices, now)

    def waits(self, device: str, kind: Extra, now: float) -> bool:
        """Extra work of a device has to wait while others are served."""
        return self._deficit(device, kind) > self._burst_s(kind) and self._others_served(device, now)

    def max_forced(self, device: str, speculated: int, now: float) -> int:
        """Return how many forced tokens of a session to speculate in a step that speculates some already."""
        if self._row_s <= 0.0 or not self._others_served(device, now):
            return MAX_FORCED
        left_s = min(self._burst_s(Extra.GRAMMAR) - self._deficit(device, Extra.GRAMMAR), _ROWS_STEPS * self._step_s)
        return max(0, min(MAX_FORCED, int(left_s / self._row_s) - speculated))

    def prompt_share(self, devices: Collection[str], now: float) -> float:
        """Return about which share of the time is for the prompts of these devices, if no others have any."""
        others = sum(name not in devices and now - at <= self._active_s for name, at in self._served.items())
        if not others:
            return 1.0
        part = min(_PROMPT_SHARE, 1.0 / (len(devices) + others))
        return max(_PROMPT_SHARE, min(_MAX_BESIDE, len(devices) * part))

    def quiet_s(self, devices: Collection[str], now: float) -> float:
        """Return how long work of these devices may take in a step without delaying others by much.

        That is a fraction of the time for which the others were silent: then they are delayed by no more than that.
        """
        silent_s = (now - at for name, at in self._served.items() if name not in devices)
        return _OF_SILENCE * min(silent_s, default=math.inf)

    def count_drafts(self, device: str, *, computed: int, committed: int) -> None:
        """Count drafts of a device: `computed` tokens verified, `committed` tokens gained."""
        drafts = self._drafts.setdefault(device, _Drafts())
        kept = 0.5 ** (computed / _MEMORY)
        drafts.computed = drafts.computed * kept + computed
        drafts.committed = drafts.committed * kept + committed

    def wasteful(self, device: str) -> bool:
        drafts = self._drafts.get(device)
        return drafts is not None and (
            drafts.computed >= _MIN_VERIFIED and drafts.committed < _MIN_YIELD * drafts.computed
        )

    def longest_draft(self, device: str, most: int) -> int:
        """Return the longest draft to grant a device's next session: short after wasteful drafts."""
        return min(most, _SHORT) if self.wasteful(device) else most

    def _burst_s(self, kind: Extra) -> float:
        return (_PROMPTS if kind is Extra.PROMPTS else 1.0) * max(_BURST_S, _BURST_STEPS * self._step_s)

    def _deficit(self, device: str, kind: Extra) -> float:
        return self._deficits.get((device, kind), 0.0)

    def _others_served(self, device: str, now: float) -> bool:
        return any(name != device and now - at <= self._active_s for name, at in self._served.items())

    def _pay_back(self, seconds: float, *, prompts_s: float) -> None:
        """Reduce the deficits after a step, of which prompts took a part."""
        prompts = {key: used for key, used in self._deficits.items() if key[1] is Extra.PROMPTS}
        devices = self._served.keys() | {device for device, _ in prompts}
        part = max(_PROMPT_SHARE / max(1, len(prompts)), min(_PROMPT_SHARE, 1.0 / max(1, len(devices))))
        left = {key: used - part * seconds for key, used in prompts.items()}
        budget_s = _SHARE * (seconds - prompts_s)
        others = sorted(self._deficits.keys() - prompts.keys(), key=self._deficits.__getitem__)
        for number, key in enumerate(others):  # what one does not need goes to the others
            paid = min(self._deficits[key], budget_s / (len(others) - number))
            budget_s -= paid
            left[key] = self._deficits[key] - paid
        self._deficits = {key: used for key, used in left.items() if used > 0.0}

    def _begin_round(self) -> None:
        """Forgive the masks and forced rows that each of the served devices has used: no one waits for an equal."""
        common = min((self._deficit(device, Extra.GRAMMAR) for device in self._served), default=0.0)
        if common > 0.0:
            for key in [key for key in self._deficits if key[1] is Extra.GRAMMAR]:
                self._deficits[key] = max(0.0, self._deficits[key] - common)


def _take_masks_s(session: EdgeSession) -> float:
    """Return how long the masks of a session took since the last call."""
    if session.constraint is None:
        return 0.0
    masks_s = session.constraint.take_spent_s()
    session.counters.grammar_ms += masks_s * 1e3
    return masks_s


_ABSENT_S: Final = 2.0
_ABSENT_STEPS: Final = 32.0
"""Time without a step after which a session loses its turn, the longer of: seconds, or steps.

A prompt that waits for its share of the time is in few of the steps.
"""


@dataclass(slots=True)
class MemoryTurns:
    """Turns in KV memory where it does not suffice for all busy sessions. Times are monotonic seconds.

    Bringing a session in means computing all its tokens again, so it stays until as many tokens were verified as were
    computed to bring it in. Then at most about half of the computation is repeated.
    """

    _owed: dict[int, int] = field(default_factory=dict)  # tokens computed to come in, less those verified since
    _used_at: dict[int, float] = field(default_factory=dict)
    _absent_s: float = _ABSENT_S

    def on_step(self, report: StepReport) -> None:
        self._absent_s = max(_ABSENT_S, _ABSENT_STEPS * report.times.seconds)
        for work in report.batch.works:
            verified = work.verified - work.speculated
            self.count(work.session.handle, prefilled=work.prefilled, verified=verified, at=report.times.ended)

    def count(self, handle: int, *, prefilled: int, verified: int, at: float) -> None:
        """Count a session's part of a step: `prefilled` tokens to bring it in, `verified` other tokens."""
        self._owed[handle] = self._owed.get(handle, 0) + prefilled - verified
        self._used_at[handle] = at

    def lasts(self, handle: int, *, now: float) -> bool:
        return self._owed.get(handle, 0) > 0 and now - self._used_at[handle] <= self._absent_s

    def balance(self, handle: int) -> int:
        """Return how many more tokens are to be verified until the session's turn is over; negative if it is over."""
        return self._owed.get(handle, 0)

    def end(self, handle: int) -> None:
        self._owed.pop(handle, None)
        self._used_at.pop(handle, None)

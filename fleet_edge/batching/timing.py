"""Timing: what a verdict took, whether to hold a step for drafts that are due, and the verdict-time goal."""

import math
from dataclasses import dataclass, field, replace
from typing import Final

from fleet_edge.batching.steps import StepReport, StepTimes
from fleet_edge.sessions.drafts import DraftResult


@dataclass(slots=True)
class PrefillLog:
    """Steps that computed each session's prompt, as far back as a draft may have waited for them."""

    _steps: dict[int, list[StepTimes]] = field(default_factory=dict)

    def on_step(self, report: StepReport) -> None:
        for work in report.batch.works:
            if work.chain:
                self.drop(work.session.handle, before=min(arrived.at for arrived in work.chain))
            else:
                self.add(work.session.handle, report.times)

    def add(self, handle: int, step: StepTimes) -> None:
        self._steps.setdefault(handle, []).append(step)

    def drop(self, handle: int, *, before: float) -> None:
        """Drop steps that ended before the oldest verified draft arrived."""
        if handle in self._steps:
            self._steps[handle] = [step for step in self._steps[handle] if step.ended > before]

    def forget(self, handle: int) -> None:
        self._steps.pop(handle, None)

    def timed(self, result: DraftResult, step: StepTimes) -> DraftResult:
        """Return the result on a draft in `step` with its times."""
        arrived = result.arrived
        prefill_s = sum(
            max(0.0, min(each.ended, step.started) - max(each.started, arrived.at))
            for each in self._steps.get(arrived.draft.handle, ())
        )
        return replace(
            result,
            batch=step.sessions,
            queue_ms=max(0.0, step.started - arrived.at - prefill_s) * 1e3,
            prefill_ms=prefill_s * 1e3,
            compute_ms=step.compute_ms,
        )


_SMOOTHING: Final = 0.3
_MARGIN: Final = 1.25
"""How much longer than its mean turnaround to wait for a device."""

_PATIENCE: Final = 3.0
"""Number of mean turnarounds for which a device is expected."""

_MIN_PATIENCE_S: Final = 0.5


@dataclass(slots=True)
class BatchingDelay:
    """Holds a step for drafts that are about to arrive, where that pays.

    A step costs nearly as much for one session as for a few, and a session that just misses a step waits for a whole
    one: quick devices fall into two groups that take turns in half-empty steps. So a step is held for devices due
    within `share` of a step (by their measured turnaround), if they save more than the ready ones lose; 0 never holds.
    """

    share: float = 0.5
    _answered: dict[int, float] = field(default_factory=dict)
    _turnaround: dict[int, float] = field(default_factory=dict)

    @property
    def expects_drafts(self) -> bool:
        return bool(self._answered)

    def expect_draft(self, handle: int, *, at: float) -> None:
        """Record a verdict after which the session's device drafts again."""
        self._answered[handle] = at

    def on_draft(self, handle: int, *, at: float) -> None:
        since = self._answered.pop(handle, None)
        if since is not None:
            took = max(0.0, at - since)
            before = self._turnaround.get(handle, took)
            self._turnaround[handle] = before + _SMOOTHING * (took - before)

    def forget(self, handle: int) -> None:
        self._answered.pop(handle, None)
        self._turnaround.pop(handle, None)

    def gap_s(self, *, now: float) -> float:
        """Return how long no draft is likely to arrive: infinity if none is expected.

        0 if one is overdue, or due from a device that has not been measured.
        """
        gap_s = math.inf
        for handle, at in self._answered.items():
            turnaround_s = self._turnaround.get(handle, 0.0)
            if now - at <= max(_MIN_PATIENCE_S, _PATIENCE * turnaround_s):
                gap_s = min(gap_s, max(0.0, at + turnaround_s - now))
        return gap_s

    def hold_s(self, ready: int, *, now: float, step_s: float) -> float:
        """Return how long to hold a step of about `step_s` for which `ready` sessions wait, in seconds."""
        if ready == 0 or not self._answered:
            return 0.0
        due = sorted(
            self._answered[handle] + _MARGIN * self._turnaround[handle] - now
            for handle in self._answered
            if handle in self._turnaround
        )
        best, gain = 0.0, 0.0
        for late, wait in enumerate((wait for wait in due if 0.0 < wait <= self.share * step_s), start=1):
            # Sessions that arrive in time save about a step; ready ones lose the wait.
            saved = late * step_s - ready * wait
            if saved > gain:
                best, gain = wait, saved
        return best

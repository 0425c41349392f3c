"""Outage: whether any edge answers a text, and since when none does."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fleet_device.client.waiting import Waiting
from fleet_device.errors import EdgeUnavailable
from fleet_device.offline import OfflinePolicy, Outages
from fleet_device.session.states import SessionState

__all__ = ["Absence", "Outage"]


@dataclass(slots=True)
class Absence:
    """Since when there has been no broker, or no edge; kept from one text to the next.

    Attributes:
        clock: Monotonic seconds.
        since: By the clock; None while somebody is there.
    """

    clock: Callable[[], float]
    since: float | None = None

    def note(self, *, absent: bool) -> float | None:
        """Take whether nobody is there now; return for how long that has been so (seconds), None if somebody is."""
        if not absent:
            self.since = None
            return None
        now = self.clock()
        if self.since is None:
            self.since = now
        return now - self.since


@dataclass(slots=True)
class Outage:
    """The watch of one text.

    Attributes:
        waiting: What is waited for, and since when.
        absence: Since when nobody is there.
        settings: When a policy applies, and which.
    """

    waiting: Waiting
    absence: Absence
    settings: Outages = field(default_factory=Outages)

    def cause(self) -> EdgeUnavailable | None:
        """Return why no edge answers, once that has lasted long enough for the policy to apply."""
        if not self._watched:
            return None
        absent_s = self.absence.note(absent=self._absent())
        if absent_s is not None and absent_s >= self.settings.after_s:
            return self.waiting.outbound.silence(max(1.0, absent_s))
        if self._silence_left_s() <= 0.0:
            opened = self.waiting.session.opened
            return self.waiting.outbound.silence(self._patience_s, edge=None if opened is None else opened.edge)
        return None

    def quiet_s(self) -> float:
        """Return for how long there is no outage if nothing comes (seconds)."""
        if not self._watched:
            return math.inf
        absent_s = self.absence.note(absent=self._absent())
        left_s = math.inf if absent_s is None else self.settings.after_s - absent_s
        return max(0.0, min(left_s, self._silence_left_s()))

    def may_rejoin(self) -> bool:
        """Whether a text that goes on without an edge may ask for one."""
        waiting = self.waiting
        return self.settings.rejoin and waiting.outbound.connected and bool(waiting.edges.online())

    # Within

    @property
    def _watched(self) -> bool:
        """Whether an outage changes what is done: a text that waits has its own patience."""
        return self.settings.policy is not OfflinePolicy.WAIT and self.waiting.session.ended is None

    def _absent(self) -> bool:
        waiting = self.waiting
        if not waiting.outbound.connected:
            return True
        # An edge that has granted the session says itself when it goes, or the broker says so for it.
        if waiting.session.opened is not None:
            return False
        return waiting.session.state is SessionState.UNDELIVERED or not waiting.edges.online()

    @property
    def _patience_s(self) -> float:
        """For how long an edge that is there may say nothing (seconds)."""
        patience_s = self.settings.answer_s * self.waiting.patience
        return patience_s if self.waiting.session.granted else min(patience_s, self.waiting.retry.timeouts.open_s)

    def _silence_left_s(self) -> float:
        retry = self.waiting.retry
        return self._patience_s - retry.silent_s if retry.owed and not retry.holding else math.inf

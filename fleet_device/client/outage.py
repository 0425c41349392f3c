"""Outage: whether any edge answers a request, and since when none does."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fleet_device.client.waiting import Waiting
from fleet_device.errors import EdgeUnavailable
from fleet_device.offline import OfflinePolicy, Outages
from fleet_device.session.states import SessionState


@dataclass(slots=True)
class Absence:
    """Since when the device has had no broker or no edge, whether or not a request runs.

    Attributes:
        clock: Monotonic seconds.
        since: By the clock; None while an edge is there. A device begins without one.
    """

    clock: Callable[[], float]
    since: float | None = field(init=False)

    def __post_init__(self) -> None:
        """Begin to count the time."""
        self.since = self.clock()

    def note(self, *, absent: bool) -> None:
        """Record whether an edge is there; call it whenever that may have changed."""
        if not absent:
            self.since = None
        elif self.since is None:
            self.since = self.clock()

    def lasted_s(self) -> float:
        """Return for how long no edge has been there (seconds)."""
        return 0.0 if self.since is None else self.clock() - self.since


@dataclass(slots=True)
class Outage:
    """The watch of one request.

    Attributes:
        waiting: What is waited for, and since when.
        absence: Since when no edge is there for the device as a whole.
        settings: When a policy applies, and which.
    """

    waiting: Waiting
    absence: Absence
    settings: Outages = field(default_factory=Outages)
    _since: float | None = None  # this request has had no edge since then

    def cause(self) -> EdgeUnavailable | None:
        """Return why no edge answers, once that has lasted long enough for the policy to apply."""
        absent_s = self._absent_s()
        if not self._watched:
            return None
        if absent_s is not None:
            lasts = absent_s >= self.settings.absence_s
            return self.waiting.outbound.silence(max(1.0, absent_s)) if lasts else None
        if self._silence_left_s() <= 0.0:
            opened = self.waiting.session.opened
            return self.waiting.outbound.silence(self._patience_s, edge=None if opened is None else opened.edge)
        return None

    def quiet_s(self) -> float:
        """Return for how long there is no outage if nothing comes (seconds)."""
        absent_s = self._absent_s()
        if not self._watched:
            return math.inf
        left_s = self._silence_left_s() if absent_s is None else self.settings.absence_s - absent_s
        return max(0.0, left_s)

    def may_rejoin(self) -> bool:
        """Whether a generation that goes on without an edge may ask for one."""
        waiting = self.waiting
        return self.settings.rejoin and waiting.outbound.connected and bool(waiting.edges.online())

    # Within

    @property
    def _watched(self) -> bool:
        """Whether an outage changes what is done: a request that waits has its own patience."""
        return self.settings.policy is not OfflinePolicy.WAIT and self.waiting.session.ended is None

    def _absent_s(self) -> float | None:
        """Return for how long this request has had no edge (seconds); None if it has one."""
        if not self._absent():
            if self._since is not None:
                self._since = None
                self.waiting.retry.edge_is_back()
            return None
        if self._since is None:
            self._since = self.absence.clock()
        return max(self.absence.clock() - self._since, self.absence.lasted_s())

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

"""Refusals: what an edge declines, whether that passes, and when it is worth asking again.

A device keeps to the times that edges name, for all its requests: that is how it never comes to be quarantined for
asking. One edge does not speak for the others: while several are online, each of them is asked once before a refusal
holds, so that an edge that is wrong or hostile cannot keep a device from the rest.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleet_device.client.inbox import EdgePresences
from fleet_device.client.retry import RetryState
from fleet_device.errors import SessionFailed, SessionRefused
from schemas.messages import Fault, Refused
from schemas.reasons import FaultCode, RefusalCode

_log = logging.getLogger(__name__)

# Refusals that pass by themselves, so that a resuming device tries again. One that has written nothing yet tries again
# only at an edge that ends, since another takes its place; a busy one the application is told of.
_PASSING: Final = frozenset({RefusalCode.BUSY, RefusalCode.DRAINING})
_PASSING_AT_FIRST: Final = frozenset({RefusalCode.DRAINING})

# Refusals of the device itself, that pass at a time which the edge names.
_TIMED: Final = frozenset({RefusalCode.QUOTA, RefusalCode.FENCED})

# Refusals that another edge may not share.
_ELSEWHERE: Final = _TIMED | {RefusalCode.BUSY}

# Most edges that are asked for what one of them declines.
_MOST_EDGES: Final = 8

# What is over its quota as a whole is told so once a second.
_WAIT_WITH_ALL_S: Final = 1.0

LOOK_AGAIN_S: Final = 60.0
"""Longest time for which an edge keeps a device from asking (seconds): an administrator may let it in earlier."""


@dataclass(slots=True)
class RefusedUntil:
    """What the device remembers of its last timed refusal, from one text to the next.

    Attributes:
        clock: Monotonic seconds.
        edges: Which edges are there; one that was not online at the refusal has no part in it.
    """

    clock: Callable[[], float]
    edges: EdgePresences
    _until: float = -math.inf
    _code: RefusalCode = RefusalCode.OTHER
    _by: frozenset[str] = frozenset()

    def note(self, refused: SessionRefused) -> None:
        """Take a refusal that names a time."""
        if refused.code in _TIMED and refused.retry_s is not None:
            self._until = self.clock() + min(refused.retry_s, LOOK_AGAIN_S)
            self._code = refused.code
            self._by = self._online()

    def lift(self) -> None:
        """An edge has taken a session: nothing stands against the next."""
        self._until = -math.inf

    @property
    def left_s(self) -> float:
        """Seconds until an edge may be asked again; 0 at once."""
        return max(0.0, self._until - self.clock()) if self._online() <= self._by else 0.0

    def _online(self) -> frozenset[str]:
        return frozenset(state.edge for state in self.edges.online())

    def check(self, patience_s: float) -> None:
        """Check that an edge may be asked within a time.

        Raises:
            SessionRefused: It may not; nobody was asked.
        """
        if (left_s := self.left_s) > patience_s:
            why = "shut out of the edge" if self._code is RefusalCode.FENCED else "over its quota at the edge"
            raise SessionRefused(self._code, f"The device is {why}; ask again in {left_s:.0f} s.", retry_s=left_s)


@dataclass(slots=True)
class Refusals:
    """The refusals of one text.

    Attributes:
        retry: Waits as they ask.
        until: Remembers them for the next text.
        last: How the last question was answered, if it may be answered better later.
        held_s: Time that the request has waited for a quota of the device (seconds).
    """

    retry: RetryState
    until: RefusedUntil
    last: SessionRefused | None = None
    held_s: float = 0.0
    _declined: int = 0  # in a row, since an edge has verified anything
    _soonest: float = math.inf  # when the first of those that have declined may be asked again

    def progress(self) -> None:
        """Forget what edges have declined: one has verified something, or the time that they named has come."""
        self._declined, self._soonest = 0, math.inf

    def postpone(self, refused: Refused) -> None:
        """Wait with the next Open as long as a refusal asks for.

        Raises:
            SessionRefused: It does not pass, or not within the time that there is to wait.
        """
        retry_s = refused.retry_s
        if refused.code in _ELSEWHERE:
            if self.leave(retry_s):
                self.last = SessionRefused(refused.code, refused.sentence, retry_s=retry_s)
                self.retry.hold(0.0)
                return
            retry_s = self._least(retry_s)
        error = SessionRefused(refused.code, refused.sentence, retry_s=retry_s)
        self.until.note(error)
        if refused.code in _TIMED:
            self._hold(error, retry_s, least_s=0.0, opened=False)
        elif refused.code not in (_PASSING if self.retry.resumes else _PASSING_AT_FIRST):
            raise error
        self.last = error

    def leave(self, retry_s: float | None) -> bool:
        """Count that an edge has declined; return whether another one is asked next.

        Args:
            retry_s: Seconds after which it would not; None if it does not say.
        """
        now = self.retry.clock()
        if self._soonest <= now:
            self._soonest = math.inf
        if retry_s is not None:
            self._soonest = min(self._soonest, now + retry_s)
        self._declined += 1
        online = len(self.until.edges.online())
        # One more than there are: an edge that answers what another was asked for leaves that one the time to do so.
        return online > 1 and self._declined <= min(online, _MOST_EDGES)

    def wait(self, fault: Fault, *, opened: bool) -> bool:
        """Keep the session, and send nothing for as long as a fault asks for.

        Args:
            fault: Of one draft, or of all that the device sends.
            opened: Whether an edge has the session.

        Returns:
            False if another edge is asked for the session instead.

        Raises:
            SessionRefused: That is longer than there is to wait.
        """
        seconds = fault.retry_s or 0.0
        if self.retry.would_be_silent(seconds) and self.leave(seconds):
            return False
        self.last = SessionRefused(RefusalCode.QUOTA, fault.sentence, retry_s=fault.retry_s)
        least_s = _WAIT_WITH_ALL_S if fault.handle is None else 0.0
        self._hold(self.last, seconds, least_s=least_s, opened=opened)
        return True

    def give_up(self, fault: Fault) -> None:
        """End the session, unless an edge shuts out the device and another one can be asked for the session.

        Raises:
            SessionRefused: All edges that are online shut it out, also with its next requests.
            SessionFailed: The session has failed.
        """
        if fault.code is not FaultCode.QUOTA or fault.retry_s is None:
            raise SessionFailed(fault.sentence)
        if self.leave(fault.retry_s):
            return
        shut_out = SessionRefused(RefusalCode.FENCED, fault.sentence, retry_s=self._least(fault.retry_s))
        self.until.note(shut_out)
        raise shut_out

    def _least(self, retry_s: float | None) -> float | None:
        """Return the shortest time that an edge has named (seconds)."""
        return retry_s if retry_s is None else min(retry_s, max(0.0, self._soonest - self.retry.clock()))

    def hold(self, seconds: float, reason: str) -> None:
        """Send nothing for some time, because the device has used up a quota at the edge."""
        _log.warning("A request waits %.1f s: %s", seconds, reason)
        self.held_s += seconds
        self.retry.hold(seconds)

    def _hold(self, error: SessionRefused, retry_s: float | None, *, least_s: float, opened: bool) -> None:
        if retry_s is None or not self.retry.fits(retry_s, opened=opened):
            raise error
        self.hold(max(retry_s, least_s), str(error))
        self.progress()  # behind that time all are asked again

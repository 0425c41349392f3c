"""Refusals: what an edge declines, whether that passes, and when it is worth asking again.

A device keeps to the times that it is told, whoever asks it for texts meanwhile: that is how it never comes to be shut
out for asking.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleet_device.client.retry import RetryState
from fleet_device.errors import DeviceError, SessionFailed, SessionRefused
from schemas.messages import Fault, Refused
from schemas.reasons import FaultCode, RefusalCode

__all__ = ["Refusals", "RefusedUntil"]

# Refusals that pass by themselves, so that a resuming device tries again. One that has written nothing yet tries again
# only at an edge that ends, since another takes its place; a busy one the application is told of.
_PASSING: Final = frozenset({RefusalCode.BUSY, RefusalCode.DRAINING})
_PASSING_AT_FIRST: Final = frozenset({RefusalCode.DRAINING})

# Refusals of the device itself, that pass at a time which the edge names.
_TIMED: Final = frozenset({RefusalCode.QUOTA, RefusalCode.FENCED})

# What is over its quota as a whole is told so once a second.
_WAIT_WITH_ALL_S: Final = 1.0

# An administrator may let a device in again earlier: so often it looks.
_LOOK_AGAIN_S: Final = 60.0


@dataclass(slots=True)
class RefusedUntil:
    """What the device remembers of its last timed refusal, from one text to the next.

    Attributes:
        clock: Monotonic seconds.
    """

    clock: Callable[[], float]
    _until: float = -math.inf
    _code: RefusalCode = RefusalCode.OTHER

    def note(self, refused: SessionRefused) -> None:
        """Take a refusal that names a time."""
        if refused.code in _TIMED and refused.retry_s is not None:
            self._until = self.clock() + min(refused.retry_s, _LOOK_AGAIN_S)
            self._code = refused.code

    def lift(self) -> None:
        """An edge has taken a session: nothing stands against the next."""
        self._until = -math.inf

    @property
    def left_s(self) -> float:
        """Seconds until an edge may be asked again; 0 at once."""
        return max(0.0, self._until - self.clock())

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
    """

    retry: RetryState
    until: RefusedUntil
    last: SessionRefused | None = None

    def postpone(self, refused: Refused) -> None:
        """Wait with the next Open as long as a refusal asks for.

        Raises:
            SessionRefused: It does not pass, or not within the time that there is to wait.
        """
        error = SessionRefused(refused.code, refused.sentence, retry_s=refused.retry_s)
        self.until.note(error)
        if refused.code in _TIMED:
            self._hold(error, refused.retry_s, least_s=0.0, opened=False)
        elif refused.code not in (_PASSING if self.retry.resumes else _PASSING_AT_FIRST):
            raise error
        self.last = error

    def wait(self, fault: Fault, *, opened: bool) -> None:
        """Keep the session, and send nothing for as long as a fault asks for.

        Args:
            fault: Of one draft, or of all that the device sends.
            opened: Whether an edge has the session.

        Raises:
            SessionRefused: That is longer than there is to wait.
        """
        self.last = SessionRefused(RefusalCode.QUOTA, fault.sentence, retry_s=fault.retry_s)
        least_s = _WAIT_WITH_ALL_S if fault.handle is None else 0.0
        self._hold(self.last, fault.retry_s or 0.0, least_s=least_s, opened=opened)

    def give_up(self, fault: Fault) -> DeviceError:
        """Return the error of a fault that ends the session; one of the device itself stands against its next texts."""
        if fault.code is FaultCode.QUOTA and fault.retry_s is not None:
            shut_out = SessionRefused(RefusalCode.FENCED, fault.sentence, retry_s=fault.retry_s)
            self.until.note(shut_out)
            return shut_out
        return SessionFailed(fault.sentence)

    def _hold(self, error: SessionRefused, retry_s: float | None, *, least_s: float, opened: bool) -> None:
        if retry_s is None or not self.retry.fits(retry_s, opened=opened):
            raise error
        self.retry.hold(max(retry_s, least_s))

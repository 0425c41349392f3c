"""Timeouts and retry policy: how long a device waits for an edge, how often it asks again, and when it gives up."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.errors import SessionFailed

__all__ = ["RetryState", "Timeouts"]

# An edge that keeps asking to begin again without a token between is one that will never get on.
_MAX_FRUITLESS: Final = 20


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the agent waits.

    Attributes:
        open_s: For an edge to answer the first Open.
        resume_s: For an edge to take a session over again after a loss.
        verdict_s: For a verdict, before the draft is repeated.
        close_s: For the edge's last word.
        retry_s: Between two Opens while no edge answers.
    """

    open_s: float = 15.0
    resume_s: float = 120.0
    verdict_s: float = 10.0
    close_s: float = 5.0
    retry_s: float = 1.0


@dataclass(slots=True)
class RetryState:
    """What a session has waited for so far, in time and in vain.

    Attributes:
        timeouts: How long to wait.
        clock: Monotonic seconds.
        resumes: How often the session was opened again.
    """

    timeouts: Timeouts
    clock: Callable[[], float]
    resumes: int = 0
    _fruitless: int = 0  # resumes since the last committed token
    _waiting_since: float = field(init=False)  # the edge has owed an answer since, and given none
    _asked_at: float = field(init=False)

    def __post_init__(self) -> None:
        """Begin to count the time."""
        self._waiting_since = self._asked_at = self.clock()

    def asked(self) -> None:
        """Something was sent that wants an answer."""
        self._asked_at = self.clock()

    def answered(self, *, got_on: bool) -> None:
        """An answer has come.

        Args:
            got_on: Whether the text has grown by it.
        """
        self._waiting_since = self.clock()
        if got_on:
            self._fruitless = 0

    def resumed(self, cause: str) -> None:
        """The session begins again at the text so far.

        Args:
            cause: Why, as the end of a sentence.

        Raises:
            SessionFailed: It has too often, and the text has not grown.
        """
        self.resumes += 1
        self._fruitless += 1
        if self._fruitless > _MAX_FRUITLESS:
            raise SessionFailed(f"The session was resumed {_MAX_FRUITLESS} times without getting on: {cause}")
        self._waiting_since = self.clock()

    def quiet_s(self, *, opened: bool) -> float:
        """Return how long to wait for what arrives next, before anything needs to be done."""
        if not opened:
            return self.timeouts.retry_s
        return max(0.01, self.timeouts.verdict_s - (self.clock() - self._asked_at))

    def may_ask_again(self, *, opened: bool) -> bool:
        """Whether the answer is late enough for the question to be repeated."""
        return self.clock() - self._asked_at >= (self.timeouts.verdict_s if opened else self.timeouts.retry_s)

    def exhausted_s(self, *, opened: bool) -> float | None:
        """Return the time waited in vain once it is all that there is to wait; None before."""
        first = not opened and self.resumes == 0
        limit = self.timeouts.open_s if first else self.timeouts.resume_s
        return limit if self.clock() - self._waiting_since > limit else None

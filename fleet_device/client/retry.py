"""Timeouts and retry policy: how long a device waits for an edge, how often it asks again, and when it gives up.

Whatever an edge answers, a session asks a bounded number of times: each new beginning, and each question that an edge's
state prompts, is paid for by text that has come; all else waits for time to pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.errors import SessionFailed
from fleet_device.offline import INTERRUPTION_S

LEAST_WAIT_S: Final = 0.25
"""Least time between two questions that an edge has asked the device to wait with, whatever time it named."""

# An edge that keeps asking to begin again without a token between is one that will never get on.
_MAX_FRUITLESS: Final = 20

# New beginnings without a token between that are made at once; behind them each takes twice as long as the last.
_AT_ONCE: Final = 2
_FIRST_DELAY_S: Final = 0.1

# Questions without a token between that are asked because an edge is back, before their time.
_MAX_EARLY: Final = 5

# Returns of the broker or an edge, without a token between, that begin the wait again.
_MAX_RETURNS: Final = 5

# Opens without an answer, of any kind, that are sent before the next ones take twice as long.
_UNHURRIED: Final = 4
_SLOWEST: Final = 8

_MOMENT_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the agent waits.

    Attributes:
        open_s: For an edge to answer the first Open.
        resume_s: For an edge to take a session over again after a loss.
        verdict_s: For a verdict, before the draft is repeated.
        close_s: For the edge's last word.
        retry_s: Between two Opens while no edge answers; at first.
    """

    open_s: float = INTERRUPTION_S
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
        owed: Whether an answer is.
    """

    timeouts: Timeouts
    clock: Callable[[], float]
    resumes: int = 0
    _credit: int = _MAX_FRUITLESS  # new beginnings that are left; each committed token gives one back
    _in_vain: int = 0  # new beginnings since the last committed token
    _early: int = 0  # questions before their time since the last committed token
    _returns: int = 0  # of a broker or an edge that was away, since the last committed token
    _asks: int = 0  # questions since the last answer
    owed: bool = True
    _not_before: float = 0.0  # nothing is sent until then
    _held: bool = False  # and nothing was since
    _moves: int = 0  # new beginnings because an edge was silent, since the last committed token
    _waiting_since: float = field(init=False)  # the edge has owed an answer since, and given none that counts
    _silent_since: float = field(init=False)  # and none at all
    _asked_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._waiting_since = self._silent_since = self._asked_at = self.clock()

    def asked(self) -> None:
        """Something was sent that wants an answer."""
        self._asked_at = self.clock()
        if not self.owed:
            self.owed, self._waiting_since, self._silent_since = True, self._asked_at, self._asked_at
        self._held = False
        self._asks += 1

    def answered(self, *, tokens: int, more: bool = False) -> None:
        """An answer has come.

        Args:
            tokens: By how many the text has grown.
            more: Whether others are still owed.
        """
        self.owed = more
        self._waiting_since = self._silent_since = self.clock()
        self._asks = 0
        if tokens:
            self._credit = min(self._credit + tokens, _MAX_FRUITLESS)
            self._in_vain = self._early = self._returns = self._moves = 0

    def resumed(self, cause: str, *, silent: bool = False) -> None:
        """The session begins again at the text so far.

        Args:
            cause: Why, as the end of a sentence.
            silent: Whether because an edge was; the next is given twice the time.

        Raises:
            SessionFailed: It has too often, for what the text has grown.
        """
        if not self._credit:
            raise SessionFailed(f"The session was resumed {self.resumes} times and does not get on: {cause}")
        self.resumes += 1
        self._credit -= 1
        self._in_vain += 1
        self._moves += silent
        self._asks = 0
        self.owed = True
        self._waiting_since = self._silent_since = self.clock()
        if self._in_vain > _AT_ONCE:
            delay_s = _FIRST_DELAY_S * 2.0 ** (self._in_vain - _AT_ONCE - 1)
            self._hold_until(self.clock() + min(delay_s, self.timeouts.retry_s))

    def edge_is_back(self) -> None:
        """Count the time from now on: what was waited while no edge was there says nothing about one that is back.

        A few times between two tokens: an edge that comes and goes without end is not waited for without end.
        """
        if self._returns < _MAX_RETURNS:
            self._returns += 1
            self._waiting_since = self._silent_since = max(self.clock(), self._silent_since)

    def rest(self) -> None:
        """Nothing is asked for any more: the text goes on without an edge."""
        self.owed, self._asks = False, 0

    # Waiting

    @property
    def silent_s(self) -> float:
        """Seconds since an answer of any kind, as long as one is owed."""
        return self.clock() - self._silent_since

    @property
    def holding(self) -> bool:
        """Whether nothing may be sent now."""
        return self.clock() < self._not_before

    def hold(self, seconds: float) -> None:
        """Send nothing for a time; those that an edge asks for one after the other add up to `LEAST_WAIT_S` each."""
        now = self.clock()
        self._hold_until(max(now + seconds, max(now, self._not_before) + LEAST_WAIT_S))

    def is_silent(self, *, longer: float = 1.0) -> bool:
        """Whether an edge that has the session has said nothing for too long.

        Args:
            longer: How many times as long as usual it may take.
        """
        patience_s = self.timeouts.verdict_s * longer * 2.0**self._moves
        return self.owed and self.clock() - self._silent_since >= patience_s

    def fits(self, seconds: float, *, opened: bool) -> bool:
        """Whether the time that there is to wait for an answer is longer than that."""
        return self.clock() + seconds - self._waiting_since <= self._limit_s(opened=opened)

    def would_be_silent(self, seconds: float) -> bool:
        """Whether an edge that is waited for that much longer brings nothing for as long as a silent one may."""
        return self.clock() + seconds - self._waiting_since >= self.timeouts.verdict_s

    def quiet_s(self, *, opened: bool) -> float:
        """Return how long to wait for what arrives next, before anything needs to be done."""
        now = self.clock()
        left_s = self._limit_s(opened=opened) - (now - self._waiting_since)
        if self.holding:
            due_s = self._not_before - now
        elif opened:
            due_s = self.timeouts.verdict_s - (now - self._asked_at)
        else:
            due_s = self._retry_s
        return max(_MOMENT_S, min(due_s, left_s) if self.owed else due_s)

    def may_ask_again(self, *, opened: bool) -> bool:
        """Whether the answer is late enough for the question to be repeated."""
        if self.holding:
            return False
        late_s = self.timeouts.verdict_s if opened else self._retry_s
        return self._held or self.clock() - self._asked_at >= late_s

    def may_ask_early(self) -> bool:
        """Whether the question may be repeated before its time, because an edge is back; what may is counted."""
        if self.holding or self._early >= _MAX_EARLY:
            return False
        self._early += 1
        return True

    def exhausted_s(self, *, opened: bool) -> float | None:
        """Return the time waited in vain once it is all that there is to wait; None before."""
        limit_s = self._limit_s(opened=opened)
        return limit_s if self.owed and self.clock() - self._waiting_since > limit_s else None

    # Within

    @property
    def _retry_s(self) -> float:
        """Seconds between two Opens: an edge that does not listen finds few when it listens again."""
        return self.timeouts.retry_s * min(2.0 ** (max(0, self._asks - 1) // _UNHURRIED), _SLOWEST)

    def _limit_s(self, *, opened: bool) -> float:
        first = not opened and self.resumes == 0
        return self.timeouts.open_s if first else self.timeouts.resume_s

    def _hold_until(self, moment: float) -> None:
        self._not_before, self._held = max(self._not_before, moment), True
        self._silent_since = self._not_before  # an edge that asks to be waited for is not silent

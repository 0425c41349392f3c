"""Rejoining: when a text that goes on without an edge asks for one again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_EVERY_S: Final = 5.0

# So long an edge may take to answer; and no edge that says that it is there is asked sooner after the last one.
_WITHIN_S: Final = 1.0


@dataclass(slots=True)
class Rejoining:
    """The times of one text.

    Attributes:
        clock: Monotonic seconds.
        cause: Why the text goes on without an edge, or last did, in a sentence.
        asking: Whether an edge is asked. Until one has taken the text, it can go on without.
    """

    clock: Callable[[], float]
    cause: str = ""
    asking: bool = False
    _at: float = 0.0  # when an edge is asked for next; while one is, until when it may answer
    _soonest: float = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time to ask for an edge; or, where one is asked, whether it has not answered in time."""
        return self.clock() >= self._at

    @property
    def left_s(self) -> float:
        return max(0.0, self._at - self.clock())

    def alone(self, cause: str, *, pause_s: float = 0.0) -> None:
        """The text goes on without an edge.

        Args:
            cause: Why, in a sentence.
            pause_s: For how much longer than usual no edge wants to be asked.
        """
        now = self.clock()
        self.cause, self.asking = cause, False
        self._at, self._soonest = now + _EVERY_S + pause_s, now + _WITHIN_S

    def ask(self) -> None:
        self.asking, self._at = True, self.clock() + _WITHIN_S

    def put_off(self) -> None:
        """There is none that could be asked."""
        self._at = self.clock() + _EVERY_S

    def hasten(self) -> None:
        """An edge or a broker is back."""
        self._at = min(self._at, self._soonest)

    def taken(self) -> None:
        """An edge has taken the text."""
        self.asking = False

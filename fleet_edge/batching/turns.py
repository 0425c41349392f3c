"""Turns: which busy sessions keep their keys and values where there is not memory for those of all.

Whoever comes in has all of his text computed, and puts somebody out who will have his computed anew. Were that to
happen at every token, an edge would compute hardly anything else. So a session that came in stays until it has had as
many tokens verified as that took: however many are busy, about half of what is computed is not computed anew.
"""

from dataclasses import dataclass, field
from typing import Final

_ABSENT_S: Final = 2.0
"""After so long without a step nobody keeps his place: his device may draft slowly, or not at all."""


@dataclass(slots=True)
class Turns:
    """Whose turn it is. Times are monotonic seconds."""

    _owed: dict[int, int] = field(default_factory=dict)  # tokens computed to come in, less those verified since
    _used_at: dict[int, float] = field(default_factory=dict)

    def computed(self, handle: int, *, prefilled: int, verified: int, at: float) -> None:
        """A session was in a step.

        Args:
            handle: Whose.
            prefilled: Tokens that were computed for nothing but what comes behind them.
            verified: Other tokens.
            at: When.
        """
        self._owed[handle] = self._owed.get(handle, 0) + prefilled - verified
        self._used_at[handle] = at

    def lasts(self, handle: int, *, now: float) -> bool:
        """Whether a session keeps its place."""
        return self._owed.get(handle, 0) > 0 and now - self._used_at[handle] <= _ABSENT_S

    def balance(self, handle: int) -> int:
        """Return how many tokens a session is to have verified until its turn is over; less than 0 if it is over."""
        return self._owed.get(handle, 0)

    def end(self, handle: int) -> None:
        """A session has lost its keys and values, or ended."""
        self._owed.pop(handle, None)
        self._used_at.pop(handle, None)

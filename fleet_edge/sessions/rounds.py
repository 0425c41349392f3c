"""Round memory: a draft that comes again is counted once and answered alike."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

# A repeat comes within a few round trips; twice the window of unanswered drafts covers it.
_REMEMBERED_PER_WINDOW: Final = 2


@dataclass(slots=True)
class Rounds:
    """The memory of rounds, as long as repeats may come.

    Attributes:
        window: Most drafts under way at once.
    """

    window: int
    _last_answered: int = -1
    _verdicts: OrderedDict[int, bytes] = field(default_factory=OrderedDict)
    _counted: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def verdict(self, round_: int) -> bytes | None:
        """Return the bytes that a round was answered with, if they are remembered."""
        return self._verdicts.get(round_)

    def passed(self, round_: int) -> bool:
        """Whether a round had its answer, or one after it had."""
        return round_ <= self._last_answered

    def remember(self, round_: int, payload: bytes) -> None:
        """Keep a verdict's bytes for repeats."""
        self._verdicts[round_] = payload
        while len(self._verdicts) > self._most:
            self._verdicts.popitem(last=False)
        self.answered(round_)

    def answered(self, round_: int) -> None:
        """Note that a round had an answer."""
        self._last_answered = max(self._last_answered, round_)

    def first_seen(self, round_: int) -> bool:
        """Note that a round's draft has arrived; return whether it is the first time, in whatever order they arrive."""
        full = len(self._counted) >= self._most
        if round_ in self._counted or (full and round_ < next(iter(self._counted))):
            return False
        self._counted[round_] = None
        if full:
            self._counted.popitem(last=False)
        return True

    @property
    def _most(self) -> int:
        return _REMEMBERED_PER_WINDOW * self.window

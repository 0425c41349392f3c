"""Present texts: how many texts an edge has to write now, whether a step has them in it or their devices draft."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Final

_LATELY_S: Final = 1.0
"""A text that was in a step so shortly ago is being written: its device drafts, or its messages are under way."""

_STEPS: Final = 4.0
"""So many steps ago, where these are long."""


@dataclass(slots=True)
class PresentTexts:
    """Knows which texts were in a step lately. Times are monotonic seconds.

    Attributes:
        count: How many, since the latest step.
    """

    count: int = 0
    _seen: dict[Hashable, float] = field(default_factory=dict)

    def opened(self, text: Hashable) -> None:
        """A text is to be written; it will be in one of the next steps."""
        self._seen[text] = inf
        self.count = len(self._seen)

    def stepped(self, texts: Iterable[Hashable], *, step_s: float, at: float) -> None:
        """A step has ended that had these texts in it."""
        for text in texts:
            self._seen[text] = at
        for text, seen_at in self._seen.items():
            if seen_at == inf:
                self._seen[text] = at
        since = at - max(_LATELY_S, _STEPS * step_s)
        for text in [text for text, seen_at in self._seen.items() if seen_at < since]:
            del self._seen[text]
        self.count = len(self._seen)

    def forget(self, text: Hashable) -> None:
        """A text has come to its end."""
        if self._seen.pop(text, None) is not None:
            self.count = len(self._seen)

"""Recent acceptance of a session's drafts, to notice a text on which it collapses.

A text can be made so that the draft model is hardly ever right about it, by accident or on purpose (arXiv 2605.14005):
each round then costs the target model a whole draft, and brings one token.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["RecentAcceptance"]

_MEMORY: Final = 64.0
"""Tested tokens after which half of what was known is forgotten."""

_ENOUGH: Final = 32.0
"""Tested tokens before anything is said."""

_COLLAPSED: Final = 0.1


@dataclass(slots=True)
class RecentAcceptance:
    """Tested and accepted draft tokens, the older ones counting less."""

    _tested: float = 0.0
    _accepted: float = 0.0

    def count(self, *, tested: int, accepted: int) -> None:
        """Count what a verdict has tested, and accepted of it."""
        kept = 0.5 ** (tested / _MEMORY)
        self._tested = self._tested * kept + tested
        self._accepted = self._accepted * kept + accepted

    @property
    def share(self) -> float:
        """Accepted of tested; 1 of nothing."""
        return self._accepted / self._tested if self._tested else 1.0

    @property
    def collapsed(self) -> bool:
        """Whether hardly anything is accepted any more."""
        return self._tested >= _ENOUGH and self.share < _COLLAPSED

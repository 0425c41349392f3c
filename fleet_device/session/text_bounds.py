"""Bounds of a text: where it ends at the latest, and with which tokens, also while no edge has its session."""

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["TextBounds"]


@dataclass(frozen=True, slots=True)
class TextBounds:
    """Bounds of a text, as the edge that had it last has named them.

    Attributes:
        tokens: Most tokens of it.
        end_tokens: Ids that end it; None as long as nobody has named them.
    """

    tokens: int
    end_tokens: Collection[int] | None = None

    def without_edge(self, own: Collection[int]) -> "TextBounds":
        """Return the bounds of a text that goes on without an edge.

        Args:
            own: Ids after which the draft model's own text ends; they count if no edge has named any.
        """
        return self if self.end_tokens is not None else TextBounds(self.tokens, own)

    def ends_with(self, token: int) -> bool:
        """Whether the token ends the text."""
        return self.end_tokens is not None and token in self.end_tokens

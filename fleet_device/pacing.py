"""Pacing: how many tokens to draft before sending, and whether to go on before the verdict."""

from dataclasses import dataclass
from typing import Protocol

__all__ = ["FixedPacing", "Pacing"]


class Pacing(Protocol):
    """Decides from what has been measured, never from the tokens that it leaves out: that would bend the law."""

    def length(self) -> int:
        """Return how many tokens the next draft should have."""

    def ahead(self) -> bool:
        """Return whether to promise another draft before the verdict on this one."""


@dataclass(frozen=True, slots=True)
class FixedPacing:
    """Always the same.

    Attributes:
        tokens: Draft length.
        go_on: Whether to draft ahead of the verdict.
    """

    tokens: int = 5
    go_on: bool = False

    def length(self) -> int:
        """Return the draft length."""
        return self.tokens

    def ahead(self) -> bool:
        """Return whether to draft ahead."""
        return self.go_on

"""What a session needs of a draft model."""

from collections.abc import Sequence
from typing import Protocol

from dssd.distribution import Dist
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

__all__ = ["Drafter", "DrafterError"]


class DrafterError(Exception):
    """The draft model cannot be loaded or cannot go on. Its text is one sentence for the user."""


class Drafter(Protocol):
    """A draft model with one sequence.

    The sequence's tokens are prompt and text; `next` looks at all of them.
    """

    @property
    def name(self) -> str:
        """The model's name, for the log."""

    @property
    def quantization(self) -> str:
        """Of its weights, for the log."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Size and fingerprint, padding rows left out."""

    @property
    def context(self) -> int:
        """Most tokens in the sequence."""

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence; a prefix in common with the old one may be kept."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; they need not be computed before `next`."""

    def next(self, policy: SamplingPolicy) -> Dist:
        """Return the shaped distribution of the token after the sequence.

        Raises:
            DrafterError: The context is full, or the model failed.
        """

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""

    def close(self) -> None:
        """Free the model."""

"""What a session needs of a draft model."""

from collections.abc import Sequence
from typing import Protocol

from dssd.distribution import Dist
from fleet_device.text import TextCodec
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

__all__ = ["Drafter", "DrafterError", "ModelNotFound"]


class DrafterError(Exception):
    """The draft model cannot be loaded or cannot go on. Its text is one sentence for the user."""


class ModelNotFound(DrafterError):  # noqa: N818 - reads as what it says
    """The configuration names a model that is not there. Its text says what to do."""


class Drafter(Protocol):
    """A draft model with one sequence.

    The sequence's tokens are prompt and text; `next` looks at all of them, and at nothing else: however the
    sequence came about, the same tokens MUST give the same distribution, up to the rounding of the model's
    arithmetic. (Exactness needs no more: what is reported is the distribution that was really drawn from.)
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

    @property
    def codec(self) -> TextCodec:
        """Between text and the vocabulary's token ids."""

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence; a prefix in common with the old one may be kept.

        Raises:
            DrafterError: A token is outside the vocabulary; the sequence is as before.
        """

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; they need not be computed before `next`.

        Raises:
            DrafterError: A token is outside the vocabulary; the sequence is as before.
        """

    def next(self, policy: SamplingPolicy) -> Dist | None:
        """Return the shaped distribution of the token after the sequence.

        Returns:
            None for "no idea": the draft ends here. This is allowed because it is decided before a token is
            drawn. A draft that ended because of the token drawn at its end would no longer follow the law.

        Raises:
            DrafterError: The sequence is empty, the context is full, or the model failed.
        """

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on; a sequence that is shorter stays as it is."""

    def close(self) -> None:
        """Free the model. May be called again."""

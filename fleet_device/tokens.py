"""Small questions about token sequences, asked by every drafter."""

from collections.abc import Sequence

from fleet_device.drafter import DrafterError
from schemas.vocabulary import Vocabulary

__all__ = ["common_prefix", "require_tokens"]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def require_tokens(tokens: Sequence[int], vocabulary: Vocabulary) -> None:
    """Check that all ids are in the vocabulary.

    Raises:
        DrafterError: One is not.
    """
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary.size):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary.size)
        raise DrafterError(f"Token {wrong} is outside the draft model's vocabulary of {vocabulary.size} tokens.")

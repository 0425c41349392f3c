"""Kinds of tokens: how each token of a text came into it; and how much of a text an edge stores."""

from enum import StrEnum


class TokenKind(StrEnum):
    """How a token came into its text. One character each, so that a text's kinds are as many characters.

    Attributes:
        DRAFTED: Drafted by the device, and accepted.
        CORRECTED: Drawn in place of a draft token that was rejected, by the device or in coupled mode by the edge.
        BONUS: Drawn by the edge behind a draft that was accepted as a whole.
        FORCED: The text's grammar left no choice.
        STREAMED: Written by the edge itself, because the device has asked it to.
        UNVERIFIED: Written by the device without an edge, which therefore does not have it.
        UNKNOWN: Taken over from an edge that has not stored it.
    """

    DRAFTED = "d"
    CORRECTED = "c"
    BONUS = "b"
    FORCED = "f"
    STREAMED = "s"
    UNVERIFIED = "u"
    UNKNOWN = "?"


class StoreText(StrEnum):
    """How much of the texts an edge stores in the session log. Prompts are never stored."""

    NONE = "none"
    HASH = "hash"  # each token's kind, and a hash by which who has a text can find out whether it is this one
    FULL = "full"  # each token's kind, its id, and what it reads

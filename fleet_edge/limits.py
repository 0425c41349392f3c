"""What an edge grants a session."""

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the edge grants a session.

    Attributes:
        max_new_tokens: Most tokens of text.
        max_draft: Most tokens in one draft.
        window: Most drafts under way.
        vocabulary: Token ids are below this.
        end_tokens: Ids that end the text.
    """

    max_new_tokens: int
    max_draft: int
    window: int
    vocabulary: int
    end_tokens: frozenset[int]

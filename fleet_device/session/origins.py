"""Origins of tokens: which of the ways in which a token comes into a text has brought this one."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import overload

from schemas.logprobs import TokenLogprobs

__all__ = ["CommittedTokens", "TokenOrigin"]


class TokenOrigin(StrEnum):
    """How a token came into the text. All but `UNVERIFIED` follow the large model's distribution.

    Attributes:
        DRAFTED: The draft model proposed it, and the edge accepted it.
        CORRECTED: It took the place of a draft token that the edge rejected.
        BONUS: The edge drew it behind a draft that it accepted whole.
        STREAMED: The edge wrote it by itself.
        FORCED: A grammar allowed no other.
        UNVERIFIED: The draft model wrote it alone, no edge being there; or it stands behind such a token.
    """

    DRAFTED = "drafted"
    CORRECTED = "corrected"
    BONUS = "bonus"
    STREAMED = "streamed"
    FORCED = "forced"
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True)
class CommittedTokens(Sequence[int]):
    """Token ids that have become part of a text, in order; a sequence of them.

    Attributes:
        ids: The token ids.
        origins: Of each of them.
        logprobs: Of each of them, where they were asked for.
    """

    ids: tuple[int, ...]
    origins: tuple[TokenOrigin, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()

    def __post_init__(self) -> None:
        """Hold the two against each other."""
        if len(self.ids) != len(self.origins):
            raise ValueError(f"{len(self.ids)} tokens have {len(self.origins)} origins")

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[int, ...]: ...

    def __getitem__(self, place: int | slice) -> int | tuple[int, ...]:
        return self.ids[place]

    def __len__(self) -> int:
        return len(self.ids)

"""Streaming: what the device has asked its edge to write by itself, and the text that comes of it, piece by piece.

Each piece says where it stands in the text, so that none is taken twice, and none behind a gap.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from fleet_device.errors import ProtocolViolation
from schemas.messages import Draft, Verdict

__all__ = ["Streaming"]

_MOST_EARLY: Final = 64
"""Pieces that are kept until what is missing before them has come; each brings one token at least."""


@dataclass(slots=True)
class Streaming:
    """The latest request to write.

    Attributes:
        request: As sent.
        first_round: Of the first of the requests in a row: what answers any of them is part of the same text.
        until: Position up to which the edge was asked to write.
        first: Whether nothing has come since the session was opened, so that the edge has the prompt to compute.
        early: Pieces before which another is missing.
        missed_at: Where the text ended when it was last asked for again, because a piece was missing.
    """

    request: Draft
    first_round: int
    until: int
    first: bool = False
    early: list[Verdict] = field(default_factory=list)
    missed_at: int | None = None

    @property
    def stops(self) -> bool:
        """Whether the request was to write no more."""
        return self.request.write == 0

    def concerns(self, verdict: Verdict) -> bool:
        """Whether a verdict answers one of the requests."""
        return self.first_round <= verdict.round <= self.request.round

    def keep(self, verdict: Verdict) -> None:
        """Keep a piece before which another is missing."""
        if len(self.early) < _MOST_EARLY:
            self.early.append(verdict)

    def take_early(self, length: int) -> Verdict | None:
        """Return a piece that was kept, if a text of this length leads up to it."""
        found = next((each for each in self.early if each.base is not None and each.base <= length), None)
        if found is not None:
            self.early.remove(found)
        return found

    def news(self, verdict: Verdict, *, text: Sequence[int], end_tokens: Collection[int]) -> tuple[int, ...]:
        """Return what a piece adds to the text.

        Args:
            verdict: The piece; it begins within the text or right behind it.
            text: All that is committed.
            end_tokens: Ids that end it.

        Raises:
            ProtocolViolation: It is no continuation of the text.
        """
        base, written = verdict.base, verdict.written
        assert base is not None
        assert written is not None
        known = len(text) - base
        if list(written[:known]) != list(text[base : base + len(written)]):
            raise ProtocolViolation("The edge has sent another text than before at the same place.")
        new = written[known:]
        if any(token in end_tokens for token in new[:-1]):
            raise ProtocolViolation("The edge has written on behind an end token.")
        return new

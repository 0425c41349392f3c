"""Text of a session: what is committed, how far it is verified, and where it ends at the latest."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fleet_device.errors import ProtocolViolation
from schemas.digest import EMPTY, extend_digest
from schemas.reasons import EndReason, Finish

__all__ = ["Text", "TextBounds"]


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


@dataclass(slots=True)
class Text:
    """The committed text; the drafts behind it are the session's.

    Attributes:
        vocabulary: Number of tokens that there are.
        bounds: Where it ends, as far as anybody has named that.
        tokens: All that is committed.
        digest: Of `tokens`.
        verified: Tokens that follow the target's law, if the draft model has written on alone: what stands behind them
            does not, even where an edge has verified it since. None while all of the text does.
    """

    vocabulary: int
    bounds: TextBounds
    tokens: list[int] = field(default_factory=list)
    digest: int = EMPTY
    verified: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def unverified(self) -> int:
        """Tokens at the end of the text that do not follow the target's law."""
        return 0 if self.verified is None else len(self.tokens) - self.verified

    def commit(self, tokens: Sequence[int]) -> None:
        """Add what an edge has verified or written.

        Raises:
            ProtocolViolation: No edge may have sent that; the text is as it was.
        """
        if any(token >= self.vocabulary for token in tokens):
            raise ProtocolViolation("The edge sent a token outside the vocabulary.")
        most = self.bounds.tokens
        if len(self.tokens) + len(tokens) > most:
            raise ProtocolViolation(f"The edge goes on behind the {most} tokens that it has granted.")
        self.tokens.extend(tokens)
        self.digest = extend_digest(self.digest, tokens)

    def commit_unverified(self, token: int) -> None:
        """Add what the draft model has written alone."""
        if self.verified is None:
            self.verified = len(self.tokens)
        self.commit((token,))

    def revise(self, position: int) -> None:
        """Void what no edge has verified: an edge goes on from `position`."""
        del self.tokens[position:]
        self.digest = extend_digest(EMPTY, self.tokens)
        self.verified = None

    def digest_with(self, tokens: Sequence[int]) -> int:
        """Return the digest of the text with some tokens behind it."""
        return extend_digest(self.digest, tokens)

    def go_on_alone(self, end_tokens: Collection[int]) -> None:
        """Take the draft model's own end tokens, if no edge has named any."""
        self.bounds = self.bounds.without_edge(end_tokens)

    def end(self, finish: Finish) -> EndReason | None:
        """Return how the text has ended: as the edge says, or as its own last token or its length does; else None."""
        if finish is Finish.STOP or (self.tokens and self.bounds.ends_with(self.tokens[-1])):
            return EndReason.STOP
        return EndReason.LENGTH if finish is Finish.LENGTH or len(self.tokens) >= self.bounds.tokens else None

"""Piece: more of a text that is being written, and of each token behind it what it says and where it comes from."""

from dataclasses import dataclass, field

from fleet_device.session.origins import TokenOrigin
from schemas.logprobs import TokenLogprobs

__all__ = ["Piece", "TokenText"]


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of a text.

    Attributes:
        token: Its id.
        origin: Where it comes from.
        text: What it adds to the text. Empty if it ends inside a character, or in what may become a stop string: the
            token that decides on that adds the rest.
        logprobs: The large model's log-probabilities at its place, if they were asked for.
    """

    token: int
    origin: TokenOrigin
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """More text.

    Attributes:
        text: Empty if the tokens complete no text that can be given out yet.
        tokens: How many are behind it.
        parts: These tokens. None where what was held back is given out at the end of a text.
        verified: Whether all of it follows the large model's law.
    """

    text: str
    tokens: int
    parts: tuple[TokenText, ...] = field(default=(), compare=False)
    verified: bool = True

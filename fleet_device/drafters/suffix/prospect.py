"""Prospect: what drafting from earlier text promises at a place, before anything is drawn."""

from dataclasses import dataclass

__all__ = ["Prospect"]


@dataclass(frozen=True, slots=True)
class Prospect:
    """What the next tokens of a draft from earlier text are worth, were each the likeliest one.

    Attributes:
        stands: Of each, the chance that it is accepted with all before it; falling.
        token_s: Time to find one (seconds).
        catch_up_s: Time that the draft model takes later to read a token that it has not drafted (seconds).
        alone: Whether there is no draft model that could draft in its place.
    """

    stands: tuple[float, ...]
    token_s: float
    catch_up_s: float
    alone: bool = False

    def acceptance(self, tokens: int) -> float:
        """Return the chance of each of the first tokens to be accepted after those before it, on geometric average."""
        return float(self.stands[tokens - 1] ** (1.0 / tokens))

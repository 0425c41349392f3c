"""Step cost: what a step takes, what one more token in it costs, and so how many guesses of a stream's tokens pay.

A step takes some time however little it computes, and more for each token. How much more is measured: least squares
over the latest steps, with forgetting. A guess that is right brings one token; right or not it makes the step longer,
for all that are in it. So it pays if the tokens that it brings on average are more than those that would come in the
time that it takes.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["StepCost"]

_KEPT: Final = 1.0 - 1.0 / 64
"""Of what is known, with each step."""

_STIFFNESS: Final = 0.5
"""Spread of step sizes (tokens²) at which half of a slope is believed: with less, noise would look like one."""

_UNKNOWN: Final = 0.4
"""What a guess must be worth while it is not known what it costs: where one is likely right, that is soon known."""

_LEAST_RATE: Final = 0.1
"""A guess that is right less often than that is never worth it: its logits must be made and looked at."""


@dataclass(slots=True)
class StepCost:
    """What steps take.

    Attributes:
        least: Tokens of a session that a step with texts that are to repeat costs at least: fewer cost as much.
        max_guess: Most tokens that are guessed behind a stream's text in one step; of 1 only such as cost nothing.
    """

    least: int = 1
    max_guess: int = 1
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_tokens: float = 0.0
    _tokens_seconds: float = 0.0
    _committed: float = 0.0

    def stepped(self, seconds: float, *, tokens: int, committed: int) -> None:
        """A step took so long that computed nothing but what verifies and is written.

        Args:
            seconds: It took.
            tokens: Computed, those counted in that come at no cost.
            committed: By which texts have grown.
        """
        self._weight = _KEPT * self._weight + 1.0
        self._tokens = _KEPT * self._tokens + tokens
        self._seconds = _KEPT * self._seconds + seconds
        self._tokens_tokens = _KEPT * self._tokens_tokens + tokens * tokens
        self._tokens_seconds = _KEPT * self._tokens_seconds + tokens * seconds
        self._committed = _KEPT * self._committed + committed

    @property
    def token_s(self) -> float | None:
        """Seconds by which one more token makes a step longer; None while steps do not differ enough to tell."""
        if self._weight <= 0.0:
            return None
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        spread = self._tokens_tokens / self._weight - mean_tokens**2
        if spread < 1.0 / 16 or mean_tokens <= 0.0:
            return None
        together = self._tokens_seconds / self._weight - mean_tokens * mean_s
        # A step without tokens takes time as well: the line must not cross zero before.
        return min(max(0.0, together / (spread + _STIFFNESS)), mean_s / mean_tokens)

    @property
    def price(self) -> float | None:
        """What one more token costs, in tokens that would come in that time; None while that is not known."""
        token_s = self.token_s
        if token_s is None or self._seconds <= 0.0:
            return None
        return token_s * self._committed / self._seconds

    def price_to_others(self, sessions: int) -> float:
        """Return what one more token of one session costs the others of a step; 0 while that is not known.

        Args:
            sessions: Of the step, that one counted in.
        """
        return (self.price or 0.0) * (1.0 - 1.0 / max(1, sessions))

    @property
    def growing_s(self) -> float | None:
        """Of a mean step, the seconds that are due to its tokens; None while that is not known."""
        token_s = self.token_s
        return None if token_s is None else token_s * self._tokens / self._weight

    def guesses(self, rate: float, *, stable: bool = True) -> int:
        """Return how many tokens it pays to guess behind a text.

        Args:
            rate: How likely a guess is right, those before it taken as right.
            stable: Whether the text is to repeat.
        """
        if rate < _LEAST_RATE:
            return 0
        known = self.price
        price = _UNKNOWN if known is None else known
        count, right = 0, rate
        least = self.least if stable else 1
        while count < self.max_guess and (count + 1 < least or (self.max_guess > 1 and right > price)):
            count += 1
            right *= rate
        return count

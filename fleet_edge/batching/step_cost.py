"""Step cost: what a step takes, what one more token in it costs, and so how many guesses of a stream's tokens pay.

A step takes some time however little it computes, more for each text in it, and more for each further token of a text:
a draft's, or a guess. The last two differ, since the keys and values of a text are read once for all of its tokens
(llama.cpp on two cores: 4 ms a text, 1.3 ms a further token). Both are measured: least squares over the latest steps,
with forgetting.

A guess that is right brings one token; right or not it makes the step longer, for all that are in it. So it pays if the
tokens that it brings on average are more than those that would come in the time that it takes.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["StepCost"]

_KEPT: Final = 1.0 - 1.0 / 64
"""Of how quickly texts grow, with each step."""

_KEPT_COST: Final = 1.0 - 1.0 / 1024
"""Of what steps take: a machine stays as quick as it is; loads must differ for texts and tokens to be told apart."""

_STIFFNESS: Final = 32.0
"""Spread (squared) of texts, and of further tokens, summed over steps, at which half of a slope is believed: with less,
noise would look like one."""

_LEAST_SPREAD: Final = 1.0 / 16
"""At which anything is believed."""

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
    _texts: float = 0.0
    _further: float = 0.0
    _seconds: float = 0.0
    _texts_texts: float = 0.0
    _texts_further: float = 0.0
    _texts_seconds: float = 0.0
    _further_further: float = 0.0
    _further_seconds: float = 0.0
    _committed: float = 0.0
    _lately: float = 0.0  # seconds in which that was committed

    def stepped(self, seconds: float, *, texts: int, further: int, committed: int) -> None:
        """A step took so long that computed nothing but what verifies and is written.

        Args:
            seconds: It took.
            texts: That had tokens in it.
            further: Tokens computed beyond those that each text costs at least.
            committed: By which texts have grown.
        """
        self._weight = _KEPT_COST * self._weight + 1.0
        self._texts = _KEPT_COST * self._texts + texts
        self._further = _KEPT_COST * self._further + further
        self._seconds = _KEPT_COST * self._seconds + seconds
        self._texts_texts = _KEPT_COST * self._texts_texts + texts * texts
        self._texts_further = _KEPT_COST * self._texts_further + texts * further
        self._texts_seconds = _KEPT_COST * self._texts_seconds + texts * seconds
        self._further_further = _KEPT_COST * self._further_further + further * further
        self._further_seconds = _KEPT_COST * self._further_seconds + further * seconds
        self._committed = _KEPT * self._committed + committed
        self._lately = _KEPT * self._lately + seconds

    @property
    def token_s(self) -> float | None:
        """Seconds by which one more token of a text makes a step longer; None while steps do not differ enough."""
        return self._slopes()[1]

    @property
    def price(self) -> float | None:
        """What one more token costs, in tokens that would come in that time; None while that is not known."""
        token_s = self.token_s
        if token_s is None or self._lately <= 0.0:
            return None
        return token_s * self._committed / self._lately

    def price_to_others(self, sessions: int) -> float:
        """Return what one more token of one text costs the others of a step; 0 while that is not known.

        Args:
            sessions: Of the step, that one counted in.
        """
        return (self.price or 0.0) * (1.0 - 1.0 / max(1, sessions))

    @property
    def growing_s(self) -> float | None:
        """Of a mean step, the seconds that are due to its texts and tokens; None while that is not known."""
        text_s, token_s = self._slopes()
        if text_s is None and token_s is None:
            return None
        return ((text_s or 0.0) * self._texts + (token_s or 0.0) * self._further) / self._weight

    def _slopes(self) -> tuple[float | None, float | None]:
        """Return the seconds of one more text, and of one more token of a text; None of what does not differ enough."""
        if self._weight <= 0.0 or self._texts <= 0.0:
            return None, None
        texts, further, seconds = (each / self._weight for each in (self._texts, self._further, self._seconds))
        texts_texts = self._texts_texts / self._weight - texts * texts
        texts_further = self._texts_further / self._weight - texts * further
        further_further = self._further_further / self._weight - further * further
        texts_known, further_known = texts_texts >= _LEAST_SPREAD, further_further >= _LEAST_SPREAD
        stiffness = _STIFFNESS / self._weight
        texts_texts, further_further = texts_texts + stiffness, further_further + stiffness
        texts_seconds = self._texts_seconds / self._weight - texts * seconds
        further_seconds = self._further_seconds / self._weight - further * seconds
        determinant = texts_texts * further_further - texts_further * texts_further
        text_s = (further_further * texts_seconds - texts_further * further_seconds) / determinant
        token_s = (texts_texts * further_seconds - texts_further * texts_seconds) / determinant
        # A step of nothing takes time as well: the plane must not cross zero before.
        most = seconds / (texts + further)
        return (
            min(max(0.0, text_s), most) if texts_known else None,
            min(max(0.0, token_s), most) if further_known else None,
        )

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

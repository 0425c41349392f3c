"""Step cost: what a step takes, what one more token in it costs, and so how many guesses of a stream's tokens pay.

A step takes some time however little it computes, more for each text in it, and more for each further token of a text:
a draft's, or a guess. The last two differ, since the keys and values of a text are read once for all of its tokens
(llama.cpp on two cores: 4 ms a text, 1.3 ms a further token). Both are measured: least squares over the latest steps,
with forgetting; and at the present load by itself, since on a processor the more rows a step has the less one more
takes (7 ms with one text, 1 to 4 with sixteen).

A guess that is right brings one token; right or not it makes the step longer, for all that are in it. So it pays if the
tokens that it brings on average are more than those that would come in the time that it takes.
"""

from dataclasses import dataclass, field, replace
from typing import Final

_KEPT: Final = 1.0 - 1.0 / 64
"""Of how quickly texts grow, with each step."""

_KEPT_COST: Final = 1.0 - 1.0 / 1024
"""Of what steps take: a machine stays as quick as it is; loads must differ for texts and tokens to be told apart."""

_STIFFNESS: Final = 32.0
"""Spread (squared) of texts, and of further tokens, summed over steps, at which half of a slope is believed: with less,
noise would look like one."""

_LEAST_SPREAD: Final = 1.0 / 16
"""At which anything is believed."""

_SMOOTHING: Final = 0.3
"""Weight of the latest step in the time of a prompt's token."""

_FIRST_PROMPT: Final = 16
"""Tokens of prompts in a step while it is not known how long they take."""

_LEAST_TOKEN_S: Final = 1e-9

_UNKNOWN: Final = 0.4
"""What a guess must be worth while it is not known what it costs: where one is likely right, that is soon known."""

_LEAST_RATE: Final = 0.1
"""A guess that is right less often than that is never worth it: its logits must be made and looked at."""


@dataclass(frozen=True, slots=True)
class StepParts:
    """What makes a step long (seconds); None of what steps do not differ enough in to tell.

    Attributes:
        writing_s: Time for a token of each text, if the edge writes all of them by itself.
        step_s: If it verifies drafts, however little is in it.
        text_s: Each text in it.
        token_s: Each further token of a text.
    """

    writing_s: float | None = None
    step_s: float | None = None
    text_s: float | None = None
    token_s: float | None = None


@dataclass(slots=True)
class _Steps:
    """Sums over steps, the latest of which count most."""

    weight: float = 0.0
    texts: float = 0.0
    further: float = 0.0
    seconds: float = 0.0
    texts_texts: float = 0.0
    texts_further: float = 0.0
    texts_seconds: float = 0.0
    further_further: float = 0.0
    further_seconds: float = 0.0

    def add(self, seconds: float, *, texts: int, further: int) -> None:
        self.weight = _KEPT_COST * self.weight + 1.0
        self.texts = _KEPT_COST * self.texts + texts
        self.further = _KEPT_COST * self.further + further
        self.seconds = _KEPT_COST * self.seconds + seconds
        self.texts_texts = _KEPT_COST * self.texts_texts + texts * texts
        self.texts_further = _KEPT_COST * self.texts_further + texts * further
        self.texts_seconds = _KEPT_COST * self.texts_seconds + texts * seconds
        self.further_further = _KEPT_COST * self.further_further + further * further
        self.further_seconds = _KEPT_COST * self.further_seconds + further * seconds

    def slopes(self, expected: StepParts = StepParts()) -> StepParts:
        """Return what one more text takes, and one more token of a text.

        Args:
            expected: What is believed as far as these steps do not tell.
        """
        if self.weight <= 0.0 or self.texts <= 0.0:
            return expected
        texts, further, seconds = (each / self.weight for each in (self.texts, self.further, self.seconds))
        texts_texts = self.texts_texts / self.weight - texts * texts
        texts_further = self.texts_further / self.weight - texts * further
        further_further = self.further_further / self.weight - further * further
        texts_known = texts_texts >= _LEAST_SPREAD or expected.text_s is not None
        further_known = further_further >= _LEAST_SPREAD or expected.token_s is not None
        stiffness = _STIFFNESS / self.weight
        texts_texts, further_further = texts_texts + stiffness, further_further + stiffness
        texts_seconds = self.texts_seconds / self.weight - texts * seconds + stiffness * (expected.text_s or 0.0)
        further_seconds = self.further_seconds / self.weight - further * seconds + stiffness * (expected.token_s or 0.0)
        determinant = texts_texts * further_further - texts_further * texts_further
        text_s = (further_further * texts_seconds - texts_further * further_seconds) / determinant
        token_s = (texts_texts * further_seconds - texts_further * texts_seconds) / determinant
        # A step of nothing takes time as well: the plane must not cross zero before.
        most = seconds / (texts + further)
        text_s, token_s = (min(max(0.0, each), most) for each in (text_s, token_s))
        known = texts_known and further_known
        return StepParts(
            None,
            max(0.0, seconds - text_s * texts - token_s * further) if known else None,
            text_s if texts_known else None,
            token_s if further_known else None,
        )


@dataclass(slots=True)
class StepCost:
    """What steps take.

    Attributes:
        least: Tokens of a session that a step with texts that are to repeat costs at least: fewer cost as much.
        max_guess: Most tokens that are guessed behind a stream's text in one step; of 1 only such as cost nothing.
    """

    least: int = 1
    max_guess: int = 1
    _all: _Steps = field(default_factory=_Steps)
    _writing: _Steps = field(default_factory=_Steps)  # that have verified no draft
    _written: float = 0.0  # tokens that these brought, one for each text at least: what a device gave up counts as well
    _expected: int = 0  # of that, what is counted for the latest step beyond what it is known to have brought
    _wrote: bool = False  # whether the latest step verified no draft
    _verifying: _Steps = field(default_factory=_Steps)
    _alike: dict[int, _Steps] = field(default_factory=dict)  # by the load, doubled from one to the next
    _load: int = 0  # of the latest step
    _committed: float = 0.0
    _lately: float = 0.0  # seconds in which that was committed
    _prompt_token_s: float | None = None

    def stepped(self, seconds: float, *, texts: int, further: int, verifies: bool = True) -> None:
        """A step took so long that computed nothing but what verifies and is written; `committed` says what it brought.

        Args:
            seconds: It took.
            texts: That had tokens in it.
            further: Tokens computed beyond those that each text costs at least.
            verifies: Whether it verified any draft.
        """
        self._wrote = not verifies
        if not verifies:
            self._writing.add(seconds, texts=texts, further=0)
            self._written = _KEPT_COST * self._written + texts
            self._expected = texts
        self._load = texts.bit_length()
        alike = self._alike.setdefault(self._load, _Steps())
        for steps in (self._all, alike, self._verifying) if verifies else (self._all, alike):
            steps.add(seconds, texts=texts, further=further)
        self._committed *= _KEPT
        self._lately = _KEPT * self._lately + seconds

    def prefilled(self, seconds: float, *, tokens: int) -> None:
        """Note a step with tokens of prompts in it.

        Args:
            seconds: It took.
            tokens: Computed in it, of prompts and others.
        """
        token_s = seconds / tokens
        before = token_s if self._prompt_token_s is None else self._prompt_token_s
        self._prompt_token_s = before + _SMOOTHING * (token_s - before)

    def prompt_tokens(self, seconds: float, most: int) -> int:
        """Return how many tokens of prompts a step may have, at most `most`, to take about so long."""
        if self._prompt_token_s is None:
            return min(most, _FIRST_PROMPT)
        return int(min(most, seconds / max(self._prompt_token_s, _LEAST_TOKEN_S)))

    @property
    def mean_s(self) -> float:
        """Seconds that a step without prompts takes; 0 before there was one."""
        return self._all.seconds / self._all.weight if self._all.weight else 0.0

    def committed(self, tokens: int) -> None:
        """A text has grown by so many tokens in the latest step."""
        self._committed += tokens
        if self._wrote:
            self._expected -= tokens
            self._written += max(0, -self._expected)
            self._expected = max(0, self._expected)

    def parts(self, texts: int) -> StepParts:
        """Return what is known of steps while so many texts are written: of one by itself, or of several."""
        if texts <= 1:
            return self._alike[1].slopes(self._all.slopes()) if 1 in self._alike else self._all.slopes()
        parts = self._verifying.slopes(self._all.slopes())
        writing_s = self._writing_s(texts)
        if writing_s is None and parts.step_s is not None and parts.text_s is not None:
            writing_s = parts.step_s + texts * parts.text_s
        return replace(parts, writing_s=writing_s)

    def _writing_s(self, texts: int) -> float | None:
        """Return the time for a token of each text where the edge writes so many; None before it ever has."""
        steps = self._writing
        if steps.weight <= 0.0:
            return None
        text_s = steps.slopes().text_s or 0.0
        step_s = (steps.seconds + text_s * (texts * steps.weight - steps.texts)) / steps.weight
        return step_s * steps.texts / self._written  # less than a step where guesses are right

    @property
    def token_s(self) -> float | None:
        """Seconds by which one more token of a text makes a step longer now; None while steps do not differ enough."""
        expected = self._all.slopes()
        return (self._alike[self._load].slopes(expected) if self._load in self._alike else expected).token_s

    @property
    def price(self) -> float | None:
        """What one more token costs, in tokens that would come in that time; None while that is not known."""
        token_s = self.token_s
        if token_s is None or self._lately <= 0.0:
            return None
        return token_s * self._committed / self._lately

    @property
    def growing_s(self) -> float | None:
        """Of a mean step, the seconds that are due to its texts and tokens; None while that is not known."""
        mean = self._all.slopes()
        if mean.text_s is None and mean.token_s is None:
            return None
        grown_s = (mean.text_s or 0.0) * self._all.texts + (mean.token_s or 0.0) * self._all.further
        return grown_s / self._all.weight

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

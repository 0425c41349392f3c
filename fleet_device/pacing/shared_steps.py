"""Steps that several texts share: how long they are if all of these texts are written in the same way.

They are as long as all devices together make them. What one device would gain if it alone changed its plan is then no
guide: with sixteen texts on two cores each could gain by drafts that make all sixteen slower, and four could gain much
if all drafted ahead, while the first to do so loses. So a plan promises what it would bring if all texts were written
by it, which is the same for all devices that are alike: they come to one plan, the best for all of them, without a word
among them.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Final

__all__ = ["SharedSteps"]

_TRUST_LOST: Final = 0.02
"""With each further text."""

_LEAST_TRUST: Final = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSteps:
    """What the steps of an edge take that several texts share.

    Attributes:
        texts: How many; at least 2.
        writing_s: A step if the edge wrote all of them by itself.
        step_s: One that verifies drafts, however little is in it.
        text_s: Each text in it, with its first token.
        token_s: Each further token.
        free: Further tokens of a text that cost nothing.
    """

    texts: int
    writing_s: float
    step_s: float
    text_s: float
    token_s: float
    free: int = 0

    @property
    def trust(self) -> float:
        """What a rate of drafting ahead counts for: it brings less than is reckoned, the less the more texts there are.

        Drafts that are sent one by one are not all in the next step, and texts with unequal numbers of tokens take
        passes of their own. By simulation with the step times of two cores 0.92 with 4 texts, 0.86 with 8, and between
        0.6 and 1 with 16.
        """
        return max(_LEAST_TRUST, 1.0 - _TRUST_LOST * (self.texts - 1))

    def waiting_s(self, tokens: int, *, outside_s: float, last_s: float = 0.0) -> tuple[float, float]:
        """Return what a step takes, and how long a draft waits for it, if all devices wait for each verdict.

        Either all texts are in each step, which waits for the last draft. Or of S texts those are in a step that are
        not outside meanwhile: S·x / (o + 1.5·x) for a step of x, since a draft comes in the middle of one on average
        and has to wait for the next. That is quicker, but drafts that come during one step are answered together ever
        after: it lasts only where a step is short beside the time outside, and so counts for the less the longer it is.

        Args:
            tokens: Of a draft.
            outside_s: From the end of a step to the arrival of the next draft.
            last_s: How much later the last draft comes.
        """
        each_s = self._text_s(tokens)
        together_s = self.step_s + self.texts * each_s
        linear = outside_s - 1.5 * self.step_s - self.texts * each_s
        root_s = (sqrt(linear * linear + 6.0 * self.step_s * outside_s) - linear) / 3.0
        some_s = max(root_s, self.step_s + each_s)
        wait_s = some_s / 2 * min(1.0, self.texts * some_s / (outside_s + 1.5 * some_s))
        apart = max(0.0, 1.0 - together_s / outside_s) if some_s + wait_s < together_s + last_s else 0.0
        return together_s + apart * (some_s - together_s), last_s + apart * (wait_s - last_s)

    def ahead_s(self, tokens: int, *, token_s: float, window: int, present: float) -> float:
        """Return what a step takes if all texts are drafted ahead: all that came meanwhile is in it.

        Args:
            tokens: Of a draft.
            token_s: Time to draft a token.
            window: Most drafts under way.
            present: Share of the texts that are in a step.
        """
        drafting_s = tokens * token_s
        each_s = self._text_s(tokens)
        # A step shorter than it takes to draft has only some texts in it, as many the longer it is.
        some = present * self.texts * each_s / drafting_s if drafting_s else 1.0
        step_s = max(self.step_s + each_s, self.step_s / (1.0 - some) if some < 1.0 else float("inf"))
        if step_s <= drafting_s:
            return step_s
        texts = max(1.0, present * self.texts)
        least_s = self.step_s + texts * (self.text_s - self.free * self.token_s)
        of_each = texts * self.token_s
        drafted = max(0.0, least_s) / (token_s - of_each) if token_s > of_each else float("inf")
        return self.step_s + texts * self._text_s(min(window * tokens, max(tokens, drafted)))

    def _text_s(self, tokens: float) -> float:
        """Return by how much a text makes a step longer with so many tokens of a draft."""
        return self.text_s + max(0.0, tokens - self.free) * self.token_s

"""Throughput: committed tokens a second that a plan promises, from acceptance and times.

Each draft token stands with probability a, so of n drafted in a row (1 - a^(n+1)) / (1 - a) are committed on average,
counting the token at their end that the edge or the device draws itself. That over the mean time it takes is the rate.

- Waiting for each verdict, n = g, and it takes g·t to draft and R(g) to be answered. After a draft that stands the
  draft model has two tokens to read, its last one and the edge's, so that a^g·t comes on top.
- Drafting ahead of the verdict, a cycle ends with the first draft of which a token falls, draft k with probability
  a^(g(k-1))·(1 - a^g); or with the N-th draft, which is waited for because the window is full. As long as nothing
  falls, the course is determined: draft k is sent at k·g·t, the edge takes it into the step after the one under way,
  and its verdict comes at some v(k). So the cycle's mean time is the sum of P(k)·v(k). Who drafts meanwhile notices it
  half a token late. Where verdicts come before the window is full, N is infinite.
"""

from dataclasses import dataclass
from typing import Final

from fleet_device.pacing.contract import Plan

__all__ = ["Conditions"]

_FOLLOWED: Final = 16
"""Drafts of a cycle whose verdicts are worked out one by one; those behind them keep the last one's distance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a device works under.

    Attributes:
        acceptance: Chance of a draft token to be accepted, the tokens before it taken as accepted; below 1.
        token_s: Time to draft a token.
        beside_s: Time from sending an empty draft to its verdict, without the edge's verification step; above 0.
        beside_token_s: By how much each draft token lengthens it.
        compute_s: The edge's verification step for an empty draft.
        compute_token_s: By how much each draft token lengthens it.
        window: Most drafts under way at once.
        price: What one more token costs other texts at the edge, in tokens that they are written.
        text_price: What a verdict costs them beside, however many tokens it is on.
    """

    acceptance: float
    token_s: float
    beside_s: float
    beside_token_s: float = 0.0
    compute_s: float = 0.0
    compute_token_s: float = 0.0
    window: int = 1
    price: float = 0.0
    text_price: float = 0.0

    def worth(self, plan: Plan) -> float:
        """Return committed tokens a second, less those that other texts lose by it.

        An edge computes g tokens for (1 - a^g) / (1 - a) that stand or are drawn in place of the first that falls; what
        it draws behind a draft that stands comes on top where the device waits. Who drafts ahead has all of it verified
        at once that was drafted while a step went on.
        """
        if not self.price:
            return self.rate(plan)
        ahead = plan.ahead and plan.tokens > 0
        computed = self._in_a_step(plan.tokens) if ahead else plan.tokens
        committed = self._committed(computed - 1 if ahead else computed)
        return self.rate(plan) * max(0.0, 1.0 - (self.text_price + self.price * computed) / committed)

    def rate(self, plan: Plan) -> float:
        """Return committed tokens a second."""
        if plan.ahead and plan.tokens:
            return self._ahead(plan.tokens)
        return self._waiting(plan.tokens)

    def answer_s(self, tokens: int) -> float:
        """Return the time from sending a draft to its verdict."""
        return self.beside_s + tokens * self.beside_token_s + self._step_s(tokens)

    def _waiting(self, tokens: int) -> float:
        draft_s = (tokens + self.acceptance**tokens) * self.token_s if tokens else 0.0
        return self._committed(tokens) / (draft_s + self.answer_s(tokens))

    def _ahead(self, tokens: int) -> float:
        stands, late_s = self.acceptance**tokens, self.token_s / 2
        verdicts, full = self._verdicts(tokens)
        drafting_s = len(verdicts) * tokens * self.token_s if full else float("inf")
        cycle_s, reached = 0.0, 1.0
        for verdict_s in verdicts:
            cycle_s += reached * (1.0 - stands) * (verdict_s + (late_s if verdict_s < drafting_s else 0.0))
            reached *= stands
        if full:
            cycle_s += reached * (verdicts[-1] + self.token_s)
            return self._committed(tokens * len(verdicts)) / cycle_s
        distance_s = verdicts[-1] - verdicts[-2]
        cycle_s += reached * (verdicts[-1] + late_s + distance_s / (1.0 - stands))
        return 1.0 / (1.0 - self.acceptance) / cycle_s

    def _verdicts(self, tokens: int) -> tuple[list[float], bool]:
        """Return when verdicts come if nothing falls, and whether the last one is waited for: the window is full."""
        verdicts: list[float] = []
        step_s = float("-inf")  # when the last step began
        while len(verdicts) < _FOLLOWED:
            sent_s = (len(verdicts) + 1) * tokens * self.token_s
            if sent_s > step_s:  # else it is there when a step begins that is due anyway
                step_s = max(sent_s, step_s + self._step_s(tokens))
            verdicts.append(step_s + self.answer_s(tokens))
            if len(verdicts) >= self.window and verdicts[-self.window] + self.token_s / 2 > sent_s:
                return verdicts, True
        return verdicts, False

    def _in_a_step(self, tokens: int) -> float:
        """Return how many of its tokens a step verifies, where it drafts ahead so many at a time."""
        meanwhile = self._step_s(tokens) / self.token_s if self.token_s else float("inf")
        return min(self.window * tokens, max(tokens, meanwhile))

    def _committed(self, tokens: float) -> float:
        missed: float = self.acceptance ** (tokens + 1)
        return (1.0 - missed) / (1.0 - self.acceptance)

    def _step_s(self, tokens: int) -> float:
        return self.compute_s + tokens * self.compute_token_s

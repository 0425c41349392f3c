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

Where the edge has other texts as well, a plan promises what it would bring if all of them were written by it: see
`shared_steps`.
"""

from dataclasses import dataclass, replace
from typing import Final

from fleet_device.pacing.contract import Plan, SharedSteps

__all__ = ["Conditions"]

_FOLLOWED: Final = 16
"""Drafts of a cycle whose verdicts are worked out one by one; those behind them keep the last one's distance."""

_ROUNDS: Final = 3
"""In which it is found out how many texts are in a step, where each depends on the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a device works under.

    Attributes:
        acceptance: Chance of a draft token to be accepted, the tokens before it taken as accepted; below 1.
        token_s: Time to draft a token.
        beside_s: Time from sending an empty draft to its verdict, without the edge's verification step, and, where that
            is shared, without the wait for it to begin; above 0.
        beside_token_s: By how much each draft token lengthens it.
        compute_s: The edge's verification step for an empty draft.
        compute_token_s: By how much each draft token lengthens it.
        wait_s: Until that step begins, from when the draft has come.
        window: Most drafts under way at once.
        shared: What the edge's steps take where other texts are in them; then `compute_s` is not asked for.
    """

    acceptance: float
    token_s: float
    beside_s: float
    beside_token_s: float = 0.0
    compute_s: float = 0.0
    compute_token_s: float = 0.0
    wait_s: float = 0.0
    window: int = 1
    shared: SharedSteps | None = None

    def rate(self, plan: Plan) -> float:
        """Return committed tokens a second, of each text if all are written so."""
        committed, seconds = self.cycle(plan)
        return committed / seconds

    def answer_s(self, tokens: int) -> float:
        """Return the time from sending a draft to its verdict."""
        if self.shared is not None:
            return self._alike(Plan(tokens)).answer_s(tokens)
        return self.beside_s + tokens * self.beside_token_s + self.wait_s + self._step_s(tokens)

    def more_s(self, plan: Plan) -> float:
        """Return by how much one more token of each draft would make a verdict come later."""
        tokens = plan.tokens
        return self.token_s + self.answer_s(tokens + 1) - self.answer_s(tokens)

    def cycle(self, plan: Plan) -> tuple[float, float]:
        """Return what a cycle commits, and what it takes, on average."""
        if self.shared is not None:
            return self._alike(plan).cycle(plan)
        if plan.ahead and plan.tokens:
            return self._ahead(plan.tokens)
        return self._committed(plan.tokens), self._draft_s(plan.tokens) + self.answer_s(plan.tokens)

    def _alike(self, plan: Plan) -> "Conditions":
        """Return the conditions as they are if all texts are written so."""
        shared, tokens = self.shared, plan.tokens
        assert shared is not None
        outside_s = self._draft_s(tokens) + self.beside_s + tokens * self.beside_token_s
        if not plan.ahead or not tokens:
            # The last draft is one behind a bonus token, which the draft model has to read as well.
            last_s = self.token_s * (1.0 - self.acceptance**tokens) if tokens else 0.0
            step_s, wait_s = shared.waiting_s(tokens, outside_s=outside_s, last_s=last_s)
            return self._in_steps(step_s, tokens, wait_s=wait_s)
        present = 1.0
        for last in reversed(range(_ROUNDS)):
            step_s = shared.ahead_s(tokens, token_s=self.token_s, window=self.window, present=present)
            own = self._in_steps(step_s, tokens, wait_s=step_s / 2)
            if last:
                _, cycle_s = own.cycle(plan)
                present = max(0.0, 1.0 - (outside_s + own.wait_s) / cycle_s)
        return own

    def _in_steps(self, step_s: float, tokens: int, *, wait_s: float) -> "Conditions":
        compute_s = step_s - tokens * self.compute_token_s
        return replace(self, wait_s=wait_s, compute_s=compute_s, shared=None)

    def _draft_s(self, tokens: int) -> float:
        return (tokens + self.acceptance**tokens) * self.token_s if tokens else 0.0

    def _ahead(self, tokens: int) -> tuple[float, float]:
        stands, late_s = self.acceptance**tokens, self.token_s / 2
        verdicts, full = self._verdicts(tokens)
        drafting_s = len(verdicts) * tokens * self.token_s if full else float("inf")
        cycle_s, reached = 0.0, 1.0
        for verdict_s in verdicts:
            cycle_s += reached * (1.0 - stands) * (verdict_s + (late_s if verdict_s < drafting_s else 0.0))
            reached *= stands
        if full:
            cycle_s += reached * (verdicts[-1] + self.token_s)
            return self._committed(tokens * len(verdicts)), cycle_s
        distance_s = verdicts[-1] - verdicts[-2]
        cycle_s += reached * (verdicts[-1] + late_s + distance_s / (1.0 - stands))
        return 1.0 / (1.0 - self.acceptance), cycle_s

    def _verdicts(self, tokens: int) -> tuple[list[float], bool]:
        """Return when verdicts come if nothing falls, and whether the last one is waited for: the window is full."""
        verdicts: list[float] = []
        step_s = 0.0  # when the last step began
        while len(verdicts) < _FOLLOWED:
            sent_s = (len(verdicts) + 1) * tokens * self.token_s
            if not verdicts:
                step_s = sent_s + self.wait_s
            elif sent_s > step_s:  # else it is there when a step begins that is due anyway
                step_s = max(sent_s, step_s + self._step_s(tokens))
            verdicts.append(step_s + self.answer_s(tokens) - self.wait_s)
            if len(verdicts) >= self.window and verdicts[-self.window] + self.token_s / 2 > sent_s:
                return verdicts, True
        return verdicts, False

    def _committed(self, tokens: float) -> float:
        missed: float = self.acceptance ** (tokens + 1)
        return (1.0 - missed) / (1.0 - self.acceptance)

    def _step_s(self, tokens: int) -> float:
        return self.compute_s + tokens * self.compute_token_s

"""Throughput: committed tokens per second of a plan, from acceptance and times.

A draft token is accepted with probability a. A draft of n tokens commits (1 - a^(n+1)) / (1 - a) tokens on average,
including the correction or bonus token. Divided by the mean time this gives the rate.

- Waiting for each verdict: n = g; drafting takes g·t and the answer R(g). After a draft that is accepted whole the
draft
  model reads two tokens, its last one and the bonus token, which adds a^g·t.
- Drafting ahead: a cycle ends with the first draft that has a rejection, draft k with probability
  a^(g(k-1))·(1 - a^g), or with draft N, which is waited for because the window is full. Without rejections the course
  is
  fixed: draft k is sent at k·g·t, enters the step after the present one, and its verdict arrives at v(k). The mean
  time of a cycle is the sum of P(k)·v(k). The device notices a verdict half a token late. If verdicts arrive before the
  window is full, N is infinite.

If the edge has other requests, a plan is rated as if all of them used it: see `SharedSteps`.
"""

from dataclasses import dataclass, replace
from typing import Final

from fleet_device.pacing.contract import Plan, SharedSteps

_FOLLOWED: Final = 16
"""Drafts of a cycle whose verdicts are worked out one by one; those behind them keep the last one's distance."""

_ROUNDS: Final = 3
"""In which it is found out how many texts are in a step, where each depends on the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Conditions of drafting.

    Attributes:
        acceptance: Probability that a draft token is accepted if those before it are; below 1.
        token_s: Time to draft a token.
        beside_s: Time from an empty draft to its verdict without the edge's step, and with shared steps without the
            queue;
            above 0.
        beside_token_s: Further time per draft token.
        compute_s: Time of the edge's step for an empty draft.
        compute_token_s: Further step time per draft token.
        wait_s: Time from the arrival of a draft to the start of its step.
        window: Largest number of drafts in flight.
        shared: Step times with other requests; then `compute_s` is not used.
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
        """Return the committed tokens per second of each request if all use this plan."""
        committed, seconds = self.cycle(plan)
        return committed / seconds

    def answer_s(self, tokens: int) -> float:
        """Return the time from a draft to its verdict."""
        if self.shared is not None:
            return self._alike(Plan(tokens)).answer_s(tokens)
        return self.beside_s + tokens * self.beside_token_s + self.wait_s + self._step_s(tokens)

    def more_s(self, plan: Plan) -> float:
        """Return how much later a verdict arrives per further draft token."""
        tokens = plan.tokens
        return self.token_s + self.answer_s(tokens + 1) - self.answer_s(tokens)

    def cycle(self, plan: Plan) -> tuple[float, float]:
        """Return the mean tokens and the mean time of a cycle."""
        if self.shared is not None:
            return self._alike(plan).cycle(plan)
        if plan.ahead and plan.tokens:
            return self._ahead(plan.tokens)
        return self._committed(plan.tokens), self._draft_s(plan.tokens) + self.answer_s(plan.tokens)

    def _alike(self, plan: Plan) -> "Conditions":
        """Return the conditions if all requests use this plan."""
        shared, tokens = self.shared, plan.tokens
        assert shared is not None
        outside_s = self._draft_s(tokens) + self.beside_s + tokens * self.beside_token_s
        if not plan.ahead or not tokens:
            # The last draft follows a bonus token, which the draft model has to read as well.
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
        """Return the verdicts' arrival times without rejections, and whether a full window waits for the last."""
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

"""Pacing contract: plans, outcomes and the shared steps of a loaded edge."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Final, Literal, Protocol, Self

from fleet_device.drafters.contract import Prospect
from schemas.fields import EdgeLoad

_TRUST_LOST: Final = 0.02
"""With each further request."""

_LEAST_TRUST: Final = 0.75
_INSTANT_S: Final = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSteps:
    """Step times of an edge with several running requests.

    All devices together make the length of a step, so the gain of one device that changes its plan alone is no guide:
    sixteen devices on two cores could each gain by drafts that slow all of them down, and four could gain if all
    drafted ahead while the first one to do so loses. A plan is therefore rated as if all requests used it. Similar
    devices then choose the same plan without communicating.

    Attributes:
        requests: Number of requests; at least 2.
        writing_s: Step time in edge-only decoding of all requests.
        step_s: Fixed time of a step that verifies drafts.
        request_s: Further time per request, with its first token.
        token_s: Further time per further token.
        free: Number of further tokens per request that cost nothing.
    """

    requests: int
    writing_s: float
    step_s: float
    request_s: float
    token_s: float
    free: int = 0

    @classmethod
    def of(cls, load: EdgeLoad) -> Self | None:
        """None if the edge has no other request, or has not reported all times."""
        if load.requests == 1 or load.writing_ms is None:
            return None
        if load.step_ms is None or load.request_ms is None or load.token_ms is None:
            return None
        return cls(
            requests=load.requests,
            writing_s=max(_INSTANT_S, load.writing_ms / 1e3),
            step_s=load.step_ms / 1e3,
            request_s=load.request_ms / 1e3,
            token_s=load.token_ms / 1e3,
            free=load.free,
        )

    @property
    def trust(self) -> float:
        """Factor on the rate of drafting ahead; it falls with the number of requests.

        Drafts that are sent one at a time are not all in the next step, and sequences with different numbers of tokens
        take separate passes. Simulated with the step times of two cores: 0.92 with 4 requests, 0.86 with 8, 0.6 to 1
        with 16.
        """
        return max(_LEAST_TRUST, 1.0 - _TRUST_LOST * (self.requests - 1))

    def waiting_s(self, tokens: int, *, outside_s: float, last_s: float = 0.0) -> tuple[float, float]:
        """Return step time and waiting time of a draft if all devices wait for each verdict.

        Either all requests are in each step, which waits for the last draft. Or, of S requests, only those whose drafts
        have arrived are: S·x / (o + 1.5·x) for a step of x, since a draft arrives in the middle of a step on average
        and waits for the next one. That is faster. But drafts that arrive during one step are answered together from
        then on, so it lasts only while a step is short compared with the time outside; the longer the step, the less it
        counts.
        """
        each_s = self._request_s(tokens)
        together_s = self.step_s + self.requests * each_s
        linear = outside_s - 1.5 * self.step_s - self.requests * each_s
        root_s = (sqrt(linear * linear + 6.0 * self.step_s * outside_s) - linear) / 3.0
        some_s = max(root_s, self.step_s + each_s)
        wait_s = some_s / 2 * min(1.0, self.requests * some_s / (outside_s + 1.5 * some_s))
        apart = max(0.0, 1.0 - together_s / outside_s) if some_s + wait_s < together_s + last_s else 0.0
        return together_s + apart * (some_s - together_s), last_s + apart * (wait_s - last_s)

    def ahead_s(self, tokens: int, *, token_s: float, window: int, present: float) -> float:
        """Return the step time if all devices draft ahead: a step contains everything that has arrived.

        `window` is the largest number of drafts in flight, `present` the share of the requests in a step.
        """
        drafting_s = tokens * token_s
        each_s = self._request_s(tokens)
        # A step shorter than a drafting time contains only some requests, more of them the longer it is.
        some = present * self.requests * each_s / drafting_s if drafting_s else 1.0
        step_s = max(self.step_s + each_s, self.step_s / (1.0 - some) if some < 1.0 else float("inf"))
        if step_s <= drafting_s:
            return step_s
        requests = max(1.0, present * self.requests)
        min_s = self.step_s + requests * (self.request_s - self.free * self.token_s)
        of_each = requests * self.token_s
        drafted = max(0.0, min_s) / (token_s - of_each) if token_s > of_each else float("inf")
        return self.step_s + requests * self._request_s(min(window * tokens, max(tokens, drafted)))

    def _request_s(self, tokens: float) -> float:
        return self.request_s + max(0.0, tokens - self.free) * self.token_s


PlanName = Literal["edge-only", "draft", "ahead"]

EDGE_ONLY_TOKENS: Final = 32
"""Tokens per request for edge-only decoding. The next request follows when half of them have come, so that the edge
does not pause on a line that has fewer in flight; and it decodes no more than these for a device that has gone."""

_FAIR: Final = 0.7
"""Acceptance rate of a draft model, where none is measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next draft is made.

    Attributes:
        tokens: Draft length, if the request and the edge have room for it.
        edge_only: Edge-only decoding of this number of tokens.
        may_stop: Whether the draft may end early; see `Pacing.goes_on`.
        repeats: Whether it comes from the suffix index instead of the draft model.
        least: Acceptance that each suffix token must promise.
    """

    tokens: int
    ahead: bool = False
    edge_only: bool = False
    may_stop: bool = False
    repeats: bool = False
    least: float = 0.0

    @property
    def name(self) -> PlanName:
        return "edge-only" if self.edge_only else "ahead" if self.ahead else "draft"


@dataclass(frozen=True, slots=True)
class Choice:
    """The present plan, and a sentence with the estimate of each alternative.

    `settled`: the device has measured the alternatives, and has chosen this one for a while.
    """

    plan: PlanName
    reason: str
    settled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOutcome:
    """Result of one draft.

    Attributes:
        ahead: Whether another draft was announced, so that the edge drew no bonus token.
        compute_s: Time of the edge's step that verified it.
        opening: Whether it was sent before the session's first verdict: its times may then include the prompt.
        chances: Probability that each token was drawn with; empty if unknown.
        queue_s: Waiting time before that step.
        repeats: Whether it came from the suffix index, which says nothing about the draft model.
        chained: Number of tokens of this session's other drafts in the same step.
    """

    tokens: int
    ahead: bool
    accepted: int
    token_s: float
    answer_s: float
    compute_s: float
    opening: bool = False
    chances: tuple[float, ...] = ()
    queue_s: float = 0.0
    repeats: bool = False
    chained: int = 0

    @property
    def tested(self) -> int:
        return min(self.tokens, self.accepted + 1)


@dataclass(slots=True)
class RoundTrips:
    count: int = 0
    total_ms: float = 0.0

    @property
    def mean_ms(self) -> float | None:
        return self.total_ms / self.count if self.count else None

    def add(self, took_ms: float) -> None:
        self.count += 1
        self.total_ms += took_ms


class Pacing(Protocol):
    """Decide from measurements, never from a drawn token that is then dropped: that would bias the output.

    So a plan is made before the first draw of a draft, and whether to draw another token depends only on tokens that
    are already in the draft, all of which are sent.
    """

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan of the next draft; `longest` is the largest that the edge accepts.

        `window` is the largest number of drafts in flight.
        """

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Return a plan with suffix drafts if their prospect promises more than `plan`."""

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Return whether to draft another token, given the probabilities of those drawn, at least one."""

    def learn(self, outcome: DraftOutcome) -> None: ...

    def learn_edge_only(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None:
        """Record tokens of edge-only decoding.

        `seconds` have passed since the last ones, without a pause; `step_s` is the last step's time, 0 if unknown.
        """

    def note_load(self, load: EdgeLoad) -> None:
        """Record the edge's reported load, before the outcome in the same message."""

    def choice(self) -> Choice: ...


@dataclass(frozen=True, slots=True)
class FixedPacing:
    """Always the same plan; with `edge_only`, edge-only decoding of `tokens` per request."""

    tokens: int = 5
    ahead: bool = False
    edge_only: bool = False
    reason: str = "The settings say so."

    def plan(self, *, longest: int, window: int) -> Plan:
        del longest, window
        return Plan(self.tokens, self.ahead, self.edge_only)

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Use suffix drafts where their acceptance equals that of a fair draft model."""
        del window
        tokens = min(plan.tokens, longest, len(prospect.chances))
        if plan.edge_only or not tokens or prospect.acceptance(tokens) < _FAIR:
            return plan
        return replace(plan, repeats=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        del chances
        return True

    def learn(self, outcome: DraftOutcome) -> None: ...

    def learn_edge_only(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None: ...

    def note_load(self, load: EdgeLoad) -> None: ...

    def choice(self) -> Choice:
        plan = self.plan(longest=self.tokens, window=1)
        return Choice(plan.name, self.reason, settled=True)

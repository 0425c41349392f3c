"""Step cost: the duration of a step.

A step has a fixed cost, a cost for each request, and a smaller one for each further token of a request, since keys and
values are read once for all its tokens (llama.cpp on two cores: 4 ms a request, 1.3 ms a further token). Least squares
over the latest steps fit both, with forgetting, and also for the present load alone, because on a CPU the marginal cost
falls with the number of rows (7 ms with one request, 1 to 4 ms with sixteen).
"""

from dataclasses import dataclass, field, replace
from math import inf
from typing import Final

from fleet_edge.batching.steps import StepReport

_LATELY_S: Final = 1.0
"""A request that was in a step this recently is running: its device drafts, or messages are on their way."""

_STEPS: Final = 4.0
"""The same in steps, where these are long."""


@dataclass(slots=True)
class RunningRequests:
    """Requests that were in a step recently; `count` is their number after the latest step."""

    count: int = 0
    _seen: dict[int, float] = field(default_factory=dict)

    def on_open(self, handle: int) -> None:
        self._seen[handle] = inf
        self.count = len(self._seen)

    def on_step(self, report: StepReport) -> None:
        """Record the requests of a step, and drop those that have fallen silent."""
        at = report.times.ended
        for work in report.batch.works:
            self._seen[work.session.handle] = at
        for handle, seen_at in self._seen.items():
            if seen_at == inf:
                self._seen[handle] = at
        since = at - max(_LATELY_S, _STEPS * report.times.seconds)
        for handle in [handle for handle, seen_at in self._seen.items() if seen_at < since]:
            del self._seen[handle]
        self.count = len(self._seen)

    def forget(self, handle: int) -> None:
        if self._seen.pop(handle, None) is not None:
            self.count = len(self._seen)


_KEPT_COST: Final = 1.0 - 1.0 / 1024
"""Weight kept by step times with each step: long, since loads must differ for a fit."""

_STIFFNESS: Final = 32.0
"""Squared spread, summed over steps, at which half of a fitted slope is believed."""

_MIN_SPREAD: Final = 1.0 / 16
"""Spread from which a slope is believed at all."""

_SMOOTHING: Final = 0.3
"""Weight of the latest step in the time of a prompt token, and in the recent time of a step."""

_FIRST_PROMPT: Final = 16
"""Prompt tokens in a step before their cost is measured."""

_MIN_TOKEN_S: Final = 1e-9

_SHORT_FIRST: Final = 4.0
"""How much longer than it takes itself a prompt may wait for shorter ones that arrive later."""

_ROUNDING: Final = 1e-3
"""So that a measured time of a token has room for that token."""

_MIN_OF_MEAN: Final = 0.5
"""Least time of a prompt token, of the mean token in its step: the other tokens may take less than they did."""


@dataclass(frozen=True, slots=True)
class StepParts:
    """Parts of a step's duration in seconds; None where steps do not differ enough to tell.

    `writing_s` is for a token of each request in edge-only decoding, `step_s` the fixed cost of a step that verifies
    drafts, `request_s` the cost of each request, `token_s` of each further token.
    """

    writing_s: float | None = None
    step_s: float | None = None
    request_s: float | None = None
    token_s: float | None = None


@dataclass(slots=True)
class _Steps:
    """Weighted sums over steps for a least-squares fit."""

    weight: float = 0.0
    requests: float = 0.0
    further: float = 0.0
    seconds: float = 0.0
    requests_requests: float = 0.0
    requests_further: float = 0.0
    requests_seconds: float = 0.0
    further_further: float = 0.0
    further_seconds: float = 0.0

    def add(self, seconds: float, *, requests: int, further: int) -> None:
        self.weight = _KEPT_COST * self.weight + 1.0
        self.requests = _KEPT_COST * self.requests + requests
        self.further = _KEPT_COST * self.further + further
        self.seconds = _KEPT_COST * self.seconds + seconds
        self.requests_requests = _KEPT_COST * self.requests_requests + requests * requests
        self.requests_further = _KEPT_COST * self.requests_further + requests * further
        self.requests_seconds = _KEPT_COST * self.requests_seconds + requests * seconds
        self.further_further = _KEPT_COST * self.further_further + further * further
        self.further_seconds = _KEPT_COST * self.further_seconds + further * seconds

    def slopes(self, expected: StepParts = StepParts()) -> StepParts:
        """Return the fitted costs, regularised towards `expected`."""
        if self.weight <= 0.0 or self.requests <= 0.0:
            return expected
        requests, further, seconds = (each / self.weight for each in (self.requests, self.further, self.seconds))
        requests_requests = self.requests_requests / self.weight - requests * requests
        requests_further = self.requests_further / self.weight - requests * further
        further_further = self.further_further / self.weight - further * further
        requests_known = requests_requests >= _MIN_SPREAD or expected.request_s is not None
        further_known = further_further >= _MIN_SPREAD or expected.token_s is not None
        stiffness = _STIFFNESS / self.weight
        requests_requests, further_further = requests_requests + stiffness, further_further + stiffness
        requests_seconds = (
            self.requests_seconds / self.weight - requests * seconds + stiffness * (expected.request_s or 0.0)
        )
        further_seconds = self.further_seconds / self.weight - further * seconds + stiffness * (expected.token_s or 0.0)
        determinant = requests_requests * further_further - requests_further * requests_further
        request_s = (further_further * requests_seconds - requests_further * further_seconds) / determinant
        token_s = (requests_requests * further_seconds - requests_further * requests_seconds) / determinant
        # Even an empty step takes time: the fitted plane must not cross zero.
        most = seconds / (requests + further)
        request_s, token_s = (min(max(0.0, each), most) for each in (request_s, token_s))
        known = requests_known and further_known
        return StepParts(
            None,
            max(0.0, seconds - request_s * requests - token_s * further) if known else None,
            request_s if requests_known else None,
            token_s if further_known else None,
        )


def _smoothed(before: float | None, latest: float) -> float:
    return latest if before is None else before + _SMOOTHING * (latest - before)


@dataclass(slots=True)
class StepCost:
    """All that the scheduler knows of the duration of steps.

    A batch-invariant step computes at least `least` tokens of a session; fewer cost as much.
    """

    least: int = 1
    _all: _Steps = field(default_factory=_Steps)
    _writing: _Steps = field(default_factory=_Steps)  # steps of edge-only decoding
    _written: float = 0.0  # tokens that these generated, at least one for each request
    _expected: int = 0  # of these, assumed for the latest step and not confirmed yet
    _wrote: bool = False  # whether the latest step was of edge-only decoding alone
    _verifying: _Steps = field(default_factory=_Steps)
    _alike: dict[int, _Steps] = field(default_factory=dict)  # by the load, doubled from one to the next
    _load: int = 0  # of the latest step
    _prompt_token_s: float | None = None
    _plain_s: float | None = None
    _recent_s: float = 0.0

    def on_step(self, report: StepReport) -> None:
        """Measure a step: one with prompt tokens for their cost, any other for the cost of verification."""
        if report.times.sessions:
            self._recent_s = _smoothed(self._recent_s or None, report.times.seconds)
        works, drafting_s = report.batch.works, report.times.drafting_s
        seconds = report.times.seconds - drafting_s
        if report.batch.prefilled:
            self.add_prompts(
                seconds, tokens=report.batch.prefilled, others=report.batch.tokens - report.batch.prefilled
            )
            return
        self._plain_s = _smoothed(self._plain_s, seconds)
        least = self.least if any(work.item.stable for work in works) else 1
        self.add_step(
            seconds,
            requests=len(works),
            further=sum(max(0, len(work.item.tokens) - least) for work in works),
            verifies=any(not work.decodes for work in works),
            drafting_s=drafting_s,
        )

    def add_step(
        self, seconds: float, *, requests: int, further: int, verifies: bool = True, drafting_s: float = 0.0
    ) -> None:
        """Count a step without prompt tokens; `add_committed` then reports what it generated.

        `further` counts tokens beyond the `least` of each request, `drafting_s` what drafting at the edge took before.
        """
        self._wrote = not verifies
        if not verifies:
            self._writing.add(seconds + drafting_s, requests=requests, further=0)
            self._written = _KEPT_COST * self._written + requests
            self._expected = requests
        self._load = requests.bit_length()
        alike = self._alike.setdefault(self._load, _Steps())
        for steps in (self._all, alike, self._verifying) if verifies else (self._all, alike):
            steps.add(seconds, requests=requests, further=further)

    def add_prompts(self, seconds: float, *, tokens: int, others: int = 0) -> None:
        """Count a step with prompt tokens, next to `others`, which take as long as a step without prompts."""
        self._wrote = False
        mean_s = seconds / (tokens + others)
        latest_s = max((seconds - self.plain_s) / tokens, _MIN_OF_MEAN * mean_s) if others else mean_s
        self._prompt_token_s = _smoothed(self._prompt_token_s, min(latest_s, mean_s))

    def prompt_tokens(self, seconds: float, most: int) -> int:
        if self._prompt_token_s is None:
            return min(most, _FIRST_PROMPT)
        return int(min(most, seconds / max(self._prompt_token_s, _MIN_TOKEN_S) + _ROUNDING))

    @property
    def prompt_token_s(self) -> float | None:
        """Seconds of a prompt token; None before one was computed."""
        return None if self._prompt_token_s is None else max(self._prompt_token_s, _MIN_TOKEN_S)

    def place(self, arrived: float, tokens: int) -> float:
        """Return the place of a prompt among those that wait, the least first: by arrival, and by what is left of it.

        So short ones go first, and a long one waits for later ones no longer than a multiple of what it takes itself.
        """
        return arrived + _SHORT_FIRST * tokens * (self.prompt_token_s or 0.0)

    @property
    def plain_s(self) -> float:
        """Duration of a step without prompts, smoothed; 0 before the first."""
        return self._plain_s or 0.0

    @property
    def recent_s(self) -> float:
        """Duration of the latest steps with verification, smoothed; 0 before the first."""
        return self._recent_s

    @property
    def mean_s(self) -> float:
        return self._all.seconds / self._all.weight if self._all.weight else 0.0

    def add_committed(self, tokens: int) -> None:
        if self._wrote:
            self._expected -= tokens
            self._written += max(0, -self._expected)
            self._expected = max(0, self._expected)

    def parts(self, requests: int) -> StepParts:
        if requests <= 1:
            return self._alike[1].slopes(self._all.slopes()) if 1 in self._alike else self._all.slopes()
        parts = self._verifying.slopes(self._all.slopes())
        writing_s = self._writing_s(requests)
        if writing_s is None and parts.step_s is not None and parts.request_s is not None:
            writing_s = parts.step_s + requests * parts.request_s
        return replace(parts, writing_s=writing_s)

    def _writing_s(self, requests: int) -> float | None:
        steps = self._writing
        if steps.weight <= 0.0:
            return None
        request_s = steps.slopes().request_s or 0.0
        step_s = (steps.seconds + request_s * (requests * steps.weight - steps.requests)) / steps.weight
        return step_s * steps.requests / self._written  # less than a step where speculation succeeds

    @property
    def token_s(self) -> float | None:
        """Seconds that one more token adds to a step at the present load; None if unknown."""
        expected = self._all.slopes()
        return (self._alike[self._load].slopes(expected) if self._load in self._alike else expected).token_s

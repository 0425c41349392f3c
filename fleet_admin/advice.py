"""Advice: whether drafting pays at an edge, and how many devices it serves.

All of it is computed from the edge's step times. Let n devices generate all the time, s(m, r) be the time of a step of
m sequences with r new tokens each, and P the time of a prompt.

- Edge-only decoding: every device is in every step, so a token takes s(n, 1).
- Drafting: a round takes c = outside + s(m, g + 1) + wait, where outside is drafting and the network. A step contains
  the m = n·s / c drafts that have arrived, and a draft waits for half of the present step while the edge is busy. Both
  equations are solved together. Tokens per round, and rounds with several drafts in flight, are those of the devices'
  pacing.
- Every request also waits for its own prompt, and for the prompts of the other devices while the edge is busy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fleet_admin.token_time import token_time
from fleet_device.pacing.contract import Plan
from fleet_device.pacing.estimates import Conditions
from fleet_edge.batching.batch_builder import Budget, max_prompts_s
from fleet_edge.batching.prompt_wait import PromptWait
from fleet_edge.session_log import SessionLog
from fleet_edge.step_curve import StepCurve
from schemas.errors import FleetError

LARGE_CURVE: Final = Path(__file__).parent / "curves" / "7b-two-cores.json"
"""Step times of a 7B target, measured by `python -m benchmarks engines steps`; those of prompts from 92 tokens/s."""

_SINCE: Final = "7d"
_MIN_SESSIONS: Final = 5
_ROUND_TRIP_MS: Final = 20.0
_MAX_MS: Final = 60_000.0


class PlanningError(FleetError):
    """The figures for an estimate are missing or unusable."""


@dataclass(frozen=True, slots=True)
class Given:
    draft_ms: float | None = None
    acceptance: float | None = None
    round_trip_ms: float | None = None


@dataclass(frozen=True, slots=True)
class DraftFigures:
    draft_ms: float
    acceptance: float  # probability that a draft token is accepted if those before it are
    round_trip_ms: float
    sources: Mapping[str, str]  # origin of each of the three


def find_drafts(given: Given, *, db: str) -> DraftFigures:
    """Return figures given by the user, else of last week's sessions."""
    _check(given)
    flags = (("draft_ms", given.draft_ms), ("acceptance", given.acceptance), ("round_trip_ms", given.round_trip_ms))
    found = {name: (value, "as given") for name, value in flags if value is not None}
    reason = ""
    if len(found) < len(flags):
        try:
            found = _of_log(db) | found
        except FleetError as error:
            reason = f" ({error})"
    found.setdefault("round_trip_ms", (_ROUND_TRIP_MS, "assumed; give --rtt-ms"))
    for name, flag in (("draft_ms", "--draft-ms"), ("acceptance", "--acceptance")):
        if name not in found:
            raise PlanningError(
                f"It is not known how devices draft: give {flag}, or with --db a session log in which devices have "
                f"drafted within the last week{reason}."
            )
    return DraftFigures(
        draft_ms=found["draft_ms"][0],
        acceptance=found["acceptance"][0],
        round_trip_ms=found["round_trip_ms"][0],
        sources={name: source for name, (_, source) in found.items()},
    )


def _check(given: Given) -> None:
    for flag, value in (("--draft-ms", given.draft_ms), ("--rtt-ms", given.round_trip_ms)):
        if value is not None and not 0.0 <= value <= _MAX_MS:
            raise PlanningError(f"{flag} is {value:g}; give milliseconds, from 0 to {_MAX_MS:,.0f}.")
    if given.acceptance is not None and not 0.0 <= given.acceptance <= 1.0:
        raise PlanningError(
            f"--acceptance is {given.acceptance:g}; give the share of draft tokens that is accepted, from 0 to 1."
        )


def _of_log(db: str) -> dict[str, tuple[float, str]]:
    """Return the figures of last week's sessions at the edge that has served most of them."""
    with SessionLog(db) as log:
        spent = log.spent_times("edge", since=_SINCE)
    times = [(time, edge) for edge, each in spent.items() if (time := token_time(each)) is not None]
    time, edge = max(times, key=lambda pair: pair[0].sessions, default=(None, ""))
    if time is None or time.sessions < _MIN_SESSIONS:
        return {}
    figures = {"acceptance": time.acceptance, "draft_ms": time.draft_ms}
    if time.draft_tokens:  # edge-only devices wait all the time, not for answers
        figures["round_trip_ms"] = time.link_ms
    said = f"{time.sessions} sessions of the last week at {edge} in the session log"
    return {name: (value, said) for name, value in figures.items() if value is not None}


_WORTH: Final = 1.05
"""Drafting pays if it is this many times as fast as edge-only decoding: a model on the device has a cost."""

COSTS: Final = (1, 2, 4, 8)
"""Costs of other targets, as multiples of the measured one, for which the gain is estimated."""

_MESSAGE_S: Final = 0.0006
"""Processing time of the edge for each message (`python -m benchmarks overhead verdicts`)."""

_MAX_DEVICES: Final = 1 << 14
_ITERATIONS: Final = 24
_INSTANT_S: Final = 1e-6
_MAX_ACCEPTANCE: Final = 0.995
_RARE: Final = 0.05  # share of the gaps between tokens that the 95th percentile leaves out


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    tokens_per_s: float = 8.0  # least, of one client
    gap_s: float = 0.25  # most between two tokens, at the 95th percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """An edge's step times, and what its devices do."""

    curve: StepCurve
    draft_s: float = 0.0  # of one draft token
    acceptance: float = 0.0  # probability that a draft token is accepted if those before it are
    round_trip_s: float = 0.0
    text_tokens: int = 128
    prompt_tokens: int = 64
    max_draft: int = 16
    window: int = 4  # most drafts of one session in flight

    @property
    def prompt_s(self) -> float:
        tokens_per_s = 1e3 * self.prompt_tokens / self.curve.step_ms(0, 0.0, prefill=self.prompt_tokens)
        return PromptWait(self.prompt_tokens, 0, tokens_per_s).seconds


@dataclass(frozen=True, slots=True)
class Rate:
    """What each of a number of devices gets that generate all the time."""

    tokens_per_s: float  # prompts included
    gap_s: float  # 95th percentile of the time between tokens
    busy: float  # share of the time in which the edge computes
    plan: Plan


def edge_only(workload: Workload, devices: int) -> Rate:
    step_s = workload.curve.step_ms(devices, 1) / 1e3
    prompts_s = devices * workload.prompt_s
    seconds = workload.text_tokens * step_s + prompts_s + workload.round_trip_s
    chunk = float(min(Budget().prefill_chunk, workload.prompt_tokens))
    more_s = workload.curve.step_ms(devices, 1, prefill=chunk) / 1e3 - step_s
    max_s = max_prompts_s(step_s, workload.prompt_s)
    if more_s > max_s:
        chunk, more_s = chunk * max_s / more_s, max_s
    chunks = devices * workload.prompt_tokens / chunk / workload.text_tokens  # per step
    return Rate(
        tokens_per_s=workload.text_tokens / seconds,
        gap_s=step_s + more_s if chunks > _RARE else step_s,
        busy=1.0 - workload.round_trip_s / seconds,
        plan=Plan(1, edge_only=True),
    )


def drafting(workload: Workload, devices: int, plan: Plan) -> Rate:
    present = 1.0  # sequences in a step
    busy, committed, round_s, each_s = 0.0, 1.0, 1.0, 1.0
    for _ in range(_ITERATIONS):
        step_s = workload.curve.step_ms(present, plan.tokens + 1) / 1e3
        conditions = Conditions(
            acceptance=min(_MAX_ACCEPTANCE, workload.acceptance),
            token_s=workload.draft_s,
            beside_s=max(_INSTANT_S, workload.round_trip_s + 2 * _MESSAGE_S),
            compute_s=step_s,
            wait_s=busy * step_s / 2,
            window=workload.window,
        )
        committed, round_s = conditions.cycle(plan)
        # Drafting ahead, another draft follows as soon as it is made, at most one in each step.
        each_s = min(round_s, max(plan.tokens * workload.draft_s, step_s)) if plan.ahead else round_s
        share = min(1.0, step_s / each_s)
        busy = min(1.0, devices * share / present)
        present = (present + min(float(devices), max(1.0, devices * share))) / 2
    rounds = workload.text_tokens / committed
    prompts_s = workload.prompt_s * (1.0 + (devices - 1) * busy)
    seconds = rounds * round_s + prompts_s
    return Rate(
        tokens_per_s=workload.text_tokens / seconds,
        gap_s=round_s if 1.0 / committed > _RARE else 0.0,
        busy=busy,
        plan=plan,
    )


def best_drafting(workload: Workload, devices: int) -> Rate:
    plans = [Plan(tokens, ahead) for ahead in (False, True) for tokens in range(1, workload.max_draft + 1)]
    return max((drafting(workload, devices, plan) for plan in plans), key=lambda rate: rate.tokens_per_s)


def best(workload: Workload, devices: int) -> Rate:
    return max(edge_only(workload, devices), best_drafting(workload, devices), key=lambda rate: rate.tokens_per_s)


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """Figures of each device while `devices` generate."""

    devices: int
    edge_only: Rate
    drafting: Rate  # with the best plan
    gains: Mapping[int, float]  # drafting ÷ edge-only, by the target's cost

    @property
    def pays(self) -> bool:
        return self.gains[1] >= _WORTH


@dataclass(frozen=True, slots=True)
class EdgeFindings:
    loads: Sequence[LoadPoint]  # by rising number of devices; the first is of one
    holds: int  # most devices that get the service level if they choose
    holds_edge_only: int  # the same with edge-only decoding

    @property
    def pays_with(self) -> Sequence[int]:
        """Return the numbers of devices with which drafting pays."""
        return [load.devices for load in self.loads if load.pays]


def find(workload: Workload, level: ServiceLevel) -> EdgeFindings:
    holds = find_capacity(lambda devices: best(workload, devices), level)
    holds_edge_only = find_capacity(lambda devices: edge_only(workload, devices), level)
    powers = range((max(holds, holds_edge_only, 1) - 1).bit_length() + 1)
    return EdgeFindings([_load(workload, 1 << power) for power in powers], holds, holds_edge_only)


def find_capacity(rate_of: Callable[[int], Rate], level: ServiceLevel) -> int:
    """Return how many devices get a service level."""

    def holds(devices: int) -> bool:
        rate = rate_of(devices)
        return rate.tokens_per_s >= level.tokens_per_s and rate.gap_s <= level.gap_s

    good, bad = 0, 1
    while bad <= _MAX_DEVICES and holds(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def _load(workload: Workload, devices: int) -> LoadPoint:
    alone, drafted = edge_only(workload, devices), best_drafting(workload, devices)
    gains = {1: drafted.tokens_per_s / alone.tokens_per_s}
    for cost in COSTS[1:]:
        other = replace(workload, curve=_scaled(workload.curve, cost))
        gains[cost] = best_drafting(other, devices).tokens_per_s / edge_only(other, devices).tokens_per_s
    return LoadPoint(devices, alone, drafted, gains)


def _scaled(curve: StepCurve, cost: int) -> StepCurve:
    rows = {sessions: tuple((tokens, cost * ms) for tokens, ms in row) for sessions, row in curve.rows.items()}
    return StepCurve(rows=rows, prefill=tuple((tokens, cost * ms) for tokens, ms in curve.prefill))

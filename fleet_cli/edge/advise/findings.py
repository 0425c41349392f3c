"""Findings for one edge: whether drafting pays, up to which load, and how many devices it holds at a service level."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fleet_cli.edge.advise.service_level import Level
from fleet_cli.edge.advise.simulation.run import Outcome, simulate
from fleet_cli.edge.advise.simulation.scenario import Plan as PlanOf
from fleet_cli.edge.advise.simulation.scenario import Scenario, auto, drafting, streaming
from fleet_device.pacing.contract import Plan
from fleet_device.pacing.estimates import Conditions

_WORTH: Final = 1.05
"""Drafting pays where it is so many times as fast as what the edge writes by itself: a model on the device costs."""

_MOST_DEVICES: Final = 1 << 14
_PRECISION: Final = 0.05
_INSTANT_S: Final = 1e-6
_MOST_ACCEPTANCE: Final = 0.995


@dataclass(frozen=True, slots=True)
class Load:
    """What each device gets while so many write (tokens a second, the median over devices).

    Attributes:
        devices: That write at once.
        streaming: Where the edge writes by itself.
        drafting: Under the best fixed way of drafting.
        plan: That way.
        chosen: Where devices choose.
        busy: Share of the time in which the edge computes, where devices choose.
    """

    devices: int
    streaming: float
    drafting: float
    plan: Plan
    chosen: float
    busy: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many devices get a service level.

    Attributes:
        devices: Most that write at once.
        measured: Whether that many are within what was measured of the edge; else they are extrapolated.
        outcome: Of the simulation of that many; None where it is none.
    """

    devices: int
    measured: bool
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found.

    Attributes:
        streamed: Tokens a second of one device where the edge writes by itself.
        plans: By plan, tokens a second of one device.
        best: The best way of drafting.
        loads: By rising number of devices.
        pays_up_to: Devices up to which drafting pays; 0 where it never does.
        holds: Where devices choose.
        holds_streaming: Where the edge writes by itself.
    """

    streamed: float
    plans: dict[Plan, float]
    best: Plan
    loads: Sequence[Load]
    pays_up_to: int
    holds: Capacity
    holds_streaming: Capacity

    @property
    def pays(self) -> bool:
        """Whether drafting pays for one device."""
        return self.plans[self.best] >= _WORTH * self.streamed


def conditions_of(scenario: Scenario, *, devices: int, tokens: int) -> Conditions:
    """Return what a device works under while so many write, for drafts of so many tokens."""
    return Conditions(
        acceptance=min(_MOST_ACCEPTANCE, scenario.acceptance),
        token_s=scenario.draft_s,
        beside_s=max(_INSTANT_S, scenario.round_trip_s + 2 * scenario.message_s),
        compute_s=scenario.curve.step_ms(devices, tokens + 1) / 1e3,
        window=scenario.limits.window,
    )


def promised(scenario: Scenario, *, devices: int) -> dict[Plan, float]:
    """Return what each way of drafting promises, by the formula that the devices' pacing has (tokens a second)."""
    lengths = range(1, scenario.limits.max_draft + 1)
    plans = [Plan(tokens, ahead) for ahead in (False, True) for tokens in lengths]
    return {plan: conditions_of(scenario, devices=devices, tokens=plan.tokens).rate(plan) for plan in plans}


def find(
    scenario: Scenario, level: Level, *, share: float, on_progress: Callable[[str], None] = lambda _said: None
) -> Findings:
    """Find out what an edge is good for.

    Args:
        scenario: Its devices and plan are left to this.
        level: The service level.
        share: Of the devices, that must get it.
        on_progress: Told of what is simulated, as a clause.
    """
    plans = promised(scenario, devices=1)
    best = max(plans, key=plans.__getitem__)
    on_progress("devices that choose")
    holds = find_capacity(replace(scenario, plan=auto), level, share=share)
    on_progress("devices that have the edge write")
    holds_streaming = find_capacity(replace(scenario, plan=streaming), level, share=share)
    loads = []
    for devices in _loads(max(holds.devices, holds_streaming.devices, 1)):
        on_progress(f"{devices} devices under each plan")
        loads.append(_load(scenario, devices))
    paying = [load.devices for load in loads if load.drafting >= _WORTH * load.streaming]
    return Findings(
        streamed=1.0 / (scenario.curve.step_ms(1, 1) / 1e3 + scenario.message_s),
        plans=plans,
        best=best,
        loads=loads,
        pays_up_to=max(paying, default=0),
        holds=holds,
        holds_streaming=holds_streaming,
    )


def find_capacity(scenario: Scenario, level: Level, *, share: float) -> Capacity:
    """Return how many devices get a service level, to within some per cent."""
    outcomes: dict[int, Outcome] = {}

    def holds(devices: int) -> bool:
        outcomes[devices] = outcome = simulate(replace(scenario, devices=devices))
        return outcome.at_level(level) >= share * devices

    good, bad = 0, 1
    while bad <= _MOST_DEVICES and holds(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, int(_PRECISION * good)):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return Capacity(good, good <= scenario.curve.most_sessions, outcomes.get(good))


def _loads(most: int) -> list[int]:
    """Return numbers of devices to look at: powers of two to beyond what is held."""
    loads = [1]
    while loads[-1] < most:
        loads.append(2 * loads[-1])
    return loads


def _load(scenario: Scenario, devices: int) -> Load:
    plans = promised(scenario, devices=devices)
    tried = [max((plan for plan in plans if plan.ahead is ahead), key=plans.__getitem__) for ahead in (False, True)]

    def run(plan: PlanOf) -> Outcome:
        return simulate(replace(scenario, devices=devices, plan=plan))

    drafted = {plan: run(drafting(plan.tokens, ahead=plan.ahead)).pace for plan in tried}
    best = max(drafted, key=drafted.__getitem__)
    chosen = run(auto)
    return Load(devices, run(streaming).pace, drafted[best], best, chosen.pace, chosen.busy)

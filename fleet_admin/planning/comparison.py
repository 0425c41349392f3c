"""Comparison of the simulation with the results of the benchmark `capacity`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, Field, ValidationError

from fleet_admin.planning.scenario import Plan, PlanningError, RunTiming, Scenario, auto, drafting, streaming
from fleet_admin.planning.service_level import ServiceLevel
from fleet_admin.planning.simulation import SimulationResult, simulate
from fleet_common.validation import plain_sentence
from fleet_device.pacing.contract import Pacing
from schemas.policy import Mode
from schemas.printable import printable_line

TOLERANCE: Final = 0.15
"""Largest relative deviation of the simulation from the measurement."""

_COUPLED: Final = frozenset({"edge-streaming", "ours-coupled", "ours-ahead", "ours-auto"})
"""Systems in coupled mode."""

_UNDISTURBED: Final = 0.75
_MOST_BYTES: Final = 1 << 24
_FIXED: Final = 4
_RUNS: Final = 3
_LEARNING_S: Final = 10.0

Number = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _Row(BaseModel):
    system: str
    draft: str = ""
    cost: Annotated[int, Field(ge=1, le=1024)] = 1
    devices: Annotated[int, Field(ge=1, le=100_000)]
    rtt_ms: Number = 0.0
    arrivals: str = "at-once"
    tokens_per_s: Number
    clients_at_level: int | None = None
    acceptance: Annotated[float, Field(ge=0, le=1)] | None = None
    draft_token_ms: Number | None = None
    edge_cpu: Number | None = None
    load_bound: bool = False
    text_tokens: Number | None = None


class _Settings(BaseModel):
    seconds: Annotated[float, Field(gt=0, le=3600)] = 3.0
    tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 96
    edge_cores: Annotated[int, Field(ge=1, le=4096)] = 1
    pause_s: Number = 1.0
    draft_length_where_fixed: Annotated[int, Field(ge=1, le=64)] = _FIXED
    settle_s: Number = 1.0
    patience_s: Annotated[float, Field(gt=0, le=3600)] = 8.0


class MeasuredCapacity(BaseModel):
    settings: _Settings = Field(default_factory=_Settings)
    rows: Annotated[list[_Row], Field(min_length=1, max_length=100_000)]

    def have_texts_of(self, tokens: int) -> None:
        self.settings.tokens = tokens
        for row in self.rows:
            row.text_tokens = None


@dataclass(frozen=True, slots=True)
class ComparedRow:
    system: str
    draft: str
    devices: int
    arrivals: str
    measured_tokens_per_s: float  # tokens/s of all devices
    simulated_tokens_per_s: float  # tokens/s of all devices
    measured_at_level: int | None  # devices that got the service level
    simulated_at_level: float  # average over runs
    measured_busy: float | None = None  # measured share of its cores' time that the edge got
    simulated_busy: float = 0.0  # simulated share of the time in which the edge computes
    load_bound: bool = False  # whether the benchmark's devices were at their limit

    @property
    def ratio(self) -> float | None:
        """Return simulated over measured; None where nothing was measured."""
        return self.simulated_tokens_per_s / self.measured_tokens_per_s if self.measured_tokens_per_s else None

    @property
    def within_tolerance(self) -> bool:
        return self.ratio is not None and 1.0 - TOLERANCE <= self.ratio <= 1.0 + TOLERANCE

    @property
    def disturbed(self) -> bool:
        """Return whether the edge had much less of its cores than it would have used."""
        return self.measured_busy is not None and self.measured_busy < _UNDISTURBED * self.simulated_busy


def read_measured(path: Path) -> MeasuredCapacity:
    """Read the JSON of `python -m benchmarks capacity`; raises `PlanningError` if it is unusable."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES)
        return MeasuredCapacity.model_validate_json(data)
    except OSError as error:
        raise PlanningError(
            f"{path} cannot be read: {error.strerror or error}; "
            f"write one with `python -m benchmarks capacity --json {path}`."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        sentence = "it is no JSON" if first["type"] == "json_invalid" else f"{where}: {plain_sentence(first)}"
        raise PlanningError(f"{path} is not what `python -m benchmarks capacity --json` writes: {sentence}.") from error


def compare(
    measured: MeasuredCapacity,
    scenario: Scenario,
    *,
    cost: int,
    level: ServiceLevel,
    on_progress: Callable[[str], None] = lambda _said: None,
) -> list[ComparedRow]:
    """Simulate, in order, the rows of a target cost that the simulation can reproduce.

    Devices that choose keep learning from row to row, as in the benchmark.
    Raises `PlanningError` if there is no such row.
    """
    plans = _plans(measured.settings.draft_length_where_fixed)
    known = [row for row in measured.rows if row.cost == cost and row.system in plans]
    # Batch-invariant requests cost an edge more, so a curve is valid only for its mode.
    mode = scenario.curve.mode
    rows = [row for row in known if not mode or (row.system in _COUPLED) is (mode == Mode.COUPLED.value)]
    if not rows:
        raise PlanningError(
            f"The file has no row of a system that is simulated ({', '.join(plans)}) with a target of cost {cost}"
            f"{f' in the mode {mode} of the curve' if mode else ''}; give another --cost, or another --curve."
        )
    learnt: dict[tuple[str, str], Sequence[Pacing]] = {}
    compared = []
    for row in rows:
        on_progress(f"{row.system} with {row.devices} devices")
        here = _scenario(scenario, measured.settings, row, plans[row.system])
        key = (row.system, row.draft)
        outcomes = _runs(here, learnt.get(key, ()))
        learnt[key] = outcomes[0].pacings
        compared.append(
            ComparedRow(
                system=row.system,
                draft=printable_line(row.draft),
                devices=row.devices,
                arrivals=printable_line(row.arrivals),
                measured_tokens_per_s=row.tokens_per_s,
                simulated_tokens_per_s=sum(each.tokens_per_s for each in outcomes) / len(outcomes),
                measured_at_level=row.clients_at_level,
                simulated_at_level=sum(each.at_level(level) for each in outcomes) / len(outcomes),
                measured_busy=None if row.edge_cpu is None else row.edge_cpu / measured.settings.edge_cores,
                simulated_busy=sum(each.busy for each in outcomes) / len(outcomes),
                load_bound=row.load_bound,
            )
        )
    return compared


def _plans(fixed: int) -> Mapping[str, Plan]:
    return {
        "edge-streaming": streaming,
        "edge-streaming-residual": streaming,
        "dssd-dense": drafting(fixed),
        "ours-residual": drafting(fixed),
        "ours-coupled": drafting(fixed),
        "ours-ahead": drafting(fixed, ahead=True),
        "ours-auto": auto,
    }


def _scenario(scenario: Scenario, settings: _Settings, row: _Row, plan: Plan) -> Scenario:
    return replace(
        scenario,
        devices=row.devices,
        plan=plan,
        draft_s=scenario.draft_s if row.draft_token_ms is None else row.draft_token_ms / 1e3,
        acceptance=scenario.acceptance if row.acceptance is None else row.acceptance,
        round_trip_s=row.rtt_ms / 1e3,
        text_tokens=settings.tokens if not row.text_tokens else max(1, round(row.text_tokens)),
        pause_s=settings.pause_s if row.arrivals == "poisson" else 0.0,
        timing=RunTiming(window_s=settings.seconds, settle_s=settings.settle_s, patience_s=settings.patience_s),
    )


def _runs(scenario: Scenario, learnt: Sequence[Pacing]) -> list[SimulationResult]:
    """Simulate several times, because the measured window is short."""
    if len(learnt) < scenario.devices:
        learning = replace(scenario, timing=replace(scenario.timing, window_s=_LEARNING_S))
        learnt = simulate(learning, pacings=learnt).pacings
    return [simulate(replace(scenario, seed=scenario.seed + run), pacings=learnt) for run in range(_RUNS)]

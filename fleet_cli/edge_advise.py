"""Command `fleet edge advise`: what this edge holds, whether drafting pays here, and what a fleet needs."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from fleet_admin.planning.advice import (
    Assumptions,
    DeviceTraffic,
    DraftFigures,
    EdgeCapacity,
    EdgeFindings,
    FleetNeed,
    Given,
    LoadPoint,
    find,
    find_drafts,
    need_of,
    sources,
    traffic_of,
)
from fleet_admin.planning.comparison import (
    TOLERANCE,
    ComparedRow,
    MeasuredCapacity,
    compare,
    read_measured,
)
from fleet_admin.planning.scenario import EdgeLimits, Scenario, auto
from fleet_admin.planning.service_level import ServiceLevel
from fleet_admin.planning.simulation import simulate
from fleet_cli.errors import ExitCode
from fleet_cli.options import with_settings
from fleet_cli.tables import Column, plain, print_table
from fleet_device.pacing.contract import Plan
from fleet_edge.settings import EdgeSettings
from fleet_edge.step_time import StepCurve, read_curve, write_curve
from fleet_edge.step_time import as_json as curve_json
from schemas.policy import Mode
from schemas.printable import json_text

_LOADS: Final[list[Column[LoadPoint]]] = [
    Column("devices writing", lambda load: load.devices, "count", rank=0),
    Column("edge-only, tokens/s each", lambda load: load.streaming, "figure", rank=0),
    Column("drafting, tokens/s each", lambda load: load.drafting, "figure", rank=0),
    Column("drafting so", lambda load: plan_name(load.plan), rank=1),
    Column("devices choose, tokens/s each", lambda load: load.chosen, "figure", rank=0),
    Column("edge busy", lambda load: load.busy, "percent", rank=1),
]

_NEEDS: Final[list[Column[FleetNeed]]] = [
    Column("devices", lambda need: need.devices, "count", rank=0),
    Column("writing at once", lambda need: need.writing, "count", rank=1),
    Column("edges", lambda need: need.edges, "count", rank=0),
    Column("brokers", lambda need: need.brokers, "count", rank=0),
    Column("messages/s", lambda need: need.messages_per_s, "count", rank=1),
    Column("bytes per second", lambda need: need.bytes_per_s, "bytes", rank=1),
    Column("database rows/s", lambda need: need.rows_per_s, "figure", rank=1),
    Column("updates/s", lambda need: need.updates_per_s, "figure", rank=2),
]

_COMPARED: Final[list[Column[ComparedRow]]] = [
    Column("system", lambda row: row.system, rank=0),
    Column("draft", lambda row: row.draft or "-", "state", rank=0),
    Column("devices", lambda row: row.devices, "count", rank=0),
    Column("arrivals", lambda row: row.arrivals, rank=1),
    Column("measured, tokens/s", lambda row: row.measured_tokens_per_s, "figure", rank=1),
    Column("simulated, tokens/s", lambda row: row.simulated_tokens_per_s, "figure", rank=1),
    Column("ratio", lambda row: row.ratio, "ratio", rank=0),
    Column(f"within {TOLERANCE:.0%}", lambda row: row.within_tolerance, "state", rank=1),
    Column("edge busy, measured", lambda row: row.measured_busy, "ratio", rank=2),
    Column("edge busy, simulated", lambda row: row.simulated_busy, "ratio", rank=2),
    Column("at level", lambda row: row.measured_at_level, rank=2),
    Column("simulated at level", lambda row: row.simulated_at_level, rank=2),
]


def plan_name(plan: Plan) -> str:
    return f"{plan.tokens} a draft{', ahead' if plan.ahead else ''}"


def show_curve(curve: StepCurve) -> None:
    about = ", ".join(part for part in (curve.target, curve.engine, curve.runs_on, curve.machine) if part)
    sizes = sorted({int(tokens) for row in curve.rows.values() for tokens, _ in row})
    columns: list[Column[tuple[int, dict[int, float]]]] = [
        Column("sessions", lambda row: row[0], "count", rank=0),
        *(Column(f"{size} token{'s' if size > 1 else ''}", _time_of(size), "ms") for size in sizes),
    ]
    rows = [(sessions, {int(tokens): ms for tokens, ms in row}) for sessions, row in curve.rows.items()]
    if about:
        print(f"{about}:")
    print_table("Time of a step", columns, rows)


def _time_of(tokens: int) -> Callable[[tuple[int, dict[int, float]]], float | None]:
    return lambda row: row[1].get(tokens)


def show_findings(found: EdgeFindings, drafts: DraftFigures, level: ServiceLevel) -> None:
    print(
        f"A draft token takes {drafts.draft_ms:.1f} ms ({drafts.sources['draft_ms']}), {drafts.acceptance:.0%} are "
        f"accepted ({drafts.sources['acceptance']}), the round trip is {drafts.round_trip_ms:.0f} ms "
        f"({drafts.sources['round_trip_ms']})."
    )
    print(f"\n{verdict(found)}\n")
    print_table("What each device gets, by how many write at once", _LOADS, found.loads)
    print(f"{load_sentence(found)}\n")
    print(
        f"At a service level of {level.tokens_per_s:g} tokens/s each, 95 % of the waits between tokens within "
        f"{level.gap_s * 1e3:.0f} ms, this edge holds {_held(found.holds)} that write at once and choose how, and "
        f"{_held(found.holds_streaming)} with edge-only decoding.\n"
    )


def verdict(found: EdgeFindings) -> str:
    best = found.plans[found.best]
    ratio = best / found.streamed
    says = (
        f"{plan_name(found.best)}: {best:.1f} tokens/s, {ratio:.2f} times the {found.streamed:.1f} tokens/s of "
        "edge-only decoding"
    )
    if found.pays:
        return f"Drafting pays here for one device, best with {says}."
    return f"Drafting does not pay here for one device: it is best with {says}. Have the edge write (stream)."


def load_sentence(found: EdgeFindings) -> str:
    last = found.loads[-1].devices
    if not found.pays_up_to:
        return "Drafting pays at none of these loads: a model on the device gains nothing over what the edge writes."
    if found.pays_up_to >= last:
        return f"Drafting pays at all of these loads, up to {last} devices that write at once."
    beyond = next(load.devices for load in found.loads if load.devices > found.pays_up_to)
    return f"Drafting pays with up to {found.pays_up_to} devices that write at once, and no more with {beyond}."


def show_fleet(needs: Sequence[FleetNeed], sources: Sequence[tuple[str, str]]) -> None:
    if not needs:
        print("This edge holds no device at that service level: take a faster one, a smaller target, or a lower level.")
        return
    print_table("What a fleet of such edges needs", _NEEDS, needs)
    for name, source in sources:
        print(f"  {name}: {source}.")


def show_against(compared: Sequence[ComparedRow]) -> None:
    print_table("Simulated and measured", _COMPARED, compared)
    beyond = [each for each in compared if not each.within_tolerance]
    if beyond:
        print(f"{len(beyond)} of {len(compared)} rows are beyond {TOLERANCE:.0%}: {_named(beyond)}.")
    else:
        print(f"All {len(compared)} rows are within {TOLERANCE:.0%}.")
    if bound := [each for each in compared if each.load_bound]:
        print(
            f"The benchmark's own devices were at their limit, so that the edge might have done more: {_named(bound)}."
        )
    if disturbed := [each for each in compared if each.disturbed]:
        print(
            f"The edge had much less of its cores than it would have used, so that the machine had other work: "
            f"{_named(disturbed)}. Measure again on a machine that is quiet."
        )


def _named(rows: Sequence[ComparedRow]) -> str:
    return ", ".join(
        " ".join(part for part in (each.system, each.draft, f"with {each.devices} ({each.arrivals})") if part)
        for each in rows
    )


def _advice_json(
    curve: StepCurve,
    drafts: DraftFigures,
    found: EdgeFindings,
    traffic: DeviceTraffic | None,
    needs: Sequence[FleetNeed],
    sources: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    return {
        "curve": curve_json(curve),
        "drafts": plain(drafts) | {"sources": dict(drafts.sources)},  # type: ignore[operator]
        "one_device": {
            "pays": found.pays,
            "streaming_tokens_per_s": found.streamed,
            "best": _plan(found.best) | {"tokens_per_s": found.plans[found.best]},
            "plans": [_plan(plan) | {"tokens_per_s": rate} for plan, rate in found.plans.items()],
            "says": verdict(found),
        },
        "loads": [
            {
                "devices": load.devices,
                "streaming_tokens_per_s": load.streaming,
                "drafting_tokens_per_s": load.drafting,
                "drafting": _plan(load.plan),
                "chosen_tokens_per_s": load.chosen,
                "busy": load.busy,
            }
            for load in found.loads
        ],
        "pays_up_to_devices": found.pays_up_to,
        "says": load_sentence(found),
        "holds": {"chosen": _capacity(found.holds), "streaming": _capacity(found.holds_streaming)},
        "traffic_of_a_device": plain(traffic),
        "fleets": plain(list(needs)),
        "sources": dict(sources),
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {"tokens": plan.tokens, "ahead": plan.ahead}


def _held(capacity: EdgeCapacity) -> str:
    devices = f"{capacity.devices} device{'' if capacity.devices == 1 else 's'}"
    return devices if capacity.measured else f"{devices} (beyond the measured curve, so extrapolated)"


def _capacity(capacity: EdgeCapacity) -> dict[str, Any]:
    outcome = capacity.outcome
    return {
        "devices": capacity.devices,
        "within_what_was_measured": capacity.measured,
        "tokens_per_s": None if outcome is None else outcome.tokens_per_s,
        "gap_p95_ms": None if outcome is None or outcome.gap_s is None else 1e3 * outcome.gap_s,
        "first_token_ms": None if outcome is None else 1e3 * outcome.first_s,
    }


_FLAGS: Final = (
    "target", "engine", "dtype", "torch_device", "threads", "gpu_layers", "batch_invariant", "context",
    "kv_bytes", "db",
)  # fmt: skip

_TEXT: Final = 128
_FLEETS: Final = (1_000, 100_000, 1_000_000)


@with_settings(EdgeSettings, only=_FLAGS)
def advise_command(
    settings: EdgeSettings,
    *,
    curve: Annotated[
        Path | None,
        typer.Option(help="File with a step-time curve of this or another machine; by default it is measured."),
    ] = None,
    save_curve: Annotated[Path | None, typer.Option(help="File to write the curve to.")] = None,
    curve_s: Annotated[
        float, typer.Option(min=1.0, max=36_000.0, help="Time limit for measuring the curve (seconds).")
    ] = 120.0,
    draft_ms: Annotated[
        float | None, typer.Option(help="Time of a draft token on a device (ms); by default from the session log.")
    ] = None,
    acceptance: Annotated[
        float | None,
        typer.Option(help="Acceptance: share of draft tokens that are accepted; by default from the session log."),
    ] = None,
    rtt_ms: Annotated[
        float | None, typer.Option(help="Round trip between device and edge (ms); by default from the session log.")
    ] = None,
    pair: Annotated[
        Path | None, typer.Option(help="JSON file of fleet models check --measure, for the acceptance.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Verification mode.")] = Mode.RESIDUAL,
    level_tokens: Annotated[float, typer.Option(min=0.01, max=1e6, help="Service level: tokens/s of each device.")] = 8,
    level_gap_ms: Annotated[
        float, typer.Option(min=1.0, max=1e6, help="Service level: 95th percentile of the time between tokens (ms).")
    ] = 250,
    level_share: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Share of the generating devices that must reach the service level."),
    ] = 0.95,
    guess_rate: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Probability that a token of n-gram speculation on the edge is right."),
    ] = 0.0,
    text_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 16, help="Tokens of an output (default 128; with --against those of the file)."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1 << 16, help="Tokens of a prompt.")] = 64,
    message_ms: Annotated[
        float, typer.Option(min=0.0, max=1e3, help="Processing time of the edge for each message (ms).")
    ] = 0.6,
    writing_share: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Share of the devices that generate at the same time (assumed).")
    ] = 0.02,
    headroom: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of an edge's capacity to plan for.")] = 0.8,
    broker_messages: Annotated[
        float, typer.Option(min=1.0, max=1e9, help="Messages per second that a broker forwards (assumed).")
    ] = 10_000,
    broker_connections: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="Connections that a broker holds (assumed).")
    ] = 20_000,
    against: Annotated[
        Path | None, typer.Option(help="Compare the simulation with a JSON file of the benchmark `capacity` instead.")
    ] = None,
    cost: Annotated[
        int, typer.Option(min=1, max=1024, help="With --against: use the rows of targets of this cost.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Say whether drafting pays at this edge, how many devices it holds, and what a fleet needs.

    It measures the time of a step (the edge must not run meanwhile), and simulates edge, network and devices with it.
    Exit code 0; with --against 1 if a row differs from the measurement by more than 15 %.
    """
    level = ServiceLevel(level_tokens, level_gap_ms / 1e3)
    drafts = None
    if against is None:  # first, because the measurement takes minutes
        drafts = find_drafts(Given(draft_ms, acceptance, rtt_ms, pair), db=settings.db, mode=mode)
    else:
        measured = read_measured(against.expanduser())
    console = Console(stderr=True)
    known = _curve(settings, curve, console, mode=mode, limit_s=curve_s)
    if save_curve is not None:
        write_curve(known, save_curve.expanduser())
    scenario = Scenario(
        curve=known,
        devices=1,
        text_tokens=text_tokens or _TEXT,
        prompt_tokens=prompt_tokens,
        guess_rate=guess_rate,
        message_s=message_ms / 1e3,
        limits=_limits(settings),
        seed=seed,
    )
    if drafts is None:
        if text_tokens is not None:
            measured.have_texts_of(text_tokens)
        _hold_against(measured, scenario, cost, level, console, json_wanted=as_json)
        return
    scenario = replace(
        scenario, draft_s=drafts.draft_ms / 1e3, acceptance=drafts.acceptance, round_trip_s=drafts.round_trip_ms / 1e3
    )
    assumptions = Assumptions(
        writing=writing_share,
        headroom=headroom,
        broker_messages=broker_messages,
        broker_connections=broker_connections,
        trace_share=settings.trace_share,
        mode=mode,
    )
    _advise(scenario, drafts, level, assumptions, console, share=level_share, json_wanted=as_json)


def _curve(settings: EdgeSettings, path: Path | None, console: Console, *, mode: Mode, limit_s: float) -> StepCurve:
    if path is not None:
        return read_curve(path.expanduser())
    from fleet_edge.step_time import CurveMeasurement
    from fleet_edge.verifiers.registry import check_verifier, load_verifier

    check_verifier(settings)
    with console.status(f"Loading {settings.target} …") as status:
        verifier = load_verifier(settings)
        measurement = CurveMeasurement(
            mode=mode, limit_s=limit_s, on_progress=lambda said: status.update(f"Measuring {said} …")
        )
        return measurement.measure(verifier, engine=settings.engine)


def _limits(settings: EdgeSettings) -> EdgeLimits:
    return EdgeLimits(**{field.name: getattr(settings, field.name) for field in fields(EdgeLimits)})


def _hold_against(
    measured: MeasuredCapacity,
    scenario: Scenario,
    cost: int,
    level: ServiceLevel,
    console: Console,
    *,
    json_wanted: bool,
) -> None:
    with console.status("Simulating …") as status:
        compared = compare(
            measured, scenario, cost=cost, level=level, on_progress=lambda said: status.update(f"Simulating {said} …")
        )
    if json_wanted:
        print(json_text({"rows": plain(compared)}, indent=2))
    else:
        show_against(compared)
    if not all(each.within_tolerance for each in compared):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _advise(
    scenario: Scenario,
    drafts: DraftFigures,
    level: ServiceLevel,
    assumptions: Assumptions,
    console: Console,
    *,
    share: float,
    json_wanted: bool,
) -> None:
    if not json_wanted:
        show_curve(scenario.curve)
    with console.status("Simulating …") as status:
        found = find(scenario, level, share=share, on_progress=lambda said: status.update(f"Simulating {said} …"))
        per_edge = found.holds.devices
        traffic = None
        needs: list[FleetNeed] = []
        said: Sequence[tuple[str, str]] = ()
        if per_edge:
            planned = max(1, int(per_edge * assumptions.headroom))
            traffic = traffic_of(simulate(replace(scenario, devices=planned, plan=auto)), assumptions)
            needs = [
                need_of(devices, per_edge=per_edge, traffic=traffic, assumptions=assumptions) for devices in _FLEETS
            ]
            said = sources(assumptions, per_edge=per_edge)
    if json_wanted:
        print(json_text(_advice_json(scenario.curve, drafts, found, traffic, needs, said), indent=2))
        return
    show_findings(found, drafts, level)
    show_fleet(needs, said)

"""Command `fleet edge advise`: how many devices this edge serves, and whether drafting pays."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from fleet_admin.advice import (
    COSTS,
    DraftFigures,
    EdgeFindings,
    Given,
    LoadPoint,
    Rate,
    ServiceLevel,
    Workload,
    find,
    find_drafts,
)
from fleet_cli.options import with_settings
from fleet_cli.tables import Column, plain, print_table
from fleet_device.pacing.contract import Plan
from fleet_edge.settings import EdgeSettings
from fleet_edge.step_curve import StepCurve, as_json as curve_json, read_curve, write_curve
from schemas.policy import Mode
from schemas.printable import json_text


def _gain_of(cost: int) -> Callable[[LoadPoint], float]:
    return lambda load: load.gains[cost]


_LOADS: Final[list[Column[LoadPoint]]] = [
    Column("devices generating", lambda load: load.devices, "count", rank=0),
    Column("edge-only, tokens/s each", lambda load: load.edge_only.tokens_per_s, "figure", rank=0),
    Column("drafting, tokens/s each", lambda load: load.drafting.tokens_per_s, "figure", rank=0),
    Column("best drafts", lambda load: plan_name(load.drafting.plan), rank=1),
    *(
        Column("gain" if cost == 1 else f"gain, target x{cost}", _gain_of(cost), "ratio", rank=0 if cost == 1 else 1)
        for cost in COSTS
    ),
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


def show_findings(workload: Workload, found: EdgeFindings, drafts: DraftFigures, level: ServiceLevel) -> None:
    print(
        f"A draft token takes {drafts.draft_ms:.1f} ms ({drafts.sources['draft_ms']}), {drafts.acceptance:.0%} are "
        f"accepted ({drafts.sources['acceptance']}), the round trip is {drafts.round_trip_ms:.0f} ms "
        f"({drafts.sources['round_trip_ms']})."
    )
    print(f"{balance_sentence(workload.curve.balance())}\n")
    print(f"{verdict(found)}\n")
    print_table("What each device gets, and gain of drafting over edge-only by the target's cost", _LOADS, found.loads)
    print(f"{load_sentence(found)}\n")
    print(
        f"At a service level of {level.tokens_per_s:g} tokens/s each, 95 % of the waits between tokens within "
        f"{level.gap_s * 1e3:.0f} ms, this edge serves {_devices(workload, found.holds)} that generate at once and "
        f"choose how, and {_devices(workload, found.holds_edge_only)} with edge-only decoding.\n"
    )


def balance_sentence(tokens: int) -> str:
    return f"Up to {tokens} tokens of one request take at most twice as long as one: more draft tokens cost time."


def verdict(found: EdgeFindings) -> str:
    first = found.loads[0]
    says = (
        f"{plan_name(first.drafting.plan)}: {first.drafting.tokens_per_s:.1f} tokens/s, {first.gains[1]:.2f} times the "
        f"{first.edge_only.tokens_per_s:.1f} tokens/s of edge-only decoding"
    )
    if first.pays:
        return f"Drafting pays here for one device, best with {says}."
    return f"Drafting does not pay here for one device: it is best with {says}. Set `edge_only = true` on the device."


def load_sentence(found: EdgeFindings) -> str:
    if not found.pays_with:
        return "Drafting pays at none of these loads: edge-only decoding is as fast without a model on the device."
    if len(found.pays_with) == len(found.loads):
        return f"Drafting pays at all of these loads, up to {found.loads[-1].devices} devices that generate at once."
    return (
        f"Drafting pays with {', '.join(map(str, found.pays_with))} devices that generate at once, not with the others."
    )


def _advice_json(
    workload: Workload,
    drafts: DraftFigures,
    found: EdgeFindings,
) -> dict[str, Any]:
    return {
        "curve": curve_json(workload.curve),
        "balance_tokens": workload.curve.balance(),
        "drafts": plain(drafts) | {"sources": dict(drafts.sources)},  # type: ignore[operator]
        "says": [verdict(found), load_sentence(found)],
        "loads": [
            {
                "devices": load.devices,
                "edge_only": _rate(load.edge_only),
                "drafting": _rate(load.drafting)
                | {"tokens": load.drafting.plan.tokens, "ahead": load.drafting.plan.ahead},
                "gain_by_cost": {str(cost): gain for cost, gain in load.gains.items()},
            }
            for load in found.loads
        ],
        "pays_with_devices": found.pays_with,
        "holds": {
            name: {"devices": devices, "within_what_was_measured": devices <= workload.curve.max_sessions}
            for name, devices in (("chosen", found.holds), ("edge_only", found.holds_edge_only))
        },
    }


def _rate(rate: Rate) -> dict[str, Any]:
    return {"tokens_per_s": rate.tokens_per_s, "gap_p95_ms": 1e3 * rate.gap_s, "busy": rate.busy}


def _devices(workload: Workload, devices: int) -> str:
    said = f"{devices} device{'' if devices == 1 else 's'}"
    return said if devices <= workload.curve.max_sessions else f"{said} (extrapolated beyond the measured curve)"


_FLAGS: Final = (
    "target", "engine", "dtype", "threads", "gpu_layers", "batch_invariant", "context",
    "kv_bytes", "db",
)  # fmt: skip


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
    mode: Annotated[Mode, typer.Option(help="Verification mode.")] = Mode.RESIDUAL,
    level_tokens: Annotated[float, typer.Option(min=0.01, max=1e6, help="Service level: tokens/s of each device.")] = 8,
    level_gap_ms: Annotated[
        float, typer.Option(min=1.0, max=1e6, help="Service level: 95th percentile of the time between tokens (ms).")
    ] = 250,
    text_tokens: Annotated[int, typer.Option(min=1, max=1 << 16, help="Tokens of an output.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1 << 16, help="Tokens of a prompt.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Say whether drafting pays at this edge, and how many devices it serves.

    It measures the time of a step (the edge must not run meanwhile), and computes the rest from it.
    """
    level = ServiceLevel(level_tokens, level_gap_ms / 1e3)
    # Before the curve, because its measurement takes minutes.
    drafts = find_drafts(Given(draft_ms, acceptance, rtt_ms), db=settings.db)
    known = _curve(settings, curve, Console(stderr=True), mode=mode, limit_s=curve_s)
    if save_curve is not None:
        write_curve(known, save_curve.expanduser())
    workload = Workload(
        curve=known,
        draft_s=drafts.draft_ms / 1e3,
        acceptance=drafts.acceptance,
        round_trip_s=drafts.round_trip_ms / 1e3,
        text_tokens=text_tokens,
        prompt_tokens=prompt_tokens,
        max_draft=settings.max_draft,
        window=settings.window,
    )
    found = find(workload, level)
    if as_json:
        print(json_text(_advice_json(workload, drafts, found), indent=2))
        return
    show_curve(known)
    show_findings(workload, found, drafts, level)


def _curve(settings: EdgeSettings, path: Path | None, console: Console, *, mode: Mode, limit_s: float) -> StepCurve:
    if path is not None:
        return read_curve(path.expanduser())
    from fleet_edge.step_curve import CurveMeasurement
    from fleet_edge.verifiers.registry import check_verifier, load_verifier

    check_verifier(settings)
    with console.status(f"Loading {settings.target} …") as status:
        verifier = load_verifier(settings)
        measurement = CurveMeasurement(
            mode=mode, limit_s=limit_s, on_progress=lambda said: status.update(f"Measuring {said} …")
        )
        return measurement.measure(verifier, engine=settings.engine)

"""`fleet edge advise`: what this edge holds, whether drafting pays here, and what a fleet needs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from fleet_cli.edge.advise.drafts import Drafts, Given, find_drafts
from fleet_cli.edge.advise.findings import find
from fleet_cli.edge.advise.fleet import Assumptions, Need, need_of, sources, traffic_of
from fleet_cli.edge.advise.report import as_json as to_json
from fleet_cli.edge.advise.report import show_against, show_curve, show_findings, show_fleet
from fleet_cli.edge.advise.service_level import Level
from fleet_cli.edge.advise.simulation.run import simulate
from fleet_cli.edge.advise.simulation.scenario import EdgeLimits, Scenario, auto
from fleet_cli.errors import ExitCode
from fleet_cli.settings_flags import with_settings
from fleet_edge.settings import EdgeSettings
from fleet_edge.step_time import StepCurve, read_curve, write_curve
from schemas.policy import Mode
from schemas.printable import json_text

if TYPE_CHECKING:
    from fleet_cli.edge.advise.against import Measured

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
        Path | None, typer.Option(help="Step-time curve to read, of this or another machine; else it is measured.")
    ] = None,
    save_curve: Annotated[Path | None, typer.Option(help="Write the curve here.")] = None,
    curve_s: Annotated[
        float, typer.Option(min=1.0, max=36_000.0, help="Longest that measuring the curve takes (seconds).")
    ] = 120.0,
    draft_ms: Annotated[
        float | None, typer.Option(help="Time of a draft token on a device (ms); else from the session log.")
    ] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="Share of draft tokens that is accepted; else from the session log.")
    ] = None,
    rtt_ms: Annotated[
        float | None, typer.Option(help="Round trip between device and edge (ms); else from the session log.")
    ] = None,
    pair: Annotated[
        Path | None, typer.Option(help="Acceptance from what fleet models check --measure --json has written.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Of verification.")] = Mode.RESIDUAL,
    level_tokens: Annotated[float, typer.Option(min=0.01, max=1e6, help="Service level: tokens/s of each device.")] = 8,
    level_gap_ms: Annotated[
        float, typer.Option(min=1.0, max=1e6, help="Service level: most ms between tokens, at the 95th percentile.")
    ] = 250,
    level_share: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the devices that writes that must get it.")
    ] = 0.95,
    guess_rate: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Chance that a token is right which the edge guesses of what it writes by itself."
        ),
    ] = 0.0,
    text_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 16, help="Tokens of a text (default 128; with --against those of the file)."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1 << 16, help="Tokens of a prompt.")] = 64,
    message_ms: Annotated[
        float, typer.Option(min=0.0, max=1e3, help="The edge's own time for each message (ms).")
    ] = 0.6,
    writing_share: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Share of a fleet's devices that writes at once; assumed.")
    ] = 0.02,
    headroom: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of what an edge holds that is planned for.")
    ] = 0.8,
    broker_messages: Annotated[
        float, typer.Option(min=1.0, max=1e9, help="Messages that a broker passes on in a second; assumed.")
    ] = 10_000,
    broker_connections: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="Connections that a broker holds; assumed.")
    ] = 20_000,
    against: Annotated[
        Path | None,
        typer.Option(help="Instead: compare the simulation with a JSON file of the benchmark `capacity`."),
    ] = None,
    cost: Annotated[int, typer.Option(min=1, max=1024, help="With --against: the rows of targets of this cost.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulation.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Say whether drafting pays at this edge, how many devices it holds, and how many of what a fleet needs.

    It measures how long a step takes (the edge must not run meanwhile), and simulates edge, line and devices with it.
    Exit code 0; with --against 1 if a row is further from the measurement than 15 %.
    """
    level = Level(level_tokens, level_gap_ms / 1e3)
    drafts = None
    if against is None:  # first, so that nobody waits for a measurement that is of no use
        drafts = find_drafts(Given(draft_ms, acceptance, rtt_ms, pair), db=settings.db, mode=mode)
    else:
        from fleet_cli.edge.advise.against import read_measured

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
        scenario,
        draft_s=drafts.draft_ms / 1e3,
        acceptance=drafts.acceptance,
        round_trip_s=drafts.round_trip_ms / 1e3,
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
    return EdgeLimits(
        step_tokens=settings.step_tokens,
        prefill_chunk=settings.prefill_chunk,
        gather_share=settings.gather_share,
        piece_s=settings.piece_s,
        max_draft=settings.max_draft,
        max_guess=settings.max_guess,
        window=settings.window,
    )


def _hold_against(
    measured: "Measured", scenario: Scenario, cost: int, level: Level, console: Console, *, json_wanted: bool
) -> None:
    from fleet_cli.edge.advise.against import as_json as rows_json
    from fleet_cli.edge.advise.against import compare

    with console.status("Simulating …") as status:
        compared = compare(
            measured,
            scenario,
            cost=cost,
            level=level,
            on_progress=lambda said: status.update(f"Simulating {said} …"),
        )
    if json_wanted:
        print(json_text({"rows": rows_json(compared)}, indent=2))
    else:
        show_against(compared)
    if not all(each.within for each in compared):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _advise(
    scenario: Scenario,
    drafts: Drafts,
    level: Level,
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
        needs: list[Need] = []
        said: Sequence[tuple[str, str]] = ()
        if per_edge:
            planned = max(1, int(per_edge * assumptions.headroom))
            traffic = traffic_of(simulate(replace(scenario, devices=planned, plan=auto)), assumptions)
            needs = [
                need_of(devices, per_edge=per_edge, traffic=traffic, assumptions=assumptions) for devices in _FLEETS
            ]
            said = sources(assumptions, per_edge=per_edge)
    if json_wanted:
        print(json_text(to_json(scenario.curve, drafts, found, traffic, needs, said), indent=2))
        return
    show_findings(found, drafts, level)
    show_fleet(needs, said)

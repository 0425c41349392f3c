"""Report of what was found, in words and numbers, or as JSON."""

from collections.abc import Sequence
from typing import Any, Final

from fleet_cli.edge.advise.against import TOLERANCE, Compared
from fleet_cli.edge.advise.drafts import Drafts
from fleet_cli.edge.advise.findings import Capacity, Findings, Load
from fleet_cli.edge.advise.fleet import Need, Traffic
from fleet_cli.edge.advise.service_level import Level
from fleet_cli.tables import Column, plain, print_table
from fleet_device.pacing.contract import Plan
from fleet_edge.step_time import StepCurve
from fleet_edge.step_time import as_json as curve_json

_LOADS: Final[list[Column[Load]]] = [
    Column("devices writing", lambda load: load.devices, "count", rank=0),
    Column("edge-only, tokens/s each", lambda load: load.streaming, "figure", rank=0),
    Column("drafting, tokens/s each", lambda load: load.drafting, "figure", rank=0),
    Column("drafting so", lambda load: plan_name(load.plan), rank=1),
    Column("devices choose, tokens/s each", lambda load: load.chosen, "figure", rank=0),
    Column("edge busy", lambda load: load.busy, "percent", rank=1),
]

_NEEDS: Final[list[Column[Need]]] = [
    Column("devices", lambda need: need.devices, "count", rank=0),
    Column("writing at once", lambda need: need.writing, "count", rank=1),
    Column("edges", lambda need: need.edges, "count", rank=0),
    Column("brokers", lambda need: need.brokers, "count", rank=0),
    Column("messages/s", lambda need: need.messages_per_s, "count", rank=1),
    Column("bytes per second", lambda need: need.bytes_per_s, "bytes", rank=1),
    Column("database rows/s", lambda need: need.rows_per_s, "figure", rank=1),
    Column("updates/s", lambda need: need.updates_per_s, "figure", rank=2),
]

_COMPARED: Final[list[Column[Compared]]] = [
    Column("system", lambda row: row.system, rank=0),
    Column("draft", lambda row: row.draft or "-", "state", rank=0),
    Column("devices", lambda row: row.devices, "count", rank=0),
    Column("arrivals", lambda row: row.arrivals, rank=1),
    Column("measured, tokens/s", lambda row: row.measured, "figure", rank=1),
    Column("simulated, tokens/s", lambda row: row.simulated, "figure", rank=1),
    Column("ratio", lambda row: row.ratio, "ratio", rank=0),
    Column(f"within {TOLERANCE:.0%}", lambda row: row.within, "state", rank=1),
    Column("edge busy, measured", lambda row: row.busy, "ratio", rank=2),
    Column("edge busy, simulated", lambda row: row.simulated_busy, "ratio", rank=2),
    Column("at level", lambda row: row.at_level, rank=2),
    Column("simulated at level", lambda row: row.simulated_at_level, rank=2),
]


def plan_name(plan: Plan) -> str:
    """Return a way of drafting in words."""
    return f"{plan.tokens} a draft{', ahead' if plan.ahead else ''}"


def show_curve(curve: StepCurve) -> None:
    """Print how long a step takes."""
    about = ", ".join(part for part in (curve.target, curve.engine, curve.runs_on, curve.machine) if part)
    sizes = sorted({int(tokens) for row in curve.rows.values() for tokens, _ in row})
    columns: list[Column[tuple[int, dict[int, float]]]] = [
        Column("sessions", lambda row: row[0], "count", rank=0),
        *(
            Column(
                f"{size} token{'s' if size > 1 else ''}",
                lambda row, size=size: row[1].get(size),  # type: ignore[misc]
                "ms",
            )
            for size in sizes
        ),
    ]
    rows = [(sessions, {int(tokens): ms for tokens, ms in row}) for sessions, row in curve.rows.items()]
    if about:
        print(f"{about}:")
    print_table("Time of a step", columns, rows)


def show_findings(found: Findings, drafts: Drafts, level: Level) -> None:
    """Print whether drafting pays, up to which load, and how many devices the edge holds."""
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
        f"{_held(found.holds_streaming)} where it writes all by itself.\n"
    )


def verdict(found: Findings) -> str:
    """Say whether drafting pays for one device."""
    best = found.plans[found.best]
    ratio = best / found.streamed
    says = (
        f"{plan_name(found.best)}: {best:.1f} tokens/s, {ratio:.2f} times the {found.streamed:.1f} tokens/s that the "
        "edge writes by itself"
    )
    if found.pays:
        return f"Drafting pays here for one device, best with {says}."
    return f"Drafting does not pay here for one device: it is best with {says}. Have the edge write (stream)."


def load_sentence(found: Findings) -> str:
    """Say at which load drafting stops paying."""
    last = found.loads[-1].devices
    if not found.pays_up_to:
        return "Drafting pays at none of these loads: a model on the device gains nothing over what the edge writes."
    if found.pays_up_to >= last:
        return f"Drafting pays at all of these loads, up to {last} devices that write at once."
    beyond = next(load.devices for load in found.loads if load.devices > found.pays_up_to)
    return f"Drafting pays with up to {found.pays_up_to} devices that write at once, and no more with {beyond}."


def show_fleet(needs: Sequence[Need], sources: Sequence[tuple[str, str]]) -> None:
    if not needs:
        print("This edge holds no device at that service level: take a faster one, a smaller target, or a lower level.")
        return
    print_table("What a fleet of such edges needs", _NEEDS, needs)
    for name, source in sources:
        print(f"  {name}: {source}.")


def show_against(compared: Sequence[Compared]) -> None:
    """Print the simulation beside what was measured."""
    print_table("Simulated beside measured", _COMPARED, compared)
    beyond = [each for each in compared if not each.within]
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


def _named(rows: Sequence[Compared]) -> str:
    return ", ".join(
        " ".join(part for part in (each.system, each.draft, f"with {each.devices} ({each.arrivals})") if part)
        for each in rows
    )


def as_json(
    curve: StepCurve,
    drafts: Drafts,
    found: Findings,
    traffic: Traffic | None,
    needs: Sequence[Need],
    sources: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return what was found as JSON values."""
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


def _held(capacity: Capacity) -> str:
    devices = f"{capacity.devices} device{'' if capacity.devices == 1 else 's'}"
    return devices if capacity.measured else f"{devices} (more than was measured of it, so reckoned)"


def _capacity(capacity: Capacity) -> dict[str, Any]:
    outcome = capacity.outcome
    return {
        "devices": capacity.devices,
        "within_what_was_measured": capacity.measured,
        "tokens_per_s": None if outcome is None else outcome.tokens_per_s,
        "gap_p95_ms": None if outcome is None or outcome.gap_s is None else 1e3 * outcome.gap_s,
        "first_token_ms": None if outcome is None else 1e3 * outcome.first_s,
    }

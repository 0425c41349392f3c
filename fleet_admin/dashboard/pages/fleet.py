"""Pages of the fleet now: overview, devices, actions on them, edges."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from operator import attrgetter
from typing import Any, Final
from urllib.parse import quote, urlencode

from starlette.responses import Response

from fleet_admin.columns import Column, Kind
from fleet_admin.dashboard.acts import ACTS, MOST_DEVICES, act_of
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.gate import Values, parse_values
from fleet_admin.dashboard.grid import RANGES, Grid, GridView, range_of, series
from fleet_admin.dashboard.rendering import csv_response
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.dashboard.visit import Page, Visit, action
from fleet_admin.reports import days_left, device_columns, edge_columns
from fleet_edge.counters import share
from fleet_edge.store.views import DeviceView, EdgeView, MachineState, UsageView
from schemas.errors import InvalidName
from schemas.names import check_name

_HOURLY: Final = timedelta(days=3)
"""Longest range that is drawn by hour."""

_MONTHS: Final = timedelta(days=100)
_SECONDS: Final[Mapping[str, float]] = {"hour": 3_600.0, "day": 86_400.0, "month": 30.4 * 86_400.0}
_ALERTS: Final = 8
_LEAST: Final = timedelta(hours=6)
"""Shortest range that is drawn: a single hour is a point."""


def show_overview(visit: Visit) -> Response:
    name, length = range_of(visit.query("range"))
    log = visit.services.log
    total = log.stats(since=length)["all"]
    latencies = log.latencies(since=length)
    edges = log.edges()
    alerts = visit.services.alerts.open(limit=200)
    drawn = max(length, _LEAST)
    grain = "hour" if length <= _HOURLY else "day" if length <= _MONTHS else "month"
    return visit.page(
        "overview.html",
        title="Overview",
        ranges=RANGES,
        range=name,
        states=Counter(each.state.value for each in log.devices(counted=False)),
        edges=Counter(each.state.value for each in edges),
        now=_load(each for each in edges if each.state in (MachineState.ONLINE, MachineState.DRAINING)),
        total=total,
        tokens_per_s=total.tokens / length.total_seconds(),
        latencies=latencies,
        alerts=alerts[:_ALERTS],
        alerts_open=len(alerts),
        critical=sum(each.severity == "critical" for each in alerts),
        by_draft=list(log.stats(since=length, by="draft").items())[:10],
        by_edge=list(log.stats(since=length, by="edge").items())[:10],
        charts=_charts(log.usage(since=drawn, grain=grain), between=(visit.now - drawn, visit.now), grain=grain),
    )


def _charts(
    points: Sequence[UsageView], *, between: tuple[datetime, datetime], grain: str
) -> list[tuple[str, dict[str, Any]]]:
    def drawn(lines: Mapping[str, Callable[[UsageView], float | None]], unit: str, kind: Kind) -> dict[str, Any]:
        return series(points, _start, list(lines.items()), unit=f"{unit}, by the {grain}", kind=kind, between=between)

    def tokens_per_s(each: UsageView) -> float | None:
        # The first and the last period are not complete.
        lasted = min(_SECONDS[grain], (between[1] - max(_start(each), between[0])).total_seconds())
        return share(each.counted.tokens, lasted)

    waits: dict[str, Callable[[UsageView], float | None]] = {
        "queue": lambda each: each.counted.queue_ms_per_round,
        "step": lambda each: each.counted.compute_ms_per_round,
    }
    return [
        ("Tokens", drawn({"tokens": tokens_per_s}, "a second", "figure")),
        ("Acceptance", drawn({"acceptance": lambda each: each.counted.acceptance}, "%", "percent")),
        ("Waits", drawn(waits, "ms, the mean of a round", "figure")),
        ("Batch", drawn({"sessions": lambda each: each.counted.mean_batch}, "sessions a step", "figure")),
    ]


def _load(edges: Iterable[EdgeView]) -> dict[str, float | None]:
    """Return the current load of edges: sums, and the worst of what cannot be added up."""
    found = list(edges)

    def most(values: Iterable[float | None]) -> float | None:
        return max((each for each in values if each is not None), default=None)

    def summed(values: Iterable[float | None]) -> float | None:
        known = [each for each in values if each is not None]
        return sum(known) if known else None

    return {
        "tokens_per_s": summed(each.tokens_per_s for each in found),
        "open_sessions": summed(each.open_sessions for each in found),
        "queue_ms": most(each.queue_ms for each in found),
        "batch": most(each.batch_sessions for each in found),
        "kv_usage": most(each.kv_usage for each in found),
    }


def _start(each: UsageView) -> datetime:
    assert each.start is not None  # a grain was asked for
    return each.start


def show_devices(visit: Visit) -> Response:
    view = _device_grid(visit, visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("devices", view.headings, view.lines())
    return visit.page("devices.html", title="Devices", view=view, acts=ACTS)


def _device_grid(visit: Visit, query: Values) -> GridView[DeviceView]:
    log = visit.services.log
    wanted = {each.name: each.wanted for each in log.releases() if each.kind == "device"}
    rolled_out: Column[DeviceView] = Column(
        "wanted", lambda row: wanted.get(row.device), rank=2, meaning="The release that was last rolled out to it."
    )
    grid = Grid([*device_columns(visit.now), rolled_out], sort="device", links={"device": _address})
    return grid.view(log.devices(), query)


def _address(row: DeviceView) -> str:
    return f"/devices/{quote(row.device, safe='')}"


_DEVICE_HOURS: Final = 72
_SESSIONS: Final = 20
_EVENTS: Final = 30
_COMMANDS: Final = 15


def show_device(visit: Visit) -> Response:
    log, name = visit.services.log, visit.path("device")
    device = log.device(name)
    fence = next((each for each in log.fences() if each.device == name), None)
    begin = visit.now - timedelta(hours=_DEVICE_HOURS)
    hours = [each for each in log.hours(name, limit=_DEVICE_HOURS) if each.hour >= begin]
    drawn = partial(series, hours, attrgetter("hour"), between=(begin, visit.now))
    steering = visit.services.steering
    wanted = next((each for each in log.releases() if each.kind == "device" and each.name == name), None)
    return visit.page(
        "device.html",
        title=name,
        device=device,
        acts=ACTS,
        fence=fence,
        certificate_days=days_left(device.certificate_until, visit.now),
        wanted=wanted,
        settings=steering.settings_of(name),
        absence=steering.absence,
        commands=steering.log.commands(devices=[name], limit=_COMMANDS),
        sessions=log.sessions(device=name, limit=_SESSIONS),
        events=log.events(device=name, limit=_EVENTS),
        tokens=drawn([("tokens", lambda each: float(each.counted.tokens))], unit="an hour", kind="count"),
        acceptance=drawn([("acceptance", lambda each: each.counted.acceptance)], unit="%", kind="percent"),
    )


_ALL: Final = "filter"


def preview(visit: Visit) -> Response:
    """Show which devices an action concerns, without applying it."""
    act = act_of(visit.form("act"))
    if visit.form("whom") == _ALL:
        query = visit.admission.form.get("query", ("",))[-1]
        if not query.isascii():
            raise Problem(400, "The filter cannot be read; choose the devices again.")
        grid = _device_grid(visit, parse_values(query.encode("ascii"), what="query"))
        devices = sorted(row.device for row in grid.found)
    else:
        devices = _checked(visit.admission.form.get("device", ()))
    if not devices:
        raise Problem(400, "No device is chosen; tick some, or choose all that match the filter.")
    argument = " ".join(visit.form("argument").split())
    if act.required and not argument:
        raise Problem(400, f"{act.words}: say with what ({act.argument}), such as {act.example}.")
    if not act.argument and argument:
        raise Problem(400, f"{act.words} takes no value; leave that field empty.")
    act.check(argument)
    absence = visit.services.steering.absence if act.live else ""
    return visit.page(
        "acting.html", title=act.words, act=act, argument=argument, devices=devices, problem=absence, absence=absence
    )


def act(visit: Visit) -> Response:
    wanted = act_of(visit.form("act"))
    devices = _checked(visit.admission.form.get("devices", ("",))[-1].split(","))
    services, argument, actor = visit.services, visit.form("argument"), visit.actor
    if wanted.live:
        services.steering.reach()
    job = services.jobs.begin(
        f"{wanted.words} {argument}".strip(),
        who=actor.who,
        now=visit.now,
        devices=len(devices),
        steps=lambda: wanted.run(services, devices, argument, actor),
    )
    return visit.redirect(f"/acts/{job.id}")


def show_act(visit: Visit) -> Response:
    job = visit.services.jobs.find(visit.path("job"))
    outcomes = sorted(job.outcomes, key=lambda each: (each.state == "done", each.device))
    return visit.page("acted.html", title=job.words, job=job, outcomes=outcomes)


def _checked(names: Sequence[str]) -> list[str]:
    """Return the device names of a form; raises `Problem` if one is invalid or there are too many."""
    found = sorted({name for name in names if name})
    if len(found) > MOST_DEVICES:
        raise Problem(400, f"At most {MOST_DEVICES:,} devices are acted on at once; choose fewer.")
    try:
        return [check_name(name) for name in found]
    except InvalidName as error:
        raise Problem(400, str(error)) from None


def show_edges(visit: Visit) -> Response:
    log = visit.services.log
    wanted = {each.name: each.wanted for each in log.releases() if each.kind == "edge"}
    rolled_out: Column[EdgeView] = Column(
        "release wanted", lambda row: wanted.get(row.edge), key="wanted", rank=2, meaning="By the latest rollout."
    )
    rows = log.edges()
    grid = Grid([*edge_columns(visit.now), rolled_out], sort="edge", links={"edge": _sessions})
    view = grid.view(rows, visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("edges", view.headings, view.lines())
    serving = [row for row in rows if row.state in (MachineState.ONLINE, MachineState.DRAINING)]
    return visit.page(
        "edges.html",
        title="Edges",
        view=view,
        open_sessions=sum(each.open_sessions or 0 for each in serving),
        free=sum(each.free_sessions or 0 for each in serving if each.state is MachineState.ONLINE),
        tokens_per_s=sum(each.tokens_per_s or 0.0 for each in serving),
        fullest=max((each.kv_usage for each in serving if each.kv_usage is not None), default=None),
        waiting=sum(row.spooled_records or 0 for row in rows),
    )


def _sessions(row: EdgeView) -> str:
    return f"/sessions?{urlencode({'edge': row.edge})}"


PAGES: Final = (
    Page("/", "Overview", show_overview, menu=True),
    Page("/devices", "Devices", show_devices, menu=True),
    Page("/devices/{device}", "Device", show_device),
    action("/devices/act", preview),
    action("/devices/act/do", act),
    Page("/acts/{job}", "Act", show_act, role=AccountRole.OPERATOR),
    Page("/edges", "Edges", show_edges, menu=True),
)

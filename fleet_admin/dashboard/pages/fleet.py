"""Pages of the fleet: overview, devices, actions on them, edges."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, Final

from starlette.datastructures import QueryParams
from starlette.responses import RedirectResponse, Response

from fleet_admin import reports
from fleet_admin.dashboard.acts import ACTS, MAX_DEVICES, act_of
from fleet_admin.dashboard.charts import RANGES, Timeline, sparkline
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.gate import parse_values
from fleet_admin.dashboard.grid import ReportQuery
from fleet_admin.dashboard.rendering import LINKS, CellLink, about, address
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.dashboard.visit import Page, Visit, action
from fleet_admin.diagnosis import diagnose_device, diagnose_edge
from fleet_admin.reports import ACCESS, COMMANDS, UPDATES, device_columns, edge_columns, setting_columns
from fleet_admin.steering.access import AccessFact, access_facts
from fleet_admin.steering.rollout import update_views
from fleet_edge.session_log import (
    CONNECTED,
    DeviceView,
    Distribution,
    Filter,
    Grain,
    LoadView,
    MachineState,
    QuarantineView,
    UsageView,
    floor,
    grouped,
)
from schemas.errors import InvalidName
from schemas.names import check_name, model_name

_CODES: Final = 4
"""Most lines of failures; the rarest codes share the last."""

_MODELS: Final = 4
"""Most draft models whose acceptance is drawn."""

_HOURLY_S: Final = 2 * 86_400.0
_FAILED: Final = ("failed", "lost")


def show_overview(visit: Visit) -> Response:
    log, line = visit.services.log, Timeline.of(visit)
    total = log.usage(since=line.begin)[0].counted
    edges, groups, evaluation = log.edges(), grouped(log.alerts(open=True)), log.evaluation()
    latencies = log.latencies_over_time(line.grain, since=line.begin)
    charts, failures = _charts(visit, line) | _latencies(line, latencies), _failures(visit, line)
    ends = log.ends(since=line.begin)
    return visit.page(
        "overview.html",
        title="Overview",
        ranges=RANGES,
        range=line.range,
        states=Counter(each.state.value for each in log.devices(counted=False)),
        edges=Counter(each.state.value for each in edges),
        now_per_s=sum(each.tokens_per_s or 0.0 for each in edges if each.state in CONNECTED),
        total=total,
        tokens_per_s=total.tokens / line.seconds,
        first_token=Distribution.total(each["first_token"] for each in latencies.values() if "first_token" in each),
        failed=sum(ends.get(reason, 0) for reason in _FAILED),
        groups=groups,
        about=about,
        alerts_open=sum(len(each.alerts) for each in groups),
        critical=sum(each.critical for each in groups),
        evaluation=evaluation,
        by_draft=[
            (model_name(each.draft_model, each.quantization), each.counted)
            for each in log.usage(since=line.begin, by=("draft_model", "quantization"))[:10]
        ],
        by_edge=[(each.edge, each.counted) for each in log.usage(since=line.begin, by=("edge",))[:10]],
        charts={
            "Tokens": charts["Tokens"],
            "Acceptance": _acceptance(visit, line),
            "First token": charts["First token"],
            "Failures and refusals": failures,
            "Inter-token latency": charts["Inter-token latency"],
            "Devices": _connected(visit, line),
            "Active devices": _active(visit, line),
            "Traffic": charts["Traffic"],
            "Round time": charts["Round time"],
        },
        sparks={name: sparkline(each) for name, each in charts.items()},
    )


def _charts(visit: Visit, line: Timeline, *, device: str | None = None, edge: str | None = None) -> dict[str, Any]:
    """Return the charts of the fleet, of a device or of an edge, by name."""
    log = visit.services.log
    rows = {each.start: each for each in log.usage(since=line.begin, grain=line.grain, device=device, edge=edge)}
    drawn = partial(line.chart, rows)
    charts = {
        "Tokens": drawn(
            {"tokens": lambda each: line.per_second(each.start, each.counted.tokens)}, unit="per second", sums=True
        ),
        "Acceptance": drawn({"acceptance": lambda each: each.counted.acceptance}, kind="percent"),
    }
    waits: dict[str, Callable[[UsageView], float | None]] = {
        "step": lambda each: each.counted.compute_ms_per_round,
        "queue": lambda each: each.counted.queue_ms_per_round,
    }
    return charts | {
        "Round time": drawn(waits, unit="ms"),
        "Sessions per step": drawn({"sessions": lambda each: each.counted.mean_batch}),
        "Traffic": drawn(
            {
                "up": lambda each: line.per_second(each.start, each.counted.uplink_bytes),
                "down": lambda each: line.per_second(each.start, each.counted.downlink_bytes),
            },
            unit="B/s",
            kind="bytes",
            sums=True,
        ),
    }


def _latencies(line: Timeline, rows: Mapping[datetime, Mapping[str, Distribution]]) -> dict[str, Any]:
    """Return the charts of latencies, of which no device has its own."""
    return {
        name: line.chart(rows, {"p95": _quantile(measure, 0.95), "p50": _quantile(measure, 0.5)}, unit="ms")
        for name, measure in (("First token", "first_token"), ("Inter-token latency", "gap"))
    }


def _active(visit: Visit, line: Timeline) -> dict[str, Any]:
    """Return the chart of the devices that generated; of a week by day, since each device has a row for each time."""
    if line.grain is Grain.HOUR and line.seconds > _HOURLY_S:
        line = replace(line, grain=Grain.DAY, begin=floor(Grain.DAY, line.begin))
    rows = visit.services.log.active_devices(line.grain, since=line.begin)
    return line.chart(rows, {"devices": float}, kind="count", sums=True)


def _connected(visit: Visit, line: Timeline) -> dict[str, Any]:
    """Return the chart of the devices at the broker, as the edge that knows most of them counts them."""
    rows = visit.services.log.edge_loads(line.grain, since=line.begin)
    lines: dict[str, Callable[[Mapping[str, LoadView]], float | None]] = {
        "connected": lambda edges: max((each.devices_connected or 0.0 for each in edges.values()), default=None),
        "active": lambda edges: max((each.devices_active or 0.0 for each in edges.values()), default=None),
    }
    return line.chart(rows, lines, kind="count")


def _load(visit: Visit, line: Timeline, edge: str) -> dict[str, Any]:
    """Return the charts of an edge's sessions and memory, as it measured them."""
    rows = {
        start: edges[edge]
        for start, edges in visit.services.log.edge_loads(line.grain, since=line.begin, edge=edge).items()
    }
    return {
        "Open sessions": line.chart(rows, {"sessions": lambda each: each.open_sessions}),
        "KV memory use": line.chart(rows, {"use": lambda each: each.kv_usage}, kind="percent"),
        "Process memory": line.chart(rows, {"memory": lambda each: each.memory_bytes}, unit="B", kind="bytes"),
    }


def _quantile(measure: str, share: float) -> Callable[[Mapping[str, Distribution]], float | None]:
    return lambda each: each[measure].quantile(share) if measure in each else None


def _acceptance(visit: Visit, line: Timeline) -> dict[str, Any]:
    """Return the chart of the acceptance of the draft models with the most tokens."""
    rows: dict[datetime | None, dict[str, float | None]] = {}
    tokens = Counter[str]()
    for each in visit.services.log.usage(since=line.begin, grain=line.grain, by=("draft_model", "quantization")):
        name = model_name(each.draft_model, each.quantization) or "unknown"
        rows.setdefault(each.start, {})[name] = each.counted.acceptance
        tokens[name] += each.counted.tokens
    shown = [name for name, _ in tokens.most_common(_MODELS)]
    return line.chart(rows, {name: methodcaller("get", name) for name in shown}, kind="percent")


def _failures(visit: Visit, line: Timeline, *, device: str | None = None, edge: str | None = None) -> dict[str, Any]:
    """Return the chart of failures, refusals and faults by code."""
    rows = visit.services.log.failures(line.grain, since=line.begin, device=device, edge=edge)
    total = Counter[str]()
    for counts in rows.values():
        total.update(counts)
    codes = [code for code, _ in total.most_common(_CODES)]
    lines: dict[str, Callable[[Counter[str]], float]] = {code: itemgetter(code) for code in codes}
    if len(total) > len(codes):
        lines["others"] = lambda row: sum(number for code, number in row.items() if code not in codes)
    return line.chart(rows, lines, kind="count", sums=True)


def show_devices(visit: Visit) -> Response:
    view = _devices(visit, visit.admission.query)
    if (saved := view.csv()) is not None:
        return saved
    steering = visit.services.steering
    updates = [] if steering.absence else update_views(steering.reach().wanted_and_reported())
    return visit.page(
        "devices.html",
        title="Devices",
        view=view,
        links=_DEVICE_LINKS,
        updates=updates,
        update_columns=UPDATES,
        **_acts(visit),
    )


def _acts(visit: Visit) -> dict[str, Any]:
    """Return the acts that are possible now, and why the others are not."""
    absence = visit.services.steering.absence
    return {"acts": [each for each in ACTS if not (each.live and absence)], "absence": absence}


_DEVICE_LINKS: Final[Mapping[str, CellLink[DeviceView]]] = {
    **LINKS,
    "edge": lambda row: address("edges", row.last_edge or ""),
}


def _devices(visit: Visit, query: QueryParams) -> ReportQuery[DeviceView]:
    return ReportQuery(reports.devices(visit.services.log, visit.now), query)


_SESSIONS: Final = 20
_EVENTS: Final = 30
_COMMANDS: Final = 15


def show_device(visit: Visit) -> Response:
    log, name = visit.services.log, visit.path("device")
    device = log.device(name)
    quarantine = next((each for each in log.quarantines() if each.device == name), None)
    line = Timeline.of(visit)
    steering = visit.services.steering
    settings = None if steering.absence else steering.settings_of(name)
    return visit.page(
        "device.html",
        title=name,
        device=device,
        columns=device_columns(visit.now, past=not device.connected)[1:],
        links=_DEVICE_LINKS,
        **_acts(visit),
        diagnosis=diagnose_device(log, name),
        access_columns=ACCESS,
        access=_access_facts(visit, device, quarantine),
        settings=settings,
        setting_columns=settings and setting_columns(settings),
        updates=update_views([settings] if settings else []),
        update_columns=UPDATES,
        command_columns=[each for each in COMMANDS if each.key not in {"device", "id"}],
        commands=steering.log.commands(where=[Filter("device", "=", name)], limit=_COMMANDS),
        sessions=log.sessions(device=name, limit=_SESSIONS),
        events=log.events(device=name, limit=_EVENTS),
        ranges=RANGES,
        range=line.range,
        charts=_charts(visit, line, device=name) | {"Failures and refusals": _failures(visit, line, device=name)},
    )


def _access_facts(visit: Visit, device: DeviceView, quarantine: QuarantineView | None) -> list[AccessFact]:
    steering = visit.services.steering
    found = [] if steering.absence else steering.reach().clients()[0]
    return access_facts(
        steering.log,
        device.device,
        client=next((each for each in found if each.client == device.device), None),
        absence=steering.absence,
        quarantine=quarantine,
        certificate_until=device.certificate_until,
        now=visit.now,
    )


def show_clients(visit: Visit) -> Response:
    absence = visit.services.steering.absence
    found, number = ([], None) if absence else visit.services.steering.reach().clients()
    view = ReportQuery(reports.clients(found, visit.now), visit.admission.query)
    if (saved := view.csv()) is not None:
        return saved
    return visit.page(
        "clients.html",
        title="Clients",
        view=view,
        absence=absence,
        number=number,
        named=sum(each.state == "connected" for each in found),
    )


_ALL: Final = "filter"


def preview(visit: Visit) -> Response:
    """Show which devices an action concerns, without applying it."""
    act = act_of(visit.form("act"))
    if visit.form("whom") == _ALL:
        query = visit.admission.form.get("query", "")
        chosen = _devices(visit, parse_values(query.encode("latin-1", "replace")))
        devices = _checked([row.device for row in chosen.report.rows(chosen.filters()).rows])
    else:
        devices = _checked(visit.admission.form.getlist("device"))
    if not devices:
        raise Problem(400, "No device is chosen; select some, or choose all that match the filter.")
    argument = " ".join(visit.form("argument").split())
    if act.required and not argument:
        raise Problem(400, f"{act.words} needs a value, such as {act.example}.")
    if not act.example and argument:
        raise Problem(400, f"{act.words} takes no value; leave that field empty.")
    act.check(argument)
    absence = visit.services.steering.absence if act.live else ""
    return visit.page(
        "acting.html", title=act.words, act=act, argument=argument, devices=devices, problem=absence, absence=absence
    )


def act(visit: Visit) -> Response:
    wanted = act_of(visit.form("act"))
    devices = _checked(visit.admission.form.get("devices", "").split(","))
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
    return RedirectResponse(f"/acts/{job.id}", 303)


def show_act(visit: Visit) -> Response:
    job = visit.services.jobs.find(visit.path("job"))
    outcomes = sorted(job.outcomes, key=lambda each: (each.state == "done", each.device))
    return visit.page("acted.html", title=job.words, job=job, outcomes=outcomes)


def _checked(names: Sequence[str]) -> list[str]:
    """Return the device names of a form; raises `Problem` if one is invalid or there are too many."""
    found = sorted({name for name in names if name})
    if len(found) > MAX_DEVICES:
        raise Problem(400, f"At most {MAX_DEVICES:,} devices can be chosen at once; choose fewer.")
    try:
        return [check_name(name) for name in found]
    except InvalidName as error:
        raise Problem(400, str(error)) from None


def show_edges(visit: Visit) -> Response:
    view = ReportQuery(reports.edges(visit.services.log, visit.now), visit.admission.query)
    if (saved := view.csv()) is not None:
        return saved
    rows = visit.services.log.edges()
    serving = [row for row in rows if row.state in CONNECTED]
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


def show_edge(visit: Visit) -> Response:
    log, name, line = visit.services.log, visit.path("edge"), Timeline.of(visit)
    return visit.page(
        "edge.html",
        title=name,
        edge=log.edge(name),
        diagnosis=diagnose_edge(log, name),
        columns=edge_columns(visit.now)[1:],
        ranges=RANGES,
        range=line.range,
        charts=_charts(visit, line, edge=name)
        | _latencies(line, log.latencies_over_time(line.grain, since=line.begin, edge=name))
        | _load(visit, line, name)
        | {"Failures and refusals": _failures(visit, line, edge=name)},
        sessions=log.sessions(edge=name, limit=_SESSIONS),
        events=log.events(edge=name, limit=_EVENTS),
    )


PAGES: Final = (
    Page("/", "Overview", show_overview, menu=True),
    Page("/devices", "Devices", show_devices, menu=True),
    Page("/devices/{device}", "Device", show_device),
    action("/devices/act", preview),
    action("/devices/act/do", act),
    Page("/acts/{job}", "Act", show_act, role=AccountRole.OPERATOR),
    Page("/edges", "Edges", show_edges, menu=True),
    Page("/clients", "Clients", show_clients, menu=True),
    Page("/edges/{edge}", "Edge", show_edge),
)

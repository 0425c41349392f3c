"""Pages of what the session log holds: sessions, usage, alerts, the audit log."""

from functools import partial
from typing import Final

from starlette.responses import Response

from fleet_admin import reports
from fleet_admin.dashboard.charts import RANGES, Timeline, range_of
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.grid import ReportQuery
from fleet_admin.dashboard.rendering import about
from fleet_admin.dashboard.visit import Page, Visit
from fleet_admin.reports import edge_seconds
from fleet_admin.usage import DIMENSIONS, HEADINGS, usage_report
from fleet_edge.session_log import grouped


def show_usage(visit: Visit) -> Response:
    """Show usage by a dimension with a chart over time, or return it as CSV, also by time."""
    line = Timeline.of(visit, "30d")
    by = visit.query("by", "app")
    if by not in DIMENSIONS:
        raise Problem(400, f"Usage is grouped by {', '.join(DIMENSIONS)}.")
    log, since = visit.services.log, line.begin
    per = line.grain if visit.query("over") == "time" else None
    view = ReportQuery(usage_report(log, [by], per, now=visit.now), visit.admission.query, since)
    if (saved := view.csv()) is not None:
        return saved
    drawn = partial(line.chart, {each.start: each for each in log.usage(since=since, grain=line.grain)}, sums=True)
    total = log.usage(since=since)
    return visit.page(
        "usage.html",
        title="Usage",
        view=view,
        kinds=[(key, HEADINGS.get(key, key)) for key in DIMENSIONS],
        by=by,
        grain=line.grain,
        ranges=RANGES,
        range=line.range,
        total=total[0].counted if total else None,
        edge_s=edge_seconds(total[0].counted) if total else None,
        charts={
            "Tokens": drawn({"tokens": lambda each: each.counted.tokens}),
            "Traffic": drawn(
                {"up": lambda each: each.counted.uplink_bytes, "down": lambda each: each.counted.downlink_bytes},
                unit="B",
                kind="bytes",
            ),
        },
    )


_MAX_SHOWN: Final = 200  # of one condition


def show_alerts(visit: Visit) -> Response:
    log, query = visit.services.log, visit.admission.query
    if (saved := ReportQuery(reports.alerts(log, visit.now), query).csv()) is not None:
        return saved
    is_open = log.alerts(open=True)
    groups = grouped(is_open)
    return visit.page(
        "alerts.html",
        title="Alerts",
        groups=groups,
        about=about,
        links={"subject": about},
        most=_MAX_SHOWN,
        outdated=log.evaluation().sentence,
        number=len(is_open),
        critical=sum(each.critical for each in groups),
        view=ReportQuery(reports.alerts(log, visit.now, is_open=False), query),
    )


def show_audit(visit: Visit) -> Response:
    name, length = range_of(visit, "30d")
    report = reports.audit(visit.services.steering.log, visit.now)
    view = ReportQuery(report, visit.admission.query, visit.now - length)
    return view.csv() or visit.page("audit.html", title="Audit log", view=view, ranges=RANGES, range=name)


def show_sessions(visit: Visit) -> Response:
    view = ReportQuery(reports.sessions(visit.services.log, visit.now), visit.admission.query)
    return view.csv() or visit.page("sessions.html", title="Sessions", view=view)


PAGES: Final = (
    Page("/sessions", "Sessions", show_sessions, menu=True),
    Page("/usage", "Usage", show_usage, menu=True),
    Page("/alerts", "Alerts", show_alerts, menu=True),
    Page("/audit", "Audit log", show_audit, menu=True),
)

"""Overview: how the fleet is, on one screen."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from starlette.responses import Response

from fleet_admin.columns import Kind
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.ranges import RANGES, range_of
from fleet_admin.dashboard.series import series
from fleet_admin.dashboard.visit import Visit
from fleet_edge.counters import share
from fleet_edge.store.states import MachineState
from fleet_edge.store.views import EdgeView, UsageView

_HOURS: Final = timedelta(days=3)
"""Up to which a range is drawn by the hour."""

_MONTHS: Final = timedelta(days=100)
_SECONDS: Final[Mapping[str, float]] = {"hour": 3_600.0, "day": 86_400.0, "month": 30.4 * 86_400.0}
_ALERTS: Final = 8
_LEAST: Final = timedelta(hours=6)
"""That is drawn: an hour alone is a point."""


def show(visit: Visit) -> Response:
    """Show the figures of a range of time."""
    name, length = range_of(visit.query("range"))
    log = visit.services.log
    total = log.stats(since=length)["all"]
    latencies = log.latencies(since=length)
    edges = log.edges()
    alerts = visit.services.alerts.open(limit=200)
    drawn = max(length, _LEAST)
    grain = "hour" if length <= _HOURS else "day" if length <= _MONTHS else "month"
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
    """Return what is drawn: a name, and its series."""

    def drawn(lines: Mapping[str, Callable[[UsageView], float | None]], unit: str, kind: Kind) -> dict[str, Any]:
        return series(points, _start, list(lines.items()), unit=f"{unit}, by the {grain}", kind=kind, between=between)

    def tokens_per_s(each: UsageView) -> float | None:
        # The first and the last are not whole.
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
    """Return what the edges are doing now: sums, and the worst of what cannot be added up."""
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


PAGES: Final = (Page("/", "Overview", show, menu=True),)

"""Overview: how the fleet is, on one screen."""

from collections import Counter
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.device_states import device_state
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.ranges import RANGES, range_of
from fleet_admin.dashboard.visit import Visit

__all__ = ["PAGES"]


def show(visit: Visit) -> Response:
    """Show the figures of a range of time."""
    name, length = range_of(visit.query("range"))
    log = visit.services.log
    fenced = {each.device for each in log.fences()}
    retired = {name for name, each in visit.services.steering.log.known().items() if each.retired_at is not None}
    states = Counter(
        device_state(each, fenced=each.device in fenced, now=visit.now, retired=each.device in retired)
        for each in log.devices()
    )
    total = log.stats(since=length)["all"]
    return visit.page(
        "overview.html",
        title="Overview",
        ranges=RANGES,
        range=name,
        states=states,
        total=total,
        tokens_per_s=total.tokens / length.total_seconds(),
        by_draft=list(log.stats(since=length, by="draft").items())[:10],
        by_edge=list(log.stats(since=length, by="edge").items())[:10],
    )


PAGES: Final = (Page("/", "Overview", show, menu=True),)

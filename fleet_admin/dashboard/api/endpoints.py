"""Endpoints of the API. One that is added stands here, and so in the OpenAPI document."""

from typing import Final

from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.api.endpoint import Endpoint
from fleet_admin.dashboard.api.parameters import (
    Limited,
    WhichEvents,
    WhichOfDevice,
    WhichSessions,
    WhichStats,
    WhyFenced,
)
from fleet_admin.dashboard.visit import Visit
from fleet_edge.store.views import (
    DeviceView,
    EdgeView,
    EventView,
    FenceView,
    HourView,
    RoundView,
    SegmentView,
    SessionView,
    Tally,
)

__all__ = ["ENDPOINTS"]


def _devices(visit: Visit, _asked: object) -> object:
    return visit.services.log.devices()


def _device(visit: Visit, _asked: object) -> object:
    return visit.services.log.device(visit.path("device"))


def _hours(visit: Visit, asked: Limited) -> object:
    return visit.services.log.hours(visit.path("device"), limit=asked.limit)


def _sessions(visit: Visit, asked: WhichSessions) -> object:
    return visit.services.log.sessions(**dict(asked))


def _session(visit: Visit, asked: WhichOfDevice) -> object:
    return visit.services.log.session(visit.path("session"), device=asked.device)


def _segments(visit: Visit, asked: WhichOfDevice) -> object:
    return visit.services.log.segments(visit.path("session"), device=asked.device)


def _rounds(visit: Visit, asked: WhichOfDevice) -> object:
    return visit.services.log.rounds(visit.path("session"), device=asked.device)


def _events(visit: Visit, asked: WhichEvents) -> object:
    return visit.services.log.events(**dict(asked))


def _edges(visit: Visit, _asked: object) -> object:
    return visit.services.log.edges()


def _stats(visit: Visit, asked: WhichStats) -> object:
    return visit.services.log.stats(since=asked.since, by=asked.by)


def _fences(visit: Visit, _asked: object) -> object:
    return visit.services.log.fences()


def _fence(visit: Visit, asked: WhyFenced) -> object:
    return visit.services.log.fence(visit.path("device"), duration=asked.duration, reason=asked.reason)


def _unfence(visit: Visit, _asked: object) -> object:
    return visit.services.log.unfence(visit.path("device"))


_OPERATOR: Final = Role.OPERATOR

ENDPOINTS: Final = (
    Endpoint("/devices", "All devices, by name.", _devices, list[DeviceView]),
    Endpoint("/devices/{device}", "One device.", _device, DeviceView),
    Endpoint("/devices/{device}/hours", "A device's hours, the latest first.", _hours, list[HourView], Limited),
    Endpoint("/devices/{device}/fence", "Shut a device out.", _fence, FenceView, WhyFenced, "POST", _OPERATOR),
    Endpoint(
        "/devices/{device}/fence", "Let a device in again.", _unfence, FenceView | None, method="DELETE", role=_OPERATOR
    ),
    Endpoint("/sessions", "Sessions, the latest opened first.", _sessions, list[SessionView], WhichSessions),
    Endpoint("/sessions/{session}", "A session, by the beginning of its id.", _session, SessionView, WhichOfDevice),
    Endpoint("/sessions/{session}/segments", "Its stays at edges.", _segments, list[SegmentView], WhichOfDevice),
    Endpoint("/sessions/{session}/rounds", "Its verdicts, if it was traced.", _rounds, list[RoundView], WhichOfDevice),
    Endpoint("/events", "What happened, the latest first.", _events, list[EventView], WhichEvents),
    Endpoint("/edges", "All edges with their latest load.", _edges, list[EdgeView]),
    Endpoint("/stats", "What the edges counted, added up.", _stats, dict[str, Tally], WhichStats),
    Endpoint("/fences", "Devices that are shut out now.", _fences, list[FenceView]),
)

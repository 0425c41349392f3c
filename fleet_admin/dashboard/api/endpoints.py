"""Endpoints of the API. One that is added stands here, and so in the OpenAPI document."""

from typing import Final

from fleet_admin.alerts.views import AlertView
from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.api.endpoint import Endpoint
from fleet_admin.dashboard.api.parameters import (
    GivenCommand,
    Limited,
    WantedSettings,
    WhichAlerts,
    WhichAudit,
    WhichEvents,
    WhichOfDevice,
    WhichSessions,
    WhichStats,
    WhichUsage,
    WhyFenced,
)
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.visit import Visit
from fleet_admin.steering import CommandResult, DeviceSettingsView, Selection, SetResult
from fleet_edge.store.steering.views import AuditView, CommandView
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
    UsageView,
)


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
    actor = visit.actor
    return visit.services.log.fence(
        visit.path("device"), duration=asked.duration, reason=asked.reason, who=actor.who, source=actor.source
    )


def _unfence(visit: Visit, _asked: object) -> object:
    return visit.services.log.unfence(visit.path("device"), who=visit.actor.who, source=visit.actor.source)


def _usage(visit: Visit, asked: WhichUsage) -> object:
    by = asked.by.split(",") if asked.by else []
    return visit.services.log.usage(**{**dict(asked), "by": by})


def _alerts(visit: Visit, asked: WhichAlerts) -> object:
    return visit.services.alerts.list(open=asked.open, rule=asked.rule, subject=asked.subject, limit=asked.limit)


def _acknowledge(visit: Visit, _asked: object) -> object:
    return visit.services.alerts.acknowledge(visit.path("alert"), who=visit.actor.who, source=visit.actor.source)


def _clear(visit: Visit, _asked: object) -> object:
    return visit.services.alerts.clear(visit.path("alert"), who=visit.actor.who, source=visit.actor.source)


def _audit(visit: Visit, asked: WhichAudit) -> object:
    return visit.services.steering.log.audit(**dict(asked))


def _labels(visit: Visit, _asked: object) -> object:
    return visit.services.steering.log.labels()


def _settings(visit: Visit, _asked: object) -> object:
    found = visit.services.steering.settings_of(visit.path("device"))
    if found is None:
        raise Problem(404, f"Nothing is known of a device {visit.path('device')[:63]!r}.")
    return found


def _set(visit: Visit, asked: WantedSettings) -> object:
    chosen = Selection(devices=(visit.path("device"),))
    reached = visit.services.steering.reach()
    results = reached.set(asked.set, chosen, actor=visit.actor, unset=asked.unset, wait_s=_WAIT_S)
    return next(iter(list(results)))


def _command(visit: Visit, asked: GivenCommand) -> object:
    chosen = Selection(devices=(visit.path("device"),))
    reached = visit.services.steering.reach()
    results = reached.command(asked.command, chosen, actor=visit.actor, arguments=asked.arguments, timeout_s=_WAIT_S)
    return next(iter(list(results)))


def _commands(visit: Visit, asked: Limited) -> object:
    return visit.services.steering.log.commands(devices=[visit.path("device")], limit=asked.limit)


_OPERATOR: Final = Role.OPERATOR
_WAIT_S: Final = 15.0

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
    Endpoint("/usage", "Totals that outlive the sessions.", _usage, list[UsageView], WhichUsage),
    Endpoint("/devices/{device}/settings", "Wanted and in force.", _settings, DeviceSettingsView),
    Endpoint("/devices/{device}/settings", "Give it settings.", _set, SetResult, WantedSettings, "POST", _OPERATOR),
    Endpoint("/devices/{device}/commands", "Its commands, the latest first.", _commands, list[CommandView], Limited),
    Endpoint("/devices/{device}/commands", "Command it.", _command, CommandResult, GivenCommand, "POST", _OPERATOR),
    Endpoint("/labels", "The labels of each device that has any.", _labels, dict[str, list[str]]),
    Endpoint("/alerts", "Alerts, the open ones first.", _alerts, list[AlertView], WhichAlerts),
    Endpoint("/alerts/{alert}/acknowledge", "Take note of it.", _acknowledge, AlertView, method="POST", role=_OPERATOR),
    Endpoint("/alerts/{alert}/clear", "End it.", _clear, AlertView, method="POST", role=_OPERATOR),
    Endpoint("/audit", "What administrators did, the latest first.", _audit, list[AuditView], WhichAudit),
    Endpoint("/fences", "Devices that are shut out now.", _fences, list[FenceView]),
)

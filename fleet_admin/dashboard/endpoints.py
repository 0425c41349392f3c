"""Endpoints of the JSON API. An endpoint added here is served and described by the OpenAPI document."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.dashboard.visit import Visit
from fleet_admin.steering import CommandResult, DeviceSettingsView, Selection, SetResult
from fleet_edge.store.views import (
    AlertView,
    AuditView,
    CommandView,
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
from schemas.names import MAX_NAME_LENGTH
from schemas.policy import Mode
from schemas.reasons import EndReason

Text = Annotated[str, Field(max_length=100)]
DeviceName = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
Moment = Annotated[
    str, Field(max_length=40, description="An age (`90s`, `30m`, `2h`, `7d`) or a time (ISO 8601, UTC).")
]


class NoParameters(BaseModel):
    """None."""

    model_config = ConfigDict(extra="forbid")


class SinceParameter(NoParameters):
    """A time to look at."""

    since: Moment | None = None


class Limited(NoParameters):
    """How many at most."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class WhichSessions(Limited):
    """Which sessions; what is left out admits all."""

    since: Moment | None = None
    until: Moment | None = None
    device: DeviceName | None = None
    edge: DeviceName | None = None
    reason: EndReason | None = None
    mode: Mode | None = None
    open: bool = False


class WhichOfDevice(NoParameters):
    """Whose session it is; only needed where two devices have named theirs alike."""

    device: DeviceName | None = None


class WhichEvents(Limited):
    """Which events; what is left out admits all."""

    since: Moment | None = None
    until: Moment | None = None
    device: DeviceName | None = None
    edge: DeviceName | None = None
    kind: Text | None = None
    code: Text | None = None


class WhichStats(SinceParameter):
    """What is added up separately."""

    by: Annotated[str | None, Field(pattern="^(device|draft|edge|app)$")] = None


class WhichAlerts(Limited):
    """Which alerts; what is left out admits all."""

    open: bool | None = None
    rule: Text | None = None
    subject: Text | None = None


class WhichUsage(SinceParameter):
    """What is added up separately, and of what."""

    until: Moment | None = None
    by: Annotated[
        str | None,
        Field(
            pattern="^(device|edge|app|draft_model|quantization)(,(device|edge|app|draft_model|quantization)){0,4}$",
            description="Dimensions with commas: device, edge, app, draft_model, quantization.",
        ),
    ] = None
    grain: Annotated[str | None, Field(pattern="^(hour|day|month)$")] = None
    device: DeviceName | None = None
    edge: DeviceName | None = None
    app: Text | None = None


class WhichAudit(Limited):
    """Which actions of administrators; what is left out admits all."""

    since: Moment | None = None
    until: Moment | None = None
    who: Text | None = None
    subject: Text | None = None
    action: Text | None = None


class WantedSettings(NoParameters):
    """Settings to give a device, and settings to take back."""

    set: Annotated[dict[str, bool | int | float | str], Field(max_length=50)] = Field(default_factory=dict)
    unset: Annotated[list[Text], Field(max_length=50)] = Field(default_factory=list)


class GivenCommand(NoParameters):
    """A command for a device."""

    command: Text
    arguments: Annotated[dict[str, bool | int | float | str], Field(max_length=20)] = Field(default_factory=dict)


class WhyFenced(NoParameters):
    """Duration and reason of a fence."""

    duration: Annotated[
        str | None, Field(max_length=20, description="`90s`, `30m`, `2h`, `7d`; until lifted if left out.")
    ] = None
    reason: Annotated[str, Field(max_length=500)] = ""


@dataclass(frozen=True, slots=True)
class ApiEndpoint:
    """An endpoint; `path` is below `/api/v1`, `answer` is called on a thread and may block."""

    path: str
    summary: str
    answer: Callable[[Visit, Any], object]
    result: Any
    parameters: type[BaseModel] = NoParameters
    method: str = "GET"
    role: AccountRole = AccountRole.VIEWER

    @property
    def path_parameters(self) -> list[str]:
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


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


_OPERATOR: Final = AccountRole.OPERATOR
_WAIT_S: Final = 15.0

ENDPOINTS: Final = (
    ApiEndpoint("/devices", "All devices, by name.", _devices, list[DeviceView]),
    ApiEndpoint("/devices/{device}", "One device.", _device, DeviceView),
    ApiEndpoint("/devices/{device}/hours", "A device's hours, the latest first.", _hours, list[HourView], Limited),
    ApiEndpoint("/devices/{device}/fence", "Fence a device.", _fence, FenceView, WhyFenced, "POST", _OPERATOR),
    ApiEndpoint(
        "/devices/{device}/fence",
        "Lift the fences of a device.",
        _unfence,
        FenceView | None,
        method="DELETE",
        role=_OPERATOR,
    ),
    ApiEndpoint("/sessions", "Sessions, the latest opened first.", _sessions, list[SessionView], WhichSessions),
    ApiEndpoint("/sessions/{session}", "A session, by the beginning of its id.", _session, SessionView, WhichOfDevice),
    ApiEndpoint("/sessions/{session}/segments", "Its stays at edges.", _segments, list[SegmentView], WhichOfDevice),
    ApiEndpoint(
        "/sessions/{session}/rounds", "Its verdicts, if it was traced.", _rounds, list[RoundView], WhichOfDevice
    ),
    ApiEndpoint("/events", "What happened, the latest first.", _events, list[EventView], WhichEvents),
    ApiEndpoint("/edges", "All edges with their latest load.", _edges, list[EdgeView]),
    ApiEndpoint("/stats", "What the edges counted, added up.", _stats, dict[str, Tally], WhichStats),
    ApiEndpoint("/usage", "Totals that outlive the sessions.", _usage, list[UsageView], WhichUsage),
    ApiEndpoint("/devices/{device}/settings", "Wanted and in force.", _settings, DeviceSettingsView),
    ApiEndpoint("/devices/{device}/settings", "Give it settings.", _set, SetResult, WantedSettings, "POST", _OPERATOR),
    ApiEndpoint("/devices/{device}/commands", "Its commands, the latest first.", _commands, list[CommandView], Limited),
    ApiEndpoint("/devices/{device}/commands", "Command it.", _command, CommandResult, GivenCommand, "POST", _OPERATOR),
    ApiEndpoint("/labels", "The labels of each device that has any.", _labels, dict[str, list[str]]),
    ApiEndpoint("/alerts", "Alerts, the open ones first.", _alerts, list[AlertView], WhichAlerts),
    ApiEndpoint(
        "/alerts/{alert}/acknowledge", "Take note of it.", _acknowledge, AlertView, method="POST", role=_OPERATOR
    ),
    ApiEndpoint("/alerts/{alert}/clear", "End it.", _clear, AlertView, method="POST", role=_OPERATOR),
    ApiEndpoint("/audit", "What administrators did, the latest first.", _audit, list[AuditView], WhichAudit),
    ApiEndpoint("/fences", "Devices that are fenced now.", _fences, list[FenceView]),
)

"""Endpoints of the JSON API. An endpoint added here is served and described by the OpenAPI document."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.dashboard.visit import Visit
from fleet_admin.diagnosis import Diagnosis, diagnose_device, diagnose_edge
from fleet_admin.steering import CommandResult, DeviceSettingsView, Selection, SetResult, SteeringLog
from fleet_edge.alerts.alerts import Alerts, Evaluation
from fleet_edge.session_log import SessionLog
from fleet_edge.store.views import (
    AlertView,
    AuditView,
    CommandView,
    DeviceView,
    EdgeView,
    EventView,
    QuarantineView,
    RoundView,
    SegmentView,
    SessionView,
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


class Between(SinceParameter):
    """A span of time; without a bound it is open."""

    until: Moment | None = None


class Where(Between):
    """Whose, within a span of time; what is left out admits all."""

    device: DeviceName | None = None
    edge: DeviceName | None = None


class WhichSessions(Limited, Where):
    """Which sessions; what is left out admits all."""

    app: Text | None = None
    reason: EndReason | None = None
    mode: Mode | None = None
    open: bool = False


class WhichOfDevice(NoParameters):
    """Whose session it is; only needed where two devices have named theirs alike."""

    device: DeviceName | None = None


class WhichEvents(Limited, Where):
    """Which events; what is left out admits all."""

    kind: Text | None = None
    code: Text | None = None


class WhichAlerts(Limited):
    """Which alerts; what is left out admits all."""

    open: bool | None = None
    rule: Text | None = None
    subject: Text | None = None


class WhichUsage(Where):
    """What is added up separately, and of what."""

    by: Annotated[
        str | None,
        Field(
            pattern="^(device|edge|app|draft_model|quantization)(,(device|edge|app|draft_model|quantization)){0,4}$",
            description="Dimensions with commas: device, edge, app, draft_model, quantization.",
        ),
    ] = None
    grain: Annotated[str | None, Field(pattern="^(hour|day|month)$")] = None
    app: Text | None = None


class WhichAudit(Limited, Between):
    """Which actions of administrators; what is left out admits all."""

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


class WhyQuarantined(NoParameters):
    """Duration and reason of a quarantine."""

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


def _of(service: str, method: Callable[..., object], *, signed: bool = False) -> Callable[[Visit, Any], object]:
    """Answer with a method of a service, given the names in the path, the parameters, and who asks if `signed`."""

    def answer(visit: Visit, asked: NoParameters) -> object:
        by = {"who": visit.actor.who, "source": visit.actor.source} if signed else {}
        names = map(visit.path, visit.request.path_params)
        return method(attrgetter(service)(visit.services), *names, **dict(asked), **by)

    return answer


_log = partial(_of, "log")
_alerts = partial(_of, "alerts")
_steering = partial(_of, "steering.log")


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedUsage(UsageView):
    """Usage with its cost by the prices of the settings; None without prices."""

    cost: float | None
    currency: str | None


def _usage(visit: Visit, asked: WhichUsage) -> object:
    prices = visit.services.settings.prices
    names = [each.name for each in fields(UsageView)]
    return [
        PricedUsage(
            **{name: getattr(row, name) for name in names},
            cost=prices.cost(row.counted) if prices else None,
            currency=prices.currency if prices else None,
        )
        for row in visit.services.log.usage(**{**dict(asked), "by": asked.by.split(",") if asked.by else []})
    ]


def _settings(visit: Visit, _asked: object) -> object:
    found = visit.services.steering.settings_of(visit.path("device"))
    if found is None:
        raise Problem(404, f"There is no device {visit.path('device')[:63]!r}.")
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


_WAIT_S: Final = 15.0

_Read = ApiEndpoint
_Act = partial(ApiEndpoint, method="POST", role=AccountRole.OPERATOR)

ENDPOINTS: Final = (
    _Read("/devices", "All devices, by name.", _log(SessionLog.devices), list[DeviceView]),
    _Read("/devices/{device}", "One device.", _log(SessionLog.device), DeviceView),
    _Read("/devices/{device}/diagnosis", "Why it is slow.", _log(diagnose_device), Diagnosis),
    _Act("/devices/{device}/quarantine", "Quarantine a device.", _log(SessionLog.quarantine, signed=True),
         QuarantineView, WhyQuarantined),
    _Act("/devices/{device}/quarantine", "Lift its quarantines.", _log(SessionLog.unquarantine, signed=True),
         QuarantineView | None, method="DELETE"),
    _Read("/sessions", "Sessions, the latest first.", _log(SessionLog.sessions), list[SessionView], WhichSessions),
    _Read("/sessions/{session}", "A session, by the beginning of its id.", _log(SessionLog.session), SessionView,
          WhichOfDevice),
    _Read("/sessions/{session}/segments", "Its stays at edges.", _log(SessionLog.segments), list[SegmentView],
          WhichOfDevice),
    _Read("/sessions/{session}/rounds", "Its verdicts.", _log(SessionLog.rounds), list[RoundView],
          WhichOfDevice),
    _Read("/events", "What happened, the latest first.", _log(SessionLog.events), list[EventView], WhichEvents),
    _Read("/edges", "All edges with their latest load.", _log(SessionLog.edges), list[EdgeView]),
    _Read("/edges/{edge}/diagnosis", "Why its sessions are slow.", _log(diagnose_edge), Diagnosis),
    _Read("/usage", "Totals that outlive the sessions.", _usage, list[PricedUsage], WhichUsage),
    _Read("/devices/{device}/settings", "Wanted and in force.", _settings, DeviceSettingsView),
    _Act("/devices/{device}/settings", "Give it settings.", _set, SetResult, WantedSettings),
    _Read("/devices/{device}/commands", "Its commands, the latest first.", _commands, list[CommandView], Limited),
    _Act("/devices/{device}/commands", "Command it.", _command, CommandResult, GivenCommand),
    _Read("/labels", "The labels of each device that has any.", _log(SessionLog.labels), dict[str, list[str]]),
    _Read("/alerts", "Alerts, the open ones first.", _alerts(Alerts.list), list[AlertView], WhichAlerts),
    _Act("/alerts/{alert}/acknowledge", "Acknowledge it, or all of a condition.",
         _alerts(Alerts.acknowledge, signed=True), list[AlertView]),
    _Act("/alerts/{alert}/clear", "End it, or all of a condition.", _alerts(Alerts.clear, signed=True),
         list[AlertView]),
    _Read("/alerts/evaluation", "When the alerts were last evaluated.", _alerts(Alerts.evaluation), Evaluation),
    _Read("/audit", "What administrators did.", _steering(SteeringLog.audit), list[AuditView], WhichAudit),
    _Read("/quarantines", "Devices that are quarantined now.", _log(SessionLog.quarantines), list[QuarantineView]),
)  # fmt: skip

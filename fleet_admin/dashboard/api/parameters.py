"""Parameters of the API's endpoints: bounded, and unknown ones are refused by name."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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


class Period(NoParameters):
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


class WhichStats(Period):
    """What is added up separately."""

    by: Annotated[str | None, Field(pattern="^(device|draft|edge|app)$")] = None


class WhichAlerts(Limited):
    """Which alerts; what is left out admits all."""

    open: bool | None = None
    rule: Text | None = None
    subject: Text | None = None


class WhichUsage(Period):
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
    """For how long a device is shut out, and why."""

    duration: Annotated[
        str | None, Field(max_length=20, description="`90s`, `30m`, `2h`, `7d`; until lifted if left out.")
    ] = None
    reason: Annotated[str, Field(max_length=500)] = ""

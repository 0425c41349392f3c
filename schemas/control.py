"""JSON control messages: what an operator reads with `mosquitto_sub`.

Retained states double as last wills, so a reader always knows whether the sender is there.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import MalformedMessage, MessageTooLarge
from schemas.names import Name
from schemas.printable import PRINTABLE
from schemas.reasons import unknown_as

MAX_CONTROL_BYTES = 64 << 10

Label = Annotated[str, Field(max_length=200), PRINTABLE]

_EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)


def _bounded(moment: datetime) -> datetime:
    return min(max(moment, _EARLIEST), _LATEST).astimezone(UTC)


Instant = Annotated[AwareDatetime, AfterValidator(_bounded)]
"""A moment, in UTC and between 1970 and 9999: in any time zone it is a time that Python and databases can hold."""

C = TypeVar("C", bound="ControlMessage")


class ControlMessage(BaseModel):
    """Base of all control messages: what a newer release has added is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Presence(StrEnum):
    """Whether the sender of a state is there.

    One that this release does not know is read as `DRAINING`: the sender is there, and nobody counts on it for more.
    """

    ONLINE = "online"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    OFFLINE = "offline"


class DeviceState(ControlMessage):
    """A device's retained state.

    Attributes:
        presence: `offline` is published by the broker as the last will.
        software: Version of this package.
        draft_model: Name of the draft model.
        quantization: Of its weights.
        since: When the process connected (UTC).
        certificate_until: End of the certificate that it presents to the broker, if it has one.
    """

    presence: Annotated[Presence, unknown_as(Presence.DRAINING)]
    software: Label
    draft_model: Label
    quantization: Label
    since: Instant
    certificate_until: Instant | None = None


class EdgeState(ControlMessage):
    """An edge's retained state.

    Attributes:
        presence: `offline` is published by the broker as the last will.
        software: Version of this package.
        edge: The edge's name.
        target: Name of the target model.
        vocabulary: Its size and the head of its fingerprint, for the reader's eye.
        since: When the process connected (UTC).
        certificate_until: End of the certificate that it presents to the broker, if it has one.
    """

    presence: Annotated[Presence, unknown_as(Presence.DRAINING)]
    software: Label
    edge: Name
    target: Label
    vocabulary: Label
    since: Instant
    certificate_until: Instant | None = None


class Telemetry(ControlMessage):
    """A device's counters since it started, for dashboards; the session log is the record.

    Attributes:
        sessions: Ended sessions.
        tokens: Committed tokens.
        acceptance: Accepted of tested draft tokens, or None before the first.
        mean_draft: Tokens of a draft, or None before the first.
        draft_ms_per_token: Mean, or None before the first.
        round_trip_ms: Smoothed time from draft to verdict, or None before the first.
        streamed: Of the tokens, written by edges alone, as the device has asked them to.
        unverified: Of the tokens, those at the ends of texts that do not follow the target's law: written while no edge
            answered, or behind that.
        plan: How the device writes now, or None before the first text.
    """

    sessions: Annotated[int, Field(ge=0, strict=True)]
    tokens: Annotated[int, Field(ge=0, strict=True)]
    acceptance: Annotated[float, Field(ge=0, le=1)] | None = None
    mean_draft: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    draft_ms_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    round_trip_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    streamed: Annotated[int, Field(ge=0, strict=True)] | None = None
    plan: Annotated[str, Field(max_length=16)] | None = None
    unverified: Annotated[int, Field(ge=0, strict=True)] | None = None


class AlertState(StrEnum):
    """Whether an alert holds. One that this release does not know is read as `OPEN`: somebody had better look."""

    OPEN = "open"
    CLEARED = "cleared"


class Alert(ControlMessage):
    """Something that is wrong with a fleet, when it begins and when it is over.

    Attributes:
        id: The alert's; the same when it is over. Who hears it twice passes it over by id and state.
        fleet: Its name, if whoever tells of it knows.
        rule: Which rule has found it.
        subject: Of whom: a device, an edge, or an edge and a code.
        device: The device, if it concerns one.
        severity: `warning` or `critical`.
        state: Whether it holds, or is over.
        sentence: What is wrong, and what to do.
        value: What was measured, if it is a number.
        threshold: What it is held against.
        since: When it began (UTC).
        at: When this was so (UTC).
    """

    id: Annotated[str, Field(max_length=64), PRINTABLE]
    fleet: Name | None = None
    rule: Annotated[str, Field(max_length=64), PRINTABLE]
    subject: Label
    device: Name | None = None
    severity: Annotated[str, Field(max_length=16), PRINTABLE]
    state: Annotated[AlertState, unknown_as(AlertState.OPEN)]
    sentence: Annotated[str, Field(max_length=2000), PRINTABLE]
    value: Annotated[float, Field(allow_inf_nan=False)] | None = None
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    since: Instant
    at: Instant


def encode_json(message: ControlMessage) -> bytes:
    """Return the message as UTF-8 JSON."""
    return message.model_dump_json(exclude_none=True).encode()


def decode_json(model: type[C], payload: bytes) -> C:
    """Read a control message.

    Raises:
        MessageTooLarge: It exceeds `MAX_CONTROL_BYTES`.
        MalformedMessage: It is not the JSON that `model` describes.
    """
    if len(payload) > MAX_CONTROL_BYTES:
        raise MessageTooLarge(size=len(payload), bound=MAX_CONTROL_BYTES)
    try:
        return model.model_validate_json(payload)
    except ValidationError as error:
        raise MalformedMessage.from_validation(model.__name__, error) from error

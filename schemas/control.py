"""JSON control messages: states, telemetry, alerts, settings and commands.

Retained states double as last wills, so a reader always knows whether the sender is online.

The desired settings of a device are one retained message with an id. The device accepts or refuses them as a whole. It
reports which id it last considered, and why it refused a setting.
"""

import hashlib
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, ClassVar, Final, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import MalformedMessage, MessageTooLarge
from schemas.fields import Sentence
from schemas.names import Name
from schemas.printable import PRINTABLE
from schemas.reasons import unknown_as

MAX_CONTROL_BYTES = 64 << 10

MAX_CHAT_FORMAT_BYTES: Final = 256 << 10
"""Ten times the longest published chat template."""

CHAT_FORMAT_BYTES: Final = 16

MAX_LABEL: Final = 200
"""Characters."""

_Label = Annotated[str, Field(max_length=MAX_LABEL), PRINTABLE]

_EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)


def _bounded(moment: datetime) -> datetime:
    return min(max(moment, _EARLIEST), _LATEST).astimezone(UTC)


Instant = Annotated[AwareDatetime, AfterValidator(_bounded)]
"""A moment in UTC between 1970 and 9999, which Python and databases can represent in any time zone."""

C = TypeVar("C", bound="ControlMessage")


class ControlMessage(BaseModel):
    """Base of all control messages; fields of newer releases are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    max_bytes: ClassVar[int] = MAX_CONTROL_BYTES


class Presence(StrEnum):
    """State of a sender's connection. An unknown value is read as `DRAINING`: it gets no new work."""

    ONLINE = "online"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    OFFLINE = "offline"
    CLOSED = "closed"  # a device's program has ended as intended: it is offline, and nobody waits for it

    @property
    def gone(self) -> bool:
        return self in {Presence.OFFLINE, Presence.CLOSED}


class DeviceState(ControlMessage):
    """Retained state of a device.

    Attributes:
        presence: `offline` is published by the broker as the last will.
        software: Version of this package.
        draft_model: Name of the draft model.
        quantization: Of its weights.
        since: When the process connected (UTC).
        certificate_until: End of validity of its client certificate, if it has one.
        throttled: A sentence that says that its processor is throttled, so that it drafts less.
    """

    presence: Annotated[Presence, unknown_as(Presence.DRAINING)]
    software: _Label
    draft_model: _Label
    quantization: _Label
    since: Instant
    certificate_until: Instant | None = None
    throttled: _Label | None = None


class EdgeState(ControlMessage):
    """Retained state of an edge.

    Attributes:
        presence: `offline` is published by the broker as the last will.
        software: Version of this package.
        target: Name of the target model.
        target_id: Its identity, in hexadecimal; None until it is loaded.
        vocabulary: Its size and the start of its fingerprint, for people.
        since: When the process connected (UTC).
        certificate_until: End of validity of its client certificate, if it has one.
        sessions_per_device: Most open sessions of a device here; a device with more requests lets them wait.
        loading: Percent of the target model that an edge has loaded, which is offline until then; None otherwise.
        chat_format: Hash of the edge's `ChatFormat`; None if its target has no chat template.
    """

    presence: Annotated[Presence, unknown_as(Presence.DRAINING)]
    software: _Label
    edge: Name
    target: _Label
    vocabulary: _Label
    since: Instant
    certificate_until: Instant | None = None
    sessions_per_device: Annotated[int, Field(ge=1, le=1 << 16, strict=True)] | None = None
    target_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$", strict=True)] | None = None
    loading: Annotated[int, Field(ge=0, le=100, strict=True)] | None = None
    chat_format: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * CHAT_FORMAT_BYTES}}}$", strict=True)] | None = None


class ChatFormat(ControlMessage):
    """How a target model was trained to read a chat; retained, since it is too long for the edge's state.

    Attributes:
        template: Jinja source.
        bos: Text of the token at the beginning; empty if there is none.
        eos: Text of the token at the end of an answer; likewise.
        end_tokens: Ids that end a generation, rising.
    """

    max_bytes: ClassVar[int] = MAX_CHAT_FORMAT_BYTES

    template: Annotated[str, Field(min_length=1)]
    bos: _Label = ""
    eos: _Label = ""
    end_tokens: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 32)], ...], Field(max_length=64)] = ()

    @property
    def name(self) -> str:
        """Hash of the message, as the edge's state has it."""
        return chat_format_name(encode_json(self))


def chat_format_name(payload: bytes) -> str:
    return hashlib.sha256(payload).digest()[:CHAT_FORMAT_BYTES].hex()


class Telemetry(ControlMessage):
    """Counters of a device since it started, for dashboards; the session log is authoritative.

    Attributes:
        sessions: Ended sessions.
        tokens: Committed tokens.
        acceptance: Accepted of tested draft tokens, or None before the first.
        mean_draft: Tokens of a draft, or None before the first.
        draft_ms_per_token: Mean, or None before the first.
        round_trip_ms: Smoothed time from draft to verdict, or None before the first.
        edge_only: Of the tokens, those from edge-only decoding.
        unverified: Of the tokens, those at the end of a generation that do not follow the target distribution:
            generated while no edge answered, or after such tokens.
        plan: How the device generates now, or None before the first request.
        plan_reason: Why, with the estimate of each way.
        temperature_c: Of the processor (degrees Celsius), if the device shows it.
        joules_per_token: Mean energy of the device, if it has figures.
    """

    sessions: Annotated[int, Field(ge=0, strict=True)]
    tokens: Annotated[int, Field(ge=0, strict=True)]
    acceptance: Annotated[float, Field(ge=0, le=1)] | None = None
    mean_draft: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    draft_ms_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    round_trip_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    edge_only: Annotated[int, Field(ge=0, strict=True)] | None = None
    plan: Annotated[str, Field(max_length=16)] | None = None
    plan_reason: Sentence | None = None
    unverified: Annotated[int, Field(ge=0, strict=True)] | None = None
    temperature_c: Annotated[float, Field(ge=-100, le=1000, allow_inf_nan=False)] | None = None
    joules_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class AlertState(StrEnum):
    """State of an alert. An unknown value is read as `OPEN`, so that somebody looks."""

    OPEN = "open"
    CLEARED = "cleared"


class Alert(ControlMessage):
    """A problem of a fleet, when it begins and when it ends.

    Attributes:
        id: The same at the beginning and the end. Readers ignore repetitions with the same id and state.
        fleet: Its name, if the sender knows it.
        rule: Name of the alert rule.
        subject: A device, an edge, or an edge and a code.
        device: The device, if it concerns one.
        severity: `warning` or `critical`.
        sentence: What is wrong, and what to do.
        value: Measured value, if it is a number.
        threshold: Threshold of the rule.
        since: When it began (UTC).
        at: When it was last evaluated (UTC).
    """

    id: Annotated[str, Field(max_length=64), PRINTABLE]
    fleet: Name | None = None
    rule: Annotated[str, Field(max_length=64), PRINTABLE]
    subject: _Label
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
        MessageTooLarge: It exceeds `max_bytes` of its model.
        MalformedMessage: It is not the JSON that `model` describes.
    """
    if len(payload) > model.max_bytes:
        raise MessageTooLarge(size=len(payload), bound=model.max_bytes)
    try:
        return model.model_validate_json(payload)
    except ValidationError as error:
        raise MalformedMessage.from_validation(model.__name__, error) from error


MAX_SETTINGS: Final = 64

MAX_SETTING_NAME: Final = 80
MAX_SETTING_VALUE: Final = 300
MAX_WHO: Final = 100
_EXACT: Final = (1 << 53) - 1
"""Largest integer that every JSON reader represents exactly."""

MAX_RESULT: Final = 10_000
"""Characters of a result: with any characters the message stays within its limit."""

_SettingName = Annotated[str, Field(min_length=1, max_length=MAX_SETTING_NAME, strict=True), PRINTABLE]
_Text = Annotated[str, Field(max_length=MAX_SETTING_VALUE, strict=True), PRINTABLE]
SettingValue = (
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(ge=-_EXACT, le=(1 << 64) - 1, strict=True)]
    | Annotated[float, Field(allow_inf_nan=False, strict=True)]
    | _Text
)
"""Value of a setting: true or false, a number, or one line of text."""

_Values = Annotated[dict[_SettingName, SettingValue], Field(max_length=MAX_SETTINGS)]
_Names = Annotated[tuple[_SettingName, ...], Field(max_length=MAX_SETTINGS)]
_Who = Annotated[str, Field(max_length=MAX_WHO, strict=True), PRINTABLE]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{8,32}$", strict=True)]


class DesiredSettings(ControlMessage):
    """All settings that a device should have; others are as the device itself is configured.

    The retained message is the only copy, and the last one counts.

    Attributes:
        id: Random. A device considers a set once.
        values: By the setting's name. An empty set removes all earlier values.
        who: Author, for the log.
        at: Time (UTC).
    """

    id: Id
    values: _Values
    who: _Who = ""
    at: Instant | None = None


class UpdateStage(StrEnum):
    """Stage of an update. An unknown value is read as `WAITING`."""

    WAITING = "waiting"  # for the window, the repository, the network or space; the sentence says for which
    FETCHING = "fetching"
    INSTALLING = "installing"
    TESTING = "testing"
    DONE = "done"
    FAILED = "failed"  # the previous release runs


Release = Annotated[int, Field(ge=1, le=_EXACT, strict=True)]
"""Number of a release: a device installs only newer ones."""


class UpdateReport(ControlMessage):
    """Progress of a device's update.

    Attributes:
        release: Desired release.
        running: Folder of the release that runs.
        fetched: Of `size`, the bytes that are present.
        at: Time of the last change (UTC).
    """

    release: Release
    stage: Annotated[UpdateStage, unknown_as(UpdateStage.WAITING)]
    sentence: Sentence = ""
    running: _Label = ""
    fetched: Annotated[int, Field(ge=0, strict=True)] = 0
    size: Annotated[int, Field(ge=0, strict=True)] = 0
    at: Instant


class ReportedSettings(ControlMessage):
    """Remote settings of a device, and the result of the desired ones.

    Attributes:
        id: Of the desired settings that it has considered last; None if there were none.
        values: In force, by name.
        refused: Why the latest were refused, by name; then none of them was accepted.
        needs_restart: Settings that were accepted and take effect when the device next loads its model.
        update: Its latest update, if it has an updater.
        at: Time (UTC).
    """

    id: Id | None = None
    values: _Values
    refused: Annotated[dict[_SettingName, Sentence], Field(max_length=MAX_SETTINGS)] = Field(default_factory=dict)
    needs_restart: _Names = ()
    update: UpdateReport | None = None
    at: Instant | None = None


class CommandOutcome(StrEnum):
    """Outcome of a command. An unknown value is read as `FAILED`, so that nobody relies on it."""

    OK = "ok"
    FAILED = "failed"  # it was tried
    REFUSED = "refused"  # it was not


class CommandRequest(ControlMessage):
    """A command to one device.

    Attributes:
        id: Hexadecimal; a device answers a repeated id without running the command again.
        command: Name of the command.
        deadline: When the sender stops waiting (UTC); the device does not start the command later.
        who: Author, for the log.
    """

    id: Id
    command: Annotated[str, Field(min_length=1, max_length=40, strict=True), PRINTABLE]
    deadline: Instant
    who: _Who = ""


class CommandResponse(ControlMessage):
    """Outcome of a command.

    Attributes:
        id: Of the command.
        sentence: What was done, or why not.
        result: Text, lines of a log, or JSON.
    """

    id: Id
    outcome: Annotated[CommandOutcome, unknown_as(CommandOutcome.FAILED)]
    sentence: Sentence
    result: Annotated[str, Field(max_length=MAX_RESULT, strict=True)] | None = None

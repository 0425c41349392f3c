"""Steering messages: settings that a device is wanted to have, those that it has, and commands with their answers.

A device has one set of wanted settings, each time as a whole, with an integer version. It takes a set or refuses it, as
a whole too, and reports which version it has considered, which is in force, and why any setting was refused.
"""

from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from schemas.bounds import MAX_SENTENCE
from schemas.control import ControlMessage, Instant
from schemas.printable import PRINTABLE
from schemas.reasons import unknown_as

MAX_SETTINGS: Final = 64
"""Most settings in a message."""

MAX_SETTING_NAME: Final = 80
MAX_SETTING_VALUE: Final = 300
MAX_WHO: Final = 100
MAX_VERSION: Final = (1 << 53) - 1
"""Greatest version: what every reader of JSON holds exactly."""

MAX_ARGUMENTS: Final = 8
MAX_RESULT: Final = 8 << 10
"""Most characters of a result in one part: whatever they are, the message has fewer bytes than one may have."""

MAX_PARTS: Final = 32
"""Most parts of one answer."""

_SettingName = Annotated[str, Field(min_length=1, max_length=MAX_SETTING_NAME, strict=True), PRINTABLE]
_Text = Annotated[str, Field(max_length=MAX_SETTING_VALUE, strict=True), PRINTABLE]
SettingValue = (
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(ge=-MAX_VERSION, le=(1 << 64) - 1, strict=True)]
    | Annotated[float, Field(allow_inf_nan=False, strict=True)]
    | _Text
)
"""Value of a setting or of an argument: true or false, a number, or one line of text."""

_Values = Annotated[dict[_SettingName, SettingValue], Field(max_length=MAX_SETTINGS)]
_Names = Annotated[tuple[_SettingName, ...], Field(max_length=MAX_SETTINGS)]
_Sentence = Annotated[str, Field(max_length=MAX_SENTENCE, strict=True), PRINTABLE]
_Who = Annotated[str, Field(max_length=MAX_WHO, strict=True), PRINTABLE]
_Version = Annotated[int, Field(ge=0, le=MAX_VERSION, strict=True)]
_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{8,32}$", strict=True)]


class DesiredSettings(ControlMessage):
    """Settings that a device is wanted to have, all of them: what is not named is as the device itself is configured.

    Attributes:
        version: Above every earlier one of this device. A lower one is ignored, unless `at` is later.
        values: By the setting's name. An empty set takes back whatever was wanted before.
        who: Has asked for it, for the log.
        at: When (UTC).
    """

    version: Annotated[int, Field(ge=1, le=MAX_VERSION, strict=True)]
    values: _Values
    who: _Who = ""
    at: Instant | None = None


class ReportedSettings(ControlMessage):
    """Settings of a device that can be set from afar, and what became of those that were wanted.

    Attributes:
        version: Of the latest wanted settings that it has considered; 0 if there were none.
        applied: Of those that are in force; less than `version` if the latest were refused.
        values: In force, by name.
        refused: Why the latest were refused, by name; then none of them was taken.
        needs_restart: Settings that were taken and are in force only when the device loads its model anew.
        fixed: Settings that the device's own configuration does not let be set from afar.
        at: When (UTC).
    """

    version: _Version
    applied: _Version
    values: _Values
    refused: Annotated[dict[_SettingName, _Sentence], Field(max_length=MAX_SETTINGS)] = Field(default_factory=dict)
    needs_restart: _Names = ()
    fixed: _Names = ()
    at: Instant | None = None


class CommandOutcome(StrEnum):
    """What became of a command.

    One that this release does not know is read as `FAILED`: nobody counts on its having been done.
    """

    OK = "ok"
    FAILED = "failed"  # it was tried
    REFUSED = "refused"  # it was not


class CommandRequest(ControlMessage):
    """A command to one device.

    Attributes:
        id: Of this command, hexadecimal; a device answers one that it has had before, and does not run it again.
        command: Which.
        arguments: By name.
        deadline: When its sender stops waiting (UTC); after it, the device does not begin any more.
        who: Has asked for it, for the log.
    """

    id: _Id
    command: Annotated[str, Field(min_length=1, max_length=40, strict=True), PRINTABLE]
    arguments: Annotated[dict[_SettingName, SettingValue], Field(max_length=MAX_ARGUMENTS)] = Field(
        default_factory=dict
    )
    deadline: Instant
    who: _Who = ""


class CommandResponse(ControlMessage):
    """What became of a command; a long result comes in parts, each with all other fields.

    Attributes:
        id: Of the command.
        outcome: Whether it was done.
        sentence: What was done, or why not.
        result: Text, lines of a log or JSON; a part of it where there are several.
        part: Which, from 0.
        parts: How many there are.
    """

    id: _Id
    outcome: Annotated[CommandOutcome, unknown_as(CommandOutcome.FAILED)]
    sentence: _Sentence
    result: Annotated[str, Field(max_length=MAX_RESULT, strict=True)] | None = None
    part: Annotated[int, Field(ge=0, lt=MAX_PARTS, strict=True)] = 0
    parts: Annotated[int, Field(ge=1, le=MAX_PARTS, strict=True)] = 1

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.part >= self.parts:
            raise ValueError("a part that is beyond the last")
        return self

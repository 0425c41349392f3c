"""Views of steering: who acts, what a change would do, and what has become of settings and commands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from schemas.control import Presence, SettingValue


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, for the audit log.

    Attributes:
        who: The user of the operating system, or the account of the dashboard.
        source: From where: the machine of a command line, or the address of the dashboard's reader.
    """

    who: str
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsChange:
    """What a change would do to one device.

    Attributes:
        device: Its name.
        presence: Its last word; None if it was never heard.
        version: Of the settings that would be wanted.
        before: What is wanted of it now, of the settings that change.
        after: What would be wanted of it; a setting that is taken back is missing.
        wanted: All that would be wanted of it.
        dropped: Settings that it has refused, and that are therefore wanted no more.
        needs_restart: Settings of the change that it takes into use only when it loads its model anew.
    """

    device: str
    presence: Presence | None
    version: int
    before: Mapping[str, SettingValue]
    after: Mapping[str, SettingValue]
    wanted: Mapping[str, SettingValue]
    dropped: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


class SettingState(StrEnum):
    """What has become of wanted settings at one device.

    Attributes:
        IN_FORCE: It has taken them, and they are in force.
        NEEDS_RESTART: It has taken them; some are in force when it loads its model anew.
        REFUSED: It has refused them, all of them, and says why.
        WAITING: It is not there; it takes them when it is back.
        SILENT: It is there and has not answered in time, or does not know settings from afar.
        AHEAD: It reports a version above all that was wanted, and therefore ignores what is.
        NONE: Nothing is wanted of it.
    """

    IN_FORCE = "in force"
    NEEDS_RESTART = "needs restart"
    REFUSED = "refused"
    WAITING = "waiting"
    SILENT = "silent"
    AHEAD = "ahead"
    NONE = "none wanted"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """What has become of a change at one device."""

    device: str
    version: int
    state: SettingState
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettingsView:
    """A device's settings, as they are wanted and as it has reported them.

    Attributes:
        device: Its name.
        presence: Its last word; None if it was never heard.
        state: What has become of what is wanted.
        sentence: The same in words.
        wanted_version: 0 if nothing is wanted.
        wanted: Values by name.
        wanted_by: Who has asked for them.
        wanted_at: When.
        reported_version: The latest that it has considered; None if it has never reported.
        applied: The version in force.
        values: In force.
        refused: Why the latest were refused, by name.
        needs_restart: Taken, and in force only when it loads its model anew.
        fixed: Not to be set from afar, by its own configuration.
    """

    device: str
    presence: Presence | None
    state: SettingState
    sentence: str
    wanted_version: int = 0
    wanted: Mapping[str, SettingValue] = field(default_factory=dict)
    wanted_by: str = ""
    wanted_at: datetime | None = None
    reported_version: int | None = None
    applied: int | None = None
    values: Mapping[str, SettingValue] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    needs_restart: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What has become of a command at one device.

    Attributes:
        device: Its name.
        id: Of the command; empty if it was not sent.
        outcome: `ok`, `failed`, `refused`, `silent` or `offline`.
        sentence: What was done, or why not.
        result: What it has answered, where there is more to say: text, or JSON.
        seconds: Until its answer.
    """

    device: str
    id: str
    outcome: str
    sentence: str
    result: str | None = None
    seconds: float | None = None

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

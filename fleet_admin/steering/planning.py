"""Planning of changes: actors, selected devices, values, previews and outcomes."""

import json
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import Effect, check_values, effect_of
from fleet_edge.session_log import DONE, AuditEntry
from schemas.control import (
    MAX_SETTING_VALUE,
    MAX_SETTINGS,
    DesiredSettings,
    Presence,
    ReportedSettings,
    SettingValue,
    UpdateReport,
)
from schemas.errors import FleetError, InvalidName
from schemas.names import check_name


class SteeringError(FleetError):
    """Devices cannot be steered as requested."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, for the audit log: a user of the operating system or a dashboard account, and the address."""

    who: str
    source: str = ""

    def entry(
        self, action: str, subject: str, *, before: str | None = None, after: str | None = None, outcome: str = DONE
    ) -> AuditEntry:
        changed = {"before": before, "after": after}
        return AuditEntry(who=self.who, source=self.source, action=action, subject=subject, outcome=outcome, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsChange:
    """What a change would do to one device."""

    device: str
    presence: Presence | None  # its latest; None if it has never published one
    id: str  # of the settings that would be wanted
    before: Mapping[str, SettingValue]
    after: Mapping[str, SettingValue]  # a setting that is reset is missing
    wanted: Mapping[str, SettingValue]  # all settings, with those of the change
    dropped: tuple[str, ...] = ()  # settings that it has refused, and that are therefore no longer wanted
    needs_restart: tuple[str, ...] = ()  # settings of the change that take effect when it reloads its model


class SettingState(StrEnum):
    """What has become of wanted settings at one device."""

    IN_FORCE = "in force"
    NEEDS_RESTART = "needs restart"
    REFUSED = "refused"
    WAITING = "waiting"  # the device is offline
    SILENT = "silent"
    NONE = "none wanted"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettingsView:
    """A device's wanted and reported settings."""

    device: str
    presence: Presence | None  # its latest; None if it has never published one
    state: SettingState
    sentence: str
    reports: bool  # whether it has ever reported its settings
    wanted: Mapping[str, SettingValue] = field(default_factory=dict)
    wanted_by: str = ""
    wanted_at: datetime | None = None
    reported_at: datetime | None = None  # by its own clock
    values: Mapping[str, SettingValue] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # why the latest were refused, by name
    needs_restart: tuple[str, ...] = ()  # accepted, in force once it reloads its model
    update: UpdateReport | None = None  # its latest update, if it has an updater


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What has become of a command at one device."""

    device: str
    id: str  # of the command; empty if it was not sent
    outcome: str  # `ok`, `failed`, `refused`, `silent` or `offline`
    sentence: str
    result: str | None = None  # its answer, if there is more than that: text, or JSON
    seconds: float | None = None  # until its answer

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDevice:
    """What a device is selected by."""

    device: str
    presence: Presence | None = None  # its latest; None if it has never published one
    software: str | None = None
    draft_model: str | None = None
    retired_at: datetime | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A set of devices. Names and labels add up; everything else narrows down."""

    devices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    everything: bool = False  # all devices that are not retired
    draft_model: str | None = None
    software: str | None = None

    def __post_init__(self) -> None:
        """Raise `SteeringError` if it selects nothing, or a name is invalid."""
        try:
            for name in self.devices:
                check_name(name)
        except InvalidName as error:
            raise SteeringError(str(error)) from None
        narrow = self.draft_model is not None or self.software is not None
        if not (self.devices or self.labels or self.everything or narrow):
            raise SteeringError("Nobody is chosen: give --device, --label, --all, or what the devices have in common.")
        if self.everything and (self.devices or self.labels):
            raise SteeringError("--all is given together with names or labels; leave out --all, or the others.")

    def choose(self, known: Mapping[str, KnownDevice]) -> list[str]:
        """Return the sorted names of the chosen devices; raises `SteeringError` for an unknown name or no device."""
        if unknown := sorted(set(self.devices) - known.keys()):
            raise SteeringError(
                f"No device {unknown[0]!r} is known to the broker or the session log; check the name, or see them with "
                "`fleet admin devices`."
            )
        by_name = bool(self.devices or self.labels)
        chosen = [each.device for each in known.values() if self._named(each, by_name=by_name) and self._fits(each)]
        if not chosen:
            raise SteeringError("No device is chosen by that; see their labels with `fleet admin labels`.")
        return sorted(chosen)

    def _named(self, each: KnownDevice, *, by_name: bool) -> bool:
        if each.device in self.devices:
            return True
        if each.retired_at is not None:  # only by its name
            return False
        return not by_name or not set(self.labels).isdisjoint(each.labels)

    def _fits(self, each: KnownDevice) -> bool:
        return (self.draft_model is None or self.draft_model == each.draft_model) and (
            self.software is None or self.software == each.software
        )


_LONGEST: Final = 60


def read_assignments(texts: Iterable[str]) -> dict[str, SettingValue]:
    """Parse `KEY=VALUE`: true, false and numbers by their form, everything else as a string."""
    found: dict[str, SettingValue] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.strip()
        if not sign or not name:
            raise SteeringError(f"{text[:_LONGEST]!r} is no setting; write it as KEY=VALUE.")
        if name in found:
            raise SteeringError(f"The setting {name!r} is given twice.")
        found[name] = _value(value.strip())
    return found


def check_change(changes: Mapping[str, SettingValue], unset: Collection[str]) -> None:
    """Refuse what no device would accept; a device may still refuse what it cannot do."""
    if not changes and not unset:
        raise SteeringError("No setting given; give KEY=VALUE.")
    if both := sorted(set(changes) & set(unset)):
        raise SteeringError(f"The setting {both[0]!r} is to be set and taken back at once.")
    checked = check_values(changes, DeviceSettings())
    if checked.refused:
        raise SteeringError("\n".join(f"{name}: {why}" for name, why in checked.refused.items()))
    for name in unset:
        if effect_of(name) is None:
            unknown = check_values({name: True}, DeviceSettings()).refused
            raise SteeringError("\n".join(f"{each}: {why}" for each, why in unknown.items()))


def _value(text: str) -> SettingValue:
    if len(text) > MAX_SETTING_VALUE:
        raise SteeringError(f"{text[:_LONGEST]!r}… is longer than the {MAX_SETTING_VALUE} characters of a setting.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str) else text


def plan_changes(
    devices: Iterable[KnownDevice],
    changes: Mapping[str, SettingValue],
    *,
    unset: Collection[str],
    desired: Mapping[str, DesiredSettings],
    reported: Mapping[str, ReportedSettings],
) -> list[SettingsChange]:
    """Return the settings that devices would be wanted to have.

    `desired` and `reported` are what the broker retains. Raises `SteeringError` if the settings of a device exceed a
    message.
    """
    concerned = (*changes, *unset)
    needs_restart = tuple(name for name in concerned if effect_of(name) is Effect.RELOAD)
    planned = []
    for device in devices:
        name, before, said = device.device, desired.get(device.device), reported.get(device.device)
        old = before.values if before is not None else {}
        refused = said.refused if before is not None and said is not None and said.id == before.id else {}
        # Settings that it has refused are dropped unless set again: it would refuse all others with them.
        dropped = tuple(key for key in refused if key in old and key not in changes)
        wanted = {key: value for key, value in {**old, **changes}.items() if key not in {*unset, *dropped}}
        if len(wanted) > MAX_SETTINGS:
            raise SteeringError(f"{len(wanted)} settings would be wanted of {name}; {MAX_SETTINGS} can be.")
        planned.append(
            SettingsChange(
                device=name,
                presence=device.presence,
                id=secrets.token_hex(8),
                before={key: old[key] for key in concerned if key in old},
                after=dict(changes),
                wanted=wanted,
                dropped=dropped,
                needs_restart=needs_restart,
            )
        )
    return planned


def settings_view(
    device: KnownDevice, desired: DesiredSettings | None, reported: ReportedSettings | None
) -> DeviceSettingsView:
    """Return the desired and reported settings that the broker retains for a device, and what has become of them."""
    state, sentence = _status(desired, reported, device.presence)
    more: dict[str, Any] = {}
    if desired is not None:
        more = {"wanted": desired.values, "wanted_by": desired.who, "wanted_at": desired.at}
    if reported is not None:
        shared = ("values", "refused", "needs_restart", "update")
        more |= {"reported_at": reported.at, **{name: getattr(reported, name) for name in shared}}
    return DeviceSettingsView(
        device=device.device,
        presence=device.presence,
        state=state,
        sentence=sentence,
        reports=reported is not None,
        **more,
    )


def settings_after(
    change: SettingsChange, desired: DesiredSettings | None, reported: ReportedSettings | None, *, rejected: bool
) -> DeviceSettingsView:
    """Return a device's settings after a change; `rejected`: the broker has refused the message."""
    view = settings_view(KnownDevice(device=change.device, presence=change.presence), desired, reported)
    refusal = ""
    if rejected:
        refusal = "The broker has not passed it on; see its access rules."
    elif desired is not None and any(
        desired.values.get(name) != change.wanted.get(name) for name in {*change.before, *change.after}
    ):  # settings that another monitor has only added since include the change
        refusal = f"Replaced since by settings of {desired.who or 'another monitor'}."
    return replace(view, state=SettingState.REFUSED, sentence=refusal) if refusal else view


def _status(
    desired: DesiredSettings | None, reported: ReportedSettings | None, presence: Presence | None
) -> tuple[SettingState, str]:
    if desired is None:
        lost = reported is not None and reported.id is not None
        why = "The broker retains no settings for it; it keeps those that it accepted last. Set them again."
        return SettingState.NONE, why if lost else "No remote settings are requested."
    if reported is None or reported.id != desired.id:
        if presence is None or presence.gone:
            return SettingState.WAITING, "The device is offline; it takes them when it is back."
        return SettingState.SILENT, "The device has not answered; it may not listen (steering)."
    if reported.refused:
        return SettingState.REFUSED, " ".join(f"{name}: {why}" for name, why in reported.refused.items())
    if reported.needs_restart:
        names = ", ".join(reported.needs_restart)
        return SettingState.NEEDS_RESTART, f"In force after `fleet admin command reload`: {names}."
    return SettingState.IN_FORCE, "In force."

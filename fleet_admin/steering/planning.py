"""Planning of changes: actors, selected devices, values, previews and outcomes."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import Effect, check_values, effect_of
from fleet_edge.store.views import DONE, AuditEntry, MachineState, ReportedView, WantedView
from schemas.control import (
    MAX_SETTING_VALUE,
    MAX_SETTINGS,
    MAX_VERSION,
    DesiredSettings,
    Presence,
    ReportedSettings,
    SettingValue,
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
    version: int
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
    WAITING = "waiting"
    SILENT = "silent"
    AHEAD = "ahead"
    NONE = "none wanted"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    device: str
    version: int
    state: SettingState
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettingsView:
    """A device's wanted and reported settings."""

    device: str
    presence: Presence | None  # its latest; None if it has never published one
    state: SettingState
    sentence: str
    wanted_version: int = 0  # 0 if nothing is wanted
    wanted: Mapping[str, SettingValue] = field(default_factory=dict)
    wanted_by: str = ""
    wanted_at: datetime | None = None
    reported_version: int | None = None  # the latest that it has considered; None if it has never reported
    applied: int | None = None
    values: Mapping[str, SettingValue] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # why the latest were refused, by name
    needs_restart: tuple[str, ...] = ()  # accepted, in force once it reloads its model
    fixed: tuple[str, ...] = ()  # not to be set remotely, by its own configuration


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
    state: MachineState = MachineState.UNKNOWN
    retired_at: datetime | None = None
    labels: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()  # that have served it lately

    @property
    def reachable(self) -> bool:
        return self.state not in (MachineState.SILENT, MachineState.OFFLINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A set of devices. Names and labels add up; everything else narrows down."""

    devices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    everything: bool = False  # all devices that are not retired
    edge: str | None = None  # served by this edge within a day
    draft_model: str | None = None
    software: str | None = None
    reachable: bool | None = None  # neither silent nor offline, or with False the others

    def __post_init__(self) -> None:
        """Raise `SteeringError` if it selects nothing, or a name is invalid."""
        try:
            for name in self.devices:
                check_name(name)
        except InvalidName as error:
            raise SteeringError(str(error)) from None
        narrow = any(each is not None for each in (self.edge, self.draft_model, self.software, self.reachable))
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
        return (
            (self.edge is None or self.edge in each.edges)
            and (self.draft_model is None or self.draft_model == each.draft_model)
            and (self.software is None or self.software == each.software)
            and (self.reachable is None or self.reachable == each.reachable)
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
    kept: Mapping[str, WantedView],
) -> list[SettingsChange]:
    """Return the settings that devices would be wanted to have.

    What the broker retains (`desired`) goes before the log (`kept`). What devices have `reported` does not count for
    versions, since a device can report any. Raises `SteeringError` if the settings of a device exceed a message.
    """
    concerned = (*changes, *unset)
    needs_restart = tuple(name for name in concerned if effect_of(name) is Effect.RELOAD)
    planned = []
    for device in devices:
        name, said = device.device, reported.get(device.device)
        before = desired.get(name) or kept.get(name)
        old = before.values if before is not None else {}
        latest = max((each[name].version for each in (desired, kept) if name in each), default=0)
        refused = said.refused if said is not None and said.version == latest else {}
        # Settings that it has refused are dropped unless set again: it would refuse all others with them.
        dropped = tuple(key for key in refused if key in old and key not in changes)
        wanted = {key: value for key, value in {**old, **changes}.items() if key not in {*unset, *dropped}}
        if len(wanted) > MAX_SETTINGS:
            raise SteeringError(f"{len(wanted)} settings would be wanted of {name}; {MAX_SETTINGS} can be.")
        planned.append(
            SettingsChange(
                device=name,
                presence=device.presence,
                version=latest % MAX_VERSION + 1,  # a device accepts a lower version of a later time
                before={key: old[key] for key in concerned if key in old},
                after=dict(changes),
                wanted=wanted,
                dropped=dropped,
                needs_restart=needs_restart,
            )
        )
    return planned


_Reported = ReportedSettings | ReportedView


def outcome_of(
    change: SettingsChange, reported: ReportedSettings | None, *, latest: int, rejected: bool = False
) -> SetResult:
    """Return the result of a change.

    `reported` is the device's report since then, `latest` the latest wanted version (above the change's if another one
    has followed), and `rejected` whether the broker has not passed it on.
    """
    if rejected:
        state, sentence = SettingState.REFUSED, "The broker has not passed it on; see its access rules."
    else:
        state, sentence = _judge(change.presence, change.version, reported, latest=latest)
    return SetResult(device=change.device, version=change.version, state=state, sentence=sentence)


def settings_views(
    known: Mapping[str, KnownDevice],
    kept: Mapping[str, WantedView],
    heard: Mapping[str, ReportedView],
    *,
    desired: Mapping[str, DesiredSettings] | None = None,
    reported: Mapping[str, ReportedSettings] | None = None,
    devices: Collection[str] | None = None,
) -> list[DeviceSettingsView]:
    """Return devices' wanted and reported settings; what the broker retains goes before the log.

    The broker retains `desired` and `reported`, the log has `kept` and `heard`.
    """
    wanted: dict[str, DesiredSettings | WantedView] = {**kept, **(desired or {})}
    said: dict[str, _Reported] = {**heard, **(reported or {})}
    names = known.keys() | wanted.keys() | said.keys()
    return [
        _view(device, known.get(device), wanted.get(device), said.get(device))
        for device in sorted(names if devices is None else names & set(devices))
    ]


def _view(
    device: str, known: KnownDevice | None, wanted: DesiredSettings | WantedView | None, said: _Reported | None
) -> DeviceSettingsView:
    presence = known.presence if known is not None else None
    version = wanted.version if wanted is not None else 0
    state, sentence = _judge(presence, version, said, latest=version)
    if not version:
        state, sentence = SettingState.NONE, "No remote settings are requested."
    more: dict[str, Any] = {}
    if wanted is not None:
        more = {"wanted": wanted.values, "wanted_by": wanted.who, "wanted_at": wanted.at}
    if said is not None:
        more |= {name: getattr(said, name) for name in ("applied", "values", "refused", "needs_restart", "fixed")}
    return DeviceSettingsView(
        device=device,
        presence=presence,
        state=state,
        sentence=sentence,
        wanted_version=version,
        reported_version=None if said is None else said.version,
        **more,
    )


def _judge(presence: Presence | None, version: int, said: _Reported | None, *, latest: int) -> tuple[SettingState, str]:
    if said is None or said.version < version:
        if presence in {None, Presence.OFFLINE}:
            return SettingState.WAITING, "The device is offline; it takes them when it is back."
        return SettingState.SILENT, "The device has not answered; it may not listen (steering)."
    if said.version > latest:
        return SettingState.AHEAD, (
            f"The device reports version {said.version}, but {latest} is the latest that was set: it ignores these "
            "settings. Check its clock; delete its state_dir and restart it. If it reports such a version again, "
            "revoke its identity."
        )
    if said.refused:
        return SettingState.REFUSED, " ".join(f"{name}: {why}" for name, why in said.refused.items())
    if said.needs_restart:
        names = ", ".join(said.needs_restart)
        return SettingState.NEEDS_RESTART, f"In force after `fleet admin command reload`: {names}."
    return SettingState.IN_FORCE, "In force."

"""Planning of a change of settings: what would be wanted of each device, and under which version."""

from collections.abc import Collection, Iterable, Mapping

from fleet_admin.steering.errors import SteeringError
from fleet_admin.steering.selection import KnownDevice
from fleet_admin.steering.values import needs_reload
from fleet_admin.steering.views import DeviceSettingsView, SetResult, SettingsChange, SettingState
from fleet_edge.store.steering.views import ReportedView, WantedView
from schemas.control import MAX_SETTINGS, MAX_VERSION, DesiredSettings, Presence, ReportedSettings, SettingValue


def plan_changes(
    devices: Iterable[KnownDevice],
    changes: Mapping[str, SettingValue],
    *,
    unset: Collection[str],
    desired: Mapping[str, DesiredSettings],
    reported: Mapping[str, ReportedSettings],
    kept: Mapping[str, WantedView],
) -> list[SettingsChange]:
    """Return what would be wanted of devices.

    Args:
        devices: Whom it concerns.
        changes: Values by name; what else is wanted of a device stays.
        unset: Settings that are no longer wanted.
        desired: What the broker keeps, by device; it goes before the log.
        reported: What the devices have said; it has no say in the versions, since a device can report any.
        kept: What the log has as wanted.

    Raises:
        SteeringError: More would be wanted of a device than a message holds.
    """
    return [
        _plan(
            device,
            changes,
            unset=unset,
            before=desired.get(device.device) or kept.get(device.device),
            versions=[each[device.device].version for each in (desired, kept) if device.device in each],
            said=reported.get(device.device),
        )
        for device in devices
    ]


def _plan(
    device: KnownDevice,
    changes: Mapping[str, SettingValue],
    *,
    unset: Collection[str],
    before: DesiredSettings | WantedView | None,
    versions: Collection[int],
    said: ReportedSettings | None,
) -> SettingsChange:
    latest = max(versions, default=0)
    old = before.values if before is not None else {}
    refused = said.refused if said is not None and said.version == latest else {}
    # What it has refused is wanted no more, unless it is again: it would refuse all else with it.
    dropped = tuple(name for name in refused if name in old and name not in changes)
    gone = {*unset, *dropped}
    wanted = {name: value for name, value in {**old, **changes}.items() if name not in gone}
    if len(wanted) > MAX_SETTINGS:
        raise SteeringError(f"{len(wanted)} settings would be wanted of {device.device}; {MAX_SETTINGS} can be.")
    concerned = (*changes, *unset)
    return SettingsChange(
        device=device.device,
        presence=device.presence,
        version=latest % MAX_VERSION + 1,  # a device takes a lower version that was written later
        before={name: old[name] for name in concerned if name in old},
        after=dict(changes),
        wanted=wanted,
        dropped=dropped,
        needs_restart=tuple(name for name in concerned if needs_reload(name)),
    )


_Reported = ReportedSettings | ReportedView


def outcome_of(
    change: SettingsChange, reported: ReportedSettings | None, *, latest: int, rejected: bool = False
) -> SetResult:
    """Return what has become of a change.

    Args:
        change: As it was sent.
        reported: What the device has said since; None if nothing.
        latest: The latest version that was wanted of the device: above the change's if another change has followed.
        rejected: Whether the broker has not passed it on.
    """
    if rejected:
        state, sentence = SettingState.REFUSED, "The broker has not passed it on; see its access rules."
    else:
        state, sentence = _judge(change.presence, change.version, reported, latest=latest)
    return SetResult(device=change.device, version=change.version, state=state, sentence=sentence)


def device_view(
    device: str,
    known: KnownDevice | None,
    *,
    desired: DesiredSettings | None,
    reported: ReportedSettings | None,
    kept: WantedView | None,
    heard: ReportedView | None,
) -> DeviceSettingsView:
    """Return a device's settings as they are wanted and reported; what the broker keeps goes before the log.

    Args:
        device: Its name.
        known: What is known of it.
        desired: As the broker keeps it.
        reported: Likewise.
        kept: What was wanted, as the log has it.
        heard: What was reported, likewise.
    """
    wanted = desired if desired is not None else kept
    said: _Reported | None = reported if reported is not None else heard
    presence = known.presence if known is not None else None
    version = wanted.version if wanted is not None else 0
    state, sentence = _judge(presence, version, said, latest=version)
    if not version:
        state, sentence = SettingState.NONE, "Nothing is wanted of it from afar."
    return DeviceSettingsView(
        device=device,
        presence=presence,
        state=state,
        sentence=sentence,
        wanted_version=version,
        wanted=wanted.values if wanted is not None else {},
        wanted_by=wanted.who if wanted is not None else "",
        wanted_at=wanted.at if wanted is not None else None,
        reported_version=None if said is None else said.version,
        applied=None if said is None else said.applied,
        values=said.values if said is not None else {},
        refused=said.refused if said is not None else {},
        needs_restart=said.needs_restart if said is not None else (),
        fixed=said.fixed if said is not None else (),
    )


def views_of_log(
    known: Mapping[str, KnownDevice],
    kept: Mapping[str, WantedView],
    heard: Mapping[str, ReportedView],
    *,
    devices: Collection[str] | None = None,
) -> list[DeviceSettingsView]:
    """Return the settings of devices as the log has them, without asking the broker."""
    names = known.keys() | kept.keys() | heard.keys()
    return [
        device_view(
            device, known.get(device), desired=None, reported=None, kept=kept.get(device), heard=heard.get(device)
        )
        for device in sorted(names & set(devices) if devices else names)
    ]


def _judge(presence: Presence | None, version: int, said: _Reported | None, *, latest: int) -> tuple[SettingState, str]:
    if said is None or said.version < version:
        if presence in {None, Presence.OFFLINE}:
            return SettingState.WAITING, "The device is offline; it takes them when it is back."
        return SettingState.SILENT, "The device has not answered; it may not listen (steering)."
    if said.version > latest:
        return SettingState.AHEAD, (
            f"The device reports version {said.version}, but {latest} is the latest that was set: it ignores these "
            "settings. Check its clock; delete its steering_dir and restart it. If it reports such a version again, "
            "revoke its identity."
        )
    if said.refused:
        return SettingState.REFUSED, _reasons(said.refused)
    if said.needs_restart:
        names = ", ".join(said.needs_restart)
        return SettingState.NEEDS_RESTART, f"In force after `fleet admin command reload`: {names}."
    return SettingState.IN_FORCE, "In force."


def _reasons(refused: Mapping[str, str]) -> str:
    return " ".join(f"{name}: {why}" for name, why in refused.items())

"""Planning of a change of settings: what would be wanted of each device, and under which version."""

from collections.abc import Collection, Iterable, Mapping

from fleet_admin.steering.errors import SteeringError
from fleet_admin.steering.selection import KnownDevice
from fleet_admin.steering.values import needs_reload
from fleet_admin.steering.views import SettingsChange
from fleet_edge.store.steering.views import WantedView
from schemas.steering import MAX_SETTINGS, MAX_VERSION, DesiredSettings, ReportedSettings, SettingValue

__all__ = ["plan_changes"]


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

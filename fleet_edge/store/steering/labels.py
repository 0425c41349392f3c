"""Labels of devices: words by which an administrator chooses several at once, `hall_a` say."""

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import Connection, delete, insert, select, update

from fleet_edge.store.models import DeviceRow, LabelRow


def read_labels(connection: Connection, *, devices: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Return the labels of each device that has any, by its name; of all devices unless some are named."""
    query = select(LabelRow.device, LabelRow.label)
    if devices is not None:
        query = query.where(LabelRow.device.in_(devices))
    found: dict[str, tuple[str, ...]] = {}
    for row in connection.execute(query.order_by(LabelRow.device, LabelRow.label)):
        found[row.device] = (*found.get(row.device, ()), row.label)
    return found


def devices_with_labels(connection: Connection, labels: Collection[str]) -> frozenset[str]:
    """Return the devices that have at least one of these labels."""
    query = select(LabelRow.device).where(LabelRow.label.in_(labels))
    return frozenset(connection.scalars(query))


def add_labels(connection: Connection, wanted: Mapping[str, Collection[str]], *, who: str, now: datetime) -> None:
    """Give devices labels, by the device's name; one that it has already stays as it is."""
    have = read_labels(connection, devices=list(wanted))
    rows = [
        {"device": device, "label": label, "at": now, "who": who}
        for device, labels in wanted.items()
        for label in sorted(set(labels) - set(have.get(device, ())))
    ]
    if rows:
        connection.execute(insert(LabelRow), rows)


def remove_labels(connection: Connection, unwanted: Mapping[str, Collection[str]]) -> None:
    """Take labels off devices, by the device's name; one that it does not have is passed over."""
    for device, labels in unwanted.items():
        connection.execute(delete(LabelRow).where(LabelRow.device == device, LabelRow.label.in_(labels)))


def retired(connection: Connection) -> dict[str, datetime]:
    """Return the devices that are out of service, and since when."""
    query = select(DeviceRow.device, DeviceRow.retired_at).where(DeviceRow.retired_at.is_not(None))
    return {row.device: row.retired_at for row in connection.execute(query)}


def retire(connection: Connection, device: str, at: datetime | None) -> bool:
    """Take a device out of service, or with None put it back; return whether the log knows it."""
    known = connection.execute(update(DeviceRow).where(DeviceRow.device == device).values(retired_at=at))
    return known.rowcount > 0

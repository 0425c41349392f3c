"""What an administrator has decided: labels, wanted settings, commands, and the audit log of all changes."""

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from fleet_edge.store.engine import insert_into
from fleet_edge.store.models import (
    AuditRow,
    Base,
    CommandRow,
    DeviceRow,
    LabelRow,
    ReportedSettingsRow,
    WantedSettingsRow,
    select_fields,
)
from fleet_edge.store.views import AuditEntry, AuditView, CommandView, ReportedView, WantedView
from schemas.printable import printable_line

if TYPE_CHECKING:
    from schemas.control import CommandRequest, DesiredSettings, ReportedSettings


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
    query = select(LabelRow.device).where(LabelRow.label.in_(labels))
    return frozenset(connection.scalars(query))


def add_labels(connection: Connection, wanted: Mapping[str, Collection[str]], *, who: str, now: datetime) -> None:
    """Add labels by device; existing ones stay as they are."""
    have = read_labels(connection, devices=list(wanted))
    rows = [
        {"device": device, "label": label, "at": now, "who": who}
        for device, labels in wanted.items()
        for label in sorted(set(labels) - set(have.get(device, ())))
    ]
    if rows:
        connection.execute(insert(LabelRow), rows)


def remove_labels(connection: Connection, unwanted: Mapping[str, Collection[str]]) -> None:
    """Remove labels by device; missing ones are skipped."""
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


def keep_wanted(connection: Connection, wanted: "Mapping[str, DesiredSettings]", *, now: datetime) -> None:
    """Store what devices are wanted to have, by the device's name, replacing what was wanted before."""
    rows = [
        {"device": device, "version": each.version, "values": each.values, "who": each.who, "at": each.at or now}
        for device, each in sorted(wanted.items())
    ]
    _replace(connection, WantedSettingsRow, rows)


def keep_reported(connection: Connection, reported: "Mapping[str, ReportedSettings]", *, now: datetime) -> None:
    """Store what devices report of their settings, by the device's name, replacing what they reported before."""
    shared = ("version", "applied", "values", "refused", "needs_restart", "fixed", "at")
    rows = [
        {"device": device, "heard_at": now, **{name: getattr(each, name) for name in shared}}
        for device, each in sorted(reported.items())
    ]
    _replace(connection, ReportedSettingsRow, rows)


def read_wanted(connection: Connection, *, devices: Collection[str] | None = None) -> dict[str, WantedView]:
    """Return what devices are wanted to have, by the device's name; of all unless some are named."""
    return {row["device"]: WantedView(**row) for row in _settings(connection, WantedSettingsRow, devices)}


def read_reported(connection: Connection, *, devices: Collection[str] | None = None) -> dict[str, ReportedView]:
    """Return what devices report, by the device's name; of all unless some are named."""
    return {row["device"]: ReportedView(**row) for row in _settings(connection, ReportedSettingsRow, devices)}


def _settings(connection: Connection, kind: type[Base], devices: Collection[str] | None) -> Iterable[RowMapping]:
    query = select_fields(kind)
    if devices is not None:
        query = query.where(kind.device.in_(devices))
    return connection.execute(query.order_by(kind.device)).mappings()


def known_devices(connection: Connection) -> frozenset[str]:
    """Return the devices that have or had wanted or reported settings."""
    rows = [
        *connection.scalars(select(WantedSettingsRow.device)),
        *connection.scalars(select(ReportedSettingsRow.device)),
    ]
    return frozenset(rows)


def forget_settings(connection: Connection, devices: Iterable[str]) -> None:
    """Delete the wanted and reported settings of devices."""
    names = list(devices)
    for row in (WantedSettingsRow, ReportedSettingsRow):
        connection.execute(delete(row).where(row.device.in_(names)))


def _replace(connection: Connection, kind: type[Base], rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    statement = insert_into(kind, connection.dialect.name)
    columns = {name: statement.excluded[name] for name in rows[0] if name != "device"}
    connection.execute(statement.on_conflict_do_update(index_elements=["device"], set_=columns), rows)


SILENT = "silent"
"""Outcome of a command that was not answered in time."""

CommandEnd = tuple[str, str]


def keep_commands(
    connection: Connection, requests: "Mapping[str, CommandRequest]", *, batch: str, now: datetime
) -> None:
    """Store commands that are about to be sent, by device."""
    rows = [
        {
            "id": each.id,
            "batch": batch,
            "device": device,
            "command": each.command,
            "arguments": each.arguments,
            "who": each.who,
            "at": now,
            "deadline_at": each.deadline,
        }
        for device, each in requests.items()
    ]
    if rows:
        connection.execute(insert(CommandRow), rows)


def end_commands(connection: Connection, ended: Mapping[str, CommandEnd], *, now: datetime) -> None:
    """Store the outcomes of commands, by their ids."""
    for command, (outcome, sentence) in ended.items():
        values = {"outcome": outcome, "sentence": sentence, "ended_at": now}
        connection.execute(update(CommandRow).where(CommandRow.id == command).values(values))


def read_commands(
    connection: Connection,
    *,
    since: datetime | None = None,
    devices: Sequence[str] = (),
    batch: str | None = None,
    limit: int = 100,
) -> list[CommandView]:
    """Return commands, the latest first; conditions left out admit all."""
    query = select(CommandRow)
    if since is not None:
        query = query.where(CommandRow.at >= since)
    if devices:
        query = query.where(CommandRow.device.in_(devices))
    if batch is not None:
        query = query.where(CommandRow.batch == batch)
    rows = connection.execute(query.order_by(CommandRow.at.desc(), CommandRow.device, CommandRow.id).limit(limit))
    return [CommandView(**row) for row in rows.mappings()]


_LONGEST: Final = 2000  # characters of each text: an entry is a line, not an archive


def record_audit(connection: Connection, entries: Sequence[AuditEntry], *, now: datetime) -> list[str]:
    rows = [
        {"id": uuid.uuid4().hex, "at": now}
        | {field.name: value and _line(value) for field in fields(AuditEntry) for value in [getattr(each, field.name)]}
        for each in entries
    ]
    if rows:
        connection.execute(insert(AuditRow), rows)
    return [str(row["id"]) for row in rows]


def end_audit(connection: Connection, outcomes: Mapping[str, str]) -> None:
    for entry, outcome in outcomes.items():
        connection.execute(update(AuditRow).where(AuditRow.id == entry).values(outcome=_line(outcome)))


def read_audit(
    connection: Connection,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    who: str | None = None,
    subject: str | None = None,
    action: str | None = None,
    limit: int = 100,
) -> list[AuditView]:
    """Return actions, the latest first; conditions left out admit all."""
    query = select(*(getattr(AuditRow, field.name) for field in fields(AuditView)))
    if since is not None:
        query = query.where(AuditRow.at >= since)
    if until is not None:
        query = query.where(AuditRow.at < until)
    chosen = {"who": who, "subject": subject, "action": action}
    query = query.where(*(getattr(AuditRow, name) == value for name, value in chosen.items() if value is not None))
    rows = connection.execute(query.order_by(AuditRow.at.desc(), AuditRow.id).limit(limit)).mappings()
    return [AuditView(**row) for row in rows]


def _line(text: str) -> str:
    shown = printable_line(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"

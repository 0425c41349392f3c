"""What an administrator has decided: labels, retired devices, and the audit log of all changes."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, insert, select, update

from fleet_edge.session_log.tables import AUDIT, DEVICES, LABELS
from fleet_edge.session_log.views import AuditEntry
from schemas.printable import printable_line


def read_labels(connection: Connection, *, devices: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Return the labels of each device that has any, by its name; of all devices unless some are named."""
    query = select(LABELS.c.device, LABELS.c.label)
    if devices is not None:
        query = query.where(LABELS.c.device.in_(devices))
    found: dict[str, tuple[str, ...]] = {}
    for row in connection.execute(query.order_by(LABELS.c.device, LABELS.c.label)):
        found[row.device] = (*found.get(row.device, ()), row.label)
    return found


def add_labels(connection: Connection, wanted: Mapping[str, Collection[str]], *, who: str, now: datetime) -> None:
    """Add labels by device; existing ones stay as they are."""
    have = read_labels(connection, devices=list(wanted))
    rows = [
        {"device": device, "label": label, "at": now, "who": who}
        for device, labels in wanted.items()
        for label in sorted(set(labels) - set(have.get(device, ())))
    ]
    if rows:
        connection.execute(insert(LABELS), rows)


def retire(connection: Connection, device: str, at: datetime | None) -> bool:
    """Retire a device at this time, or return it to service (None); return whether the log knows it."""
    known = connection.execute(update(DEVICES).where(DEVICES.c.device == device).values(retired_at=at))
    return known.rowcount > 0


_LONGEST: Final = 2000  # characters of each text: an entry is a line, not an archive


def record_audit(connection: Connection, entries: Sequence[AuditEntry], *, now: datetime) -> list[str]:
    rows = [
        {"id": uuid.uuid4().hex, "at": now}
        | {
            field.name: value and audit_text(value)
            for field in fields(AuditEntry)
            for value in [getattr(each, field.name)]
        }
        for each in entries
    ]
    if rows:
        connection.execute(insert(AUDIT), rows)
    return [str(row["id"]) for row in rows]


def audit_text(text: str) -> str:
    shown = printable_line(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"

"""Settings that devices are wanted to have and those that they have reported, as an administrator has last heard."""

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, select

from fleet_edge.store.models import Base, ReportedSettingsRow, WantedSettingsRow
from fleet_edge.store.steering.views import ReportedView, WantedView
from fleet_edge.store.upserts import insert_into
from schemas.control import DesiredSettings, ReportedSettings


def keep_wanted(connection: Connection, wanted: Mapping[str, DesiredSettings], *, now: datetime) -> None:
    """Keep what devices are wanted to have, by the device's name, in place of what was wanted before."""
    rows = [
        {
            "device": device,
            "version": each.version,
            "settings": json.dumps(each.values),
            "who": each.who,
            "at": each.at or now,
        }
        for device, each in sorted(wanted.items())
    ]
    _replace(connection, WantedSettingsRow, rows)


def keep_reported(connection: Connection, reported: Mapping[str, ReportedSettings], *, now: datetime) -> None:
    """Keep what devices have said of their settings, by the device's name, in place of what they have said before."""
    rows = [
        {
            "device": device,
            "version": each.version,
            "applied": each.applied,
            "settings": json.dumps(each.values),
            "refused": json.dumps(each.refused),
            "needs_restart": json.dumps(each.needs_restart),
            "fixed": json.dumps(each.fixed),
            "at": each.at,
            "heard_at": now,
        }
        for device, each in sorted(reported.items())
    ]
    _replace(connection, ReportedSettingsRow, rows)


def read_wanted(connection: Connection, *, devices: Collection[str] | None = None) -> dict[str, WantedView]:
    """Return what devices are wanted to have, by the device's name; of all unless some are named."""
    query = select(WantedSettingsRow.__table__)
    if devices is not None:
        query = query.where(WantedSettingsRow.device.in_(devices))
    return {
        row.device: WantedView(
            device=row.device, version=row.version, values=json.loads(row.settings), who=row.who, at=row.at
        )
        for row in connection.execute(query.order_by(WantedSettingsRow.device))
    }


def read_reported(connection: Connection, *, devices: Collection[str] | None = None) -> dict[str, ReportedView]:
    """Return what devices have said, by the device's name; of all unless some are named."""
    query = select(ReportedSettingsRow.__table__)
    if devices is not None:
        query = query.where(ReportedSettingsRow.device.in_(devices))
    return {
        row.device: ReportedView(
            device=row.device,
            version=row.version,
            applied=row.applied,
            values=json.loads(row.settings),
            refused=json.loads(row.refused),
            needs_restart=tuple(json.loads(row.needs_restart)),
            fixed=tuple(json.loads(row.fixed)),
            at=row.at,
            heard_at=row.heard_at,
        )
        for row in connection.execute(query.order_by(ReportedSettingsRow.device))
    }


def known_devices(connection: Connection) -> frozenset[str]:
    """Return the devices of which something is or was wanted, or that have reported."""
    rows = [
        *connection.scalars(select(WantedSettingsRow.device)),
        *connection.scalars(select(ReportedSettingsRow.device)),
    ]
    return frozenset(rows)


def forget_settings(connection: Connection, devices: Iterable[str]) -> None:
    """Forget what devices are wanted to have, and what they have said."""
    names = list(devices)
    for row in (WantedSettingsRow, ReportedSettingsRow):
        connection.execute(delete(row).where(row.device.in_(names)))


def _replace(connection: Connection, kind: type[Base], rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    statement = insert_into(kind, connection.dialect.name)
    columns = {name: statement.excluded[name] for name in rows[0] if name != "device"}
    connection.execute(statement.on_conflict_do_update(index_elements=["device"], set_=columns), rows)

"""Queries on edges: which there are, and what they do."""

from dataclasses import fields
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, RowMapping, select

from fleet_edge.store.models import EdgeRow
from fleet_edge.store.states import edge_state
from fleet_edge.store.views import EdgeView

_COLUMNS: Final = tuple(getattr(EdgeRow, field.name) for field in fields(EdgeView) if field.name != "state")


def edge(connection: Connection, name: str, *, now: datetime) -> EdgeView | None:
    """Return one edge; None if the log does not know it."""
    row = connection.execute(select(*_COLUMNS).where(EdgeRow.edge == name)).mappings().one_or_none()
    return None if row is None else _view(row, now)


def edges(connection: Connection, *, now: datetime) -> list[EdgeView]:
    """Return all edges with their latest load, by name."""
    query = select(*_COLUMNS).order_by(EdgeRow.edge)
    return [_view(row, now) for row in connection.execute(query).mappings()]


def _view(row: RowMapping, now: datetime) -> EdgeView:
    since_load = None if row["load_at"] is None else now - row["load_at"]
    return EdgeView(state=edge_state(row["presence"], since_load=since_load), **row)

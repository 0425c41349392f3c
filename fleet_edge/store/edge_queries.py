"""Queries on edges: which there are, and what they do."""

from dataclasses import fields
from typing import Final

from sqlalchemy import Connection, select

from fleet_edge.store.models import EdgeRow
from fleet_edge.store.views import EdgeView

__all__ = ["edge", "edges"]

_COLUMNS: Final = tuple(getattr(EdgeRow, field.name) for field in fields(EdgeView))


def edge(connection: Connection, name: str) -> EdgeView | None:
    """Return one edge; None if the log does not know it."""
    row = connection.execute(select(*_COLUMNS).where(EdgeRow.edge == name)).mappings().one_or_none()
    return None if row is None else EdgeView(**row)


def edges(connection: Connection) -> list[EdgeView]:
    """Return all edges with their latest load, by name."""
    query = select(*_COLUMNS).order_by(EdgeRow.edge)
    return [EdgeView(**row) for row in connection.execute(query).mappings()]

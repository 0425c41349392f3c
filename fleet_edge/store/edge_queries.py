"""Queries on edges: which there are, and what they do."""

from dataclasses import fields
from typing import Final

from sqlalchemy import Connection, select

from fleet_edge.store.models import EdgeRow
from fleet_edge.store.views import EdgeView

__all__ = ["edges"]

_COLUMNS: Final = tuple(getattr(EdgeRow, field.name) for field in fields(EdgeView))


def edges(connection: Connection) -> list[EdgeView]:
    """Return all edges with their latest load, by name."""
    query = select(*_COLUMNS).order_by(EdgeRow.edge)
    return [EdgeView(**row) for row in connection.execute(query).mappings()]

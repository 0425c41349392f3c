"""Upserts: inserts that can say what becomes of a row that exists, in the dialect of either database."""

from typing import TYPE_CHECKING

from fleet_edge.store.models import Base

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite


def insert_into(row: type[Base], dialect: str) -> "sqlite.Insert | postgresql.Insert":
    """Return an insert into a table, for `sqlite` or `postgresql`. Whoever only reads loads neither dialect for it."""
    if dialect == "sqlite":
        from sqlalchemy.dialects import sqlite  # noqa: PLC0415

        return sqlite.insert(row)
    from sqlalchemy.dialects import postgresql  # noqa: PLC0415

    return postgresql.insert(row)

"""Meters: tokens of honest devices over time, and rows of the session log."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

__all__ = ["Throughput", "rows_beside"]


@dataclass(slots=True)
class Throughput:
    """Tokens that were committed, with the moment of each commit.

    Attributes:
        texts: Written to their end.
        failed: Sentences of those that were not.
        differing: Texts that came out otherwise than the record.
        resumes: How often sessions were opened again.
    """

    texts: int = 0
    failed: list[str] = field(default_factory=list)
    differing: int = 0
    resumes: int = 0
    _commits: list[tuple[float, int]] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        """Take an event of an honest device's process."""
        match event:
            case {"event": "tokens", "at": at, "number": number}:
                self._commits.append((at, number))
            case {"event": "text", "resumes": resumes, "same": same}:
                self.texts += 1
                self.resumes += resumes
                self.differing += not same
            case {"event": "failed", "sentence": sentence}:
                self.failed.append(sentence)

    def rate(self, begin: float, end: float) -> float:
        """Return tokens a second between two moments (monotonic)."""
        return sum(number for at, number in list(self._commits) if begin <= at < end) / (end - begin)

    def count(self, begin: float) -> int:
        """Return tokens since a moment."""
        return sum(number for at, number in list(self._commits) if at >= begin)


def rows_beside(database: Path, honest: Collection[str]) -> int:
    """Return the rows of all tables that are not those of honest devices' own work.

    A row counts for the device that it names, or that its session names; one that names nobody is not honest work.
    """
    engine = sa.create_engine(f"sqlite:///file:{database}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            tables = sa.MetaData()
            tables.reflect(connection)
            return sum(
                int(connection.execute(_not_of(table, tables.tables, honest)).scalar_one())
                for table in tables.sorted_tables
            )
    finally:
        engine.dispose()


def _not_of(table: sa.Table, tables: Any, honest: Collection[str]) -> sa.Select[Any]:  # noqa: ANN401 - sqlalchemy's
    count = sa.select(sa.func.count()).select_from(table)
    if "device" in table.c:
        device = table.c.device
    elif "session" in table.c and "sessions" in tables:
        sessions = tables["sessions"]
        count = count.outerjoin_from(table, sessions, table.c.session == sessions.c.session)
        device = sessions.c.device
    else:
        return count
    return count.where(sa.or_(device.is_(None), device.not_in(sorted(honest))))

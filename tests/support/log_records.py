"""The session log as tests read it: records by what has happened, and rows of a database."""

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Final

import sqlalchemy as sa

from fleet_edge.session_log.records import Record


def has(record: Record, table: str, column: str = "") -> bool:
    return table in record.rows and (not column or column in record.rows[table])


_KINDS: Final[Mapping[str, Callable[[Record], bool]]] = {
    "opened": lambda record: has(record, "segments", "open_bytes"),
    "progress": lambda record: has(record, "segments", "tokens"),
    "left": lambda record: has(record, "segments", "reason") and not has(record, "sessions"),
    "closed": lambda record: has(record, "segments", "reason") and has(record, "sessions"),
    "reported": lambda record: has(record, "reported_closes") or (
        has(record, "sessions") and not has(record, "segments")
    ),
    "round": lambda record: has(record, "rounds"),
    "device": lambda record: has(record, "devices", "state_at"),
    "telemetry": lambda record: has(record, "devices", "telemetry_at"),
    "edge": lambda record: has(record, "edges", "state_at"),
    "load": lambda record: has(record, "edge_loads"),
    "event": lambda record: has(record, "events"),
    "quarantine": lambda record: has(record, "quarantines"),
    "lift": lambda record: has(record, "quarantine_lifts"),
}  # fmt: skip


def values_of(record: Record) -> SimpleNamespace:
    """Return the values of all rows of a record, the device's own counters apart."""
    values: dict[str, Any] = {"at": record.at}
    for row in record.rows.values():
        values |= row
    if "end_code" in values:
        values |= {"code": values["end_code"], "sentence": values["end_sentence"]}
    counters = {name.removeprefix("device_"): value for name, value in values.items() if name.startswith("device_")}
    return SimpleNamespace(**values, counters=SimpleNamespace(**counters) if counters else None)


def of_kind(records: Iterable[Record], kind: str) -> list[SimpleNamespace]:
    return [values_of(record) for record in records if _KINDS[kind](record)]


def rows_of(url: str, query: str) -> list[dict[str, Any]]:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.text(query)).mappings()]
    finally:
        engine.dispose()

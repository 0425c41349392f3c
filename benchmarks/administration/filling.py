"""Fill a session log as edges would have, in bounded memory; what is written ends now.

Most sessions have one segment, few move to another edge, the latest are still open, one in a hundred is traced. There
are more of them by day than by night. The rollups are then made as an edge makes them.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Engine, Table, insert

from fleet_edge.store.models import Base, DeviceRow, EdgeRow, EventRow, RoundRow, SegmentRow, SessionRow
from fleet_edge.store.periods import Grain, floor, following, mark_stale
from fleet_edge.store.records import segment_number
from fleet_edge.store.rolling import roll_up

_BATCH: Final = 10_000
_CACHE_KB: Final = 500_000  # ids are random, and so is where each goes
_HOUR: Final = timedelta(hours=1)
_MS: Final = timedelta(milliseconds=1)
_TABLES: Final[Sequence[type[Base]]] = (SessionRow, SegmentRow, RoundRow, EventRow)
_REASONS: Final = {"stop": 60, "length": 30, "failed": 4, "lost": 3, "cancelled": 3}

_RARE: Final = "edge-rare"

Row = dict[str, Any]
Progress = Callable[[str, float], None]
"""Called with what is being done, and which share of it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is written."""

    sessions: int
    devices: int
    days: int
    edges: int = 4


def name_of(device: int) -> str:
    return f"gateway-{device:05}"


def _edges(scale: Scale) -> list[str]:
    return [f"edge-{number}" for number in range(scale.edges)]


def fill(engine: Engine, scale: Scale, *, now: datetime, progress: Progress, seed: int = 13) -> None:
    """Write all of it, and make its rollups.

    Args:
        engine: Of an empty database.
        scale: How much.
        now: The time at which it ends (aware).
        progress: Notified of each batch and of each hour that is rolled up.
        seed: Of all that is drawn.
    """
    chance = random.Random(seed)
    begin = now - timedelta(days=scale.days)
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:  # the one connection that is used from here on
            connection.exec_driver_sql("PRAGMA synchronous = OFF")
            connection.exec_driver_sql(f"PRAGMA cache_size = -{_CACHE_KB}")
    with engine.begin() as connection:
        seen = {"first_seen_at": begin, "seen_at": now, "presence": "online", "software": "0.2.0", "state_at": now}
        models = {"draft_model": "SmolLM2-135M", "quantization": "Q4_0"}
        devices = [{"device": name_of(number), **models, **seen} for number in range(scale.devices)]
        connection.execute(insert(DeviceRow), devices)
        edges = [{"edge": name, "target": "SmolLM2", **seen} for name in (*_edges(scale), _RARE)]
        connection.execute(insert(EdgeRow), edges)
    indexes = [index for row in _TABLES if isinstance(row.__table__, Table) for index in row.__table__.indexes]
    with engine.begin() as connection:  # sorted once, they take a fraction of the time
        for index in indexes:
            index.drop(connection)
    rows: dict[type[Base], list[Row]] = {table: [] for table in _TABLES}
    for number, at in enumerate(_times(chance, begin, now, scale.sessions)):
        for table, row in _session(chance, at, scale, now):
            rows[table].append(row)
        if len(rows[SessionRow]) == _BATCH:
            _write(engine, rows)
            progress("filling", number / scale.sessions)
    _write(engine, rows)
    with engine.begin() as connection:
        for number, index in enumerate(indexes):
            progress("indexing", number / len(indexes))
            index.create(connection)
    _make_rollups(engine, begin, now, progress)


def _times(chance: random.Random, begin: datetime, now: datetime, sessions: int) -> Iterator[datetime]:
    """Yield when each session opens, in order: four times as many in the early afternoon as in the early morning."""
    hours = [begin + number * _HOUR for number in range(math.ceil((now - begin) / _HOUR))]
    weights = [1.0 - 0.6 * math.cos(2 * math.pi * (hour.hour - 2) / 24) for hour in hours]
    share, opened = 0.0, 0
    for hour, weight in zip(hours, weights, strict=True):
        share += weight
        number = round(sessions * share / sum(weights)) - opened
        opened += number
        yield from sorted(hour + min(_HOUR, now - hour) * chance.random() for _ in range(number))


def _make_rollups(engine: Engine, begin: datetime, now: datetime, progress: Progress) -> None:
    hour, hours = floor(Grain.HOUR, begin), []
    while hour <= now:
        hours.append(hour)
        hour = following(Grain.HOUR, hour)
    with engine.begin() as connection:
        mark_stale(connection, hours, writer="filling")
    made = 0

    def enough() -> bool:
        nonlocal made
        made += 1
        progress("rolling up", min(1.0, made / len(hours)))
        return False

    roll_up(engine, now=now, enough=enough)


def _write(engine: Engine, rows: Mapping[type[Base], list[Row]]) -> None:
    with engine.begin() as connection:
        for table, own in rows.items():
            if own:
                connection.execute(insert(table), own)
            own.clear()


def _session(chance: random.Random, at: datetime, scale: Scale, now: datetime) -> Iterator[tuple[type[Base], Row]]:
    session, device = f"{chance.getrandbits(64):016x}", name_of(chance.randrange(scale.devices))
    app = chance.choice((None, "alarms", "reports"))
    quantization = chance.choice(("Q4_0", "Q4_0", "Q2_K"))
    models = {"draft_model": "SmolLM2-135M", "quantization": quantization, "target": "SmolLM2"}
    # One edge has served next to nothing, which is the hardest to find.
    edge = _RARE if chance.random() < 1e-5 else chance.choice(_edges(scale))
    moved = chance.random() < 0.02
    length = timedelta(milliseconds=chance.randrange(500, 60_000))
    open_still = now - at < timedelta(minutes=1)
    reason = None if open_still else chance.choices([*_REASONS], [*_REASONS.values()])[0]
    ended = None if open_still else at + length
    edges = [edge, chance.choice(_edges(scale))] if moved else [edge]
    segments = [
        _segment(chance, at + number * length / 2, length / len(edges), served)
        | {"session": session, "device": device, "app": app, "closed_at": ended, "reason": reason, **models}
        for number, served in enumerate(edges)
    ]
    tokens = sum(segment["tokens"] for segment in segments)
    last = segments[-1]
    yield (
        SessionRow,
        {
            "session": session,
            "device": device,
            "app": app,
            "opened_at": at,
            "last_at": at + length,
            "last_segment": last["segment"],
            "described_by": segments[0]["segment"],
            **models,
            "mode": "coupled" if chance.random() < 0.3 else "residual",
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 0.95,
            "seed": chance.getrandbits(64),
            "prompt_tokens": chance.randrange(10, 500),
            "max_new_tokens": 256,
            "reason": reason,
            "closed_at": ended,
            "tokens": None if open_still else tokens,
            "device_counted_at": ended,
            "device_tokens": tokens,
            "device_rounds": last["rounds"],
            "device_drafted": last["drafted"],
            "device_tested": last["tested"],
            "device_accepted": last["accepted"],
            "device_uplink_bytes": last["uplink_bytes"],
            "device_downlink_bytes": last["downlink_bytes"],
            "device_draft_ms": 13.0 * last["drafted"],
            "device_wait_ms": length / _MS / 2,
            "device_wall_ms": length / _MS,
            "device_unverified": 0,
            "edge": last["edge"],
            "edge_segment": last["segment"],
            "moved": len(set(edges)) > 1,
        },
    )
    for segment in segments:
        yield SegmentRow, segment
    if chance.random() < 0.01:
        yield from _rounds(chance, segments[0], at)
    if chance.random() < 0.1:
        yield EventRow, _event(chance, session, device, edge, at)


def _segment(chance: random.Random, at: datetime, length: timedelta, edge: str) -> Row:
    rounds = chance.randrange(1, 60)
    drafted, tested = 4 * rounds, 3 * rounds
    accepted = int(tested * chance.uniform(0.5, 0.9))
    return {
        "segment": segment_number(at),
        "edge": edge,
        "resumed_tokens": 0,
        "open_bytes": 150,
        "duration_ms": length / _MS,
        "first_token_ms": chance.lognormvariate(5, 0.6),
        "gap_p95_ms": chance.lognormvariate(3.5, 0.6),
        "tokens": accepted + rounds,
        "rounds": rounds,
        "drafted": drafted,
        "tested": tested,
        "accepted": accepted,
        "uplink_bytes": 48 * rounds,
        "downlink_bytes": 32 * rounds,
        "queue_ms": rounds * chance.lognormvariate(1, 0.5),
        "compute_ms": rounds * chance.lognormvariate(3.5, 0.3),
        "batch_sum": rounds * chance.randrange(1, 16),
    }


def _rounds(chance: random.Random, segment: Row, at: datetime) -> Iterator[tuple[type[Base], Row]]:
    for number in range(10):
        yield (
            RoundRow,
            {
                "session": segment["session"],
                "segment": segment["segment"],
                "round": number,
                "base": 4 * number,
                "drafted": 4,
                "tested": 3,
                "accepted": 2,
                "batch": chance.randrange(1, 16),
                "uplink_bytes": 48,
                "downlink_bytes": 32,
                "form": "sparse",
                "queue_ms": 2.0,
                "compute_ms": 40.0,
                "at": at + timedelta(milliseconds=50 * number),
            },
        )


def _event(chance: random.Random, session: str, device: str, edge: str, at: datetime) -> Row:
    kind, code, severity = chance.choice(
        (("refused", "busy", "warning"), ("fault", "desync", "warning"), ("session", "resumed", "info"))
    )
    return {
        "id": f"{chance.getrandbits(128):032x}",
        "edge": edge,
        "device": device,
        "session": session,
        "kind": kind,
        "code": code,
        "severity": severity,
        "sentence": "Something has happened, and this says what it was.",
        "at": at,
        "last_at": at,
    }

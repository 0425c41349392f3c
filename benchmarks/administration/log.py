"""Session log: how soon a log of a million sessions answers (ms), how fast it is exported, and what a purge costs.

The log is filled as edges would have filled it, up to now, unless `--db` names one that an earlier run has filled.
Then each question that an administrator or a page asks is timed, rows are exported, and the dashboard's pages are
loaded; with `--purge` all is purged while another process writes. Takes 10 minutes, most of them to fill the log.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final

from sqlalchemy import Engine, Table, func, insert, select, text

from benchmarks.administration.observability import Viewer
from benchmarks.harness import Bench, SuiteReport, at_most, number_of
from fleet_admin.dashboard.app import DashboardServer
from fleet_admin.dashboard.services import open_services
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_edge.session_log import housekeeping
from fleet_edge.session_log.counters import SegmentCounters
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.engine import parse_url, sqlite_path
from fleet_edge.session_log.event_codes import EVENT_CODES
from fleet_edge.session_log.housekeeping import Pace
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.periods import BEGINNING
from fleet_edge.session_log.records import FOR_GOOD, Record, minute_of, open_record, segment_number
from fleet_edge.session_log.rollups import add_segments
from fleet_edge.session_log.steering import add_labels, record_audit
from fleet_edge.session_log.tables import DEVICES, EDGE_LOADS, EDGES, EVENTS, ROUNDS, SEGMENTS, SESSIONS
from fleet_edge.session_log.views import AuditEntry
from schemas.policy import Mode

_BATCH: Final = 10_000
_CACHE_KB: Final = 500_000  # ids are random, and so is where each goes
_HOUR: Final = timedelta(hours=1)
_MS: Final = timedelta(milliseconds=1)
_TABLES: Final = (SESSIONS, SEGMENTS, ROUNDS, EVENTS)
_NOTHING_COUNTED: Final = asdict(SegmentCounters())
_REASONS: Final = {"stop": 60, "length": 30, "failed": 4, "lost": 3, "cancelled": 3}

_ENDS: Final = {
    "failed": ("drafter-error", "The draft model could not compute the next tokens: its file has changed."),
    "lost": ("lease", "The device was silent for a whole lease of 60 s."),
}

_TARGET_ID: Final = "7a3f0c9e51d2b846"
_RARE: Final = "edge-rare"
_LOGGED: Final = [
    each for each in EVENT_CODES if each.kind.value in {"refused", "fault", "session", "device", "config", "command"}
]

Row = dict[str, Any]
Progress = Callable[[str, float], None]
"""Called with the current step and the share that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    sessions: int
    devices: int
    days: int
    edges: int = 4


def name_of(device: int) -> str:
    return f"gateway-{device:05}"


def _edges(scale: Scale) -> list[str]:
    return [f"edge-{number}" for number in range(scale.edges)]


def fill(engine: Engine, scale: Scale, *, now: datetime, progress: Progress, seed: int = 13) -> None:
    chance = random.Random(seed)
    begin = now - timedelta(days=scale.days)
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:  # the one connection that is used from here on
            connection.exec_driver_sql("PRAGMA synchronous = OFF")
            connection.exec_driver_sql(f"PRAGMA cache_size = -{_CACHE_KB}")
    with engine.begin() as connection:
        connection.execute(insert(DEVICES), [_device(chance, number, begin, now) for number in range(scale.devices)])
        connection.execute(insert(EDGES), [_edge(chance, name, begin, now) for name in (*_edges(scale), _RARE)])
        halls = {name_of(number): (f"hall_{'ab'[number % 2]}",) for number in range(scale.devices)}
        connection.execute(insert(EDGE_LOADS), list(_loads(chance, scale, begin, now)))
        add_labels(connection, halls, who="ada", now=begin)
        record_audit(connection, [AuditEntry(who="ada", action="label", subject=name) for name in halls], now=begin)
    indexes = [index for table in _TABLES for index in table.indexes]
    with engine.begin() as connection:  # sorted once, they take a fraction of the time
        for index in indexes:
            index.drop(connection)
    rows: dict[Table, list[Row]] = {table: [] for table in _TABLES}
    for number, at in enumerate(_times(chance, begin, now, scale.sessions)):
        for table, row in _session(chance, at, scale, now):
            rows[table].append(row)
        if len(rows[SESSIONS]) == _BATCH:
            _write(engine, rows)
            progress("filling", number / scale.sessions)
    _write(engine, rows)
    with engine.begin() as connection:
        for number, index in enumerate(indexes):
            progress("indexing", number / len(indexes))
            index.create(connection)


def _times(chance: random.Random, begin: datetime, now: datetime, sessions: int) -> Iterator[datetime]:
    """Yield the sessions' opening times in order: four times as many in the early afternoon as in the early morning."""
    hours = [begin + number * _HOUR for number in range(math.ceil((now - begin) / _HOUR))]
    weights = [1.0 - 0.6 * math.cos(2 * math.pi * (hour.hour - 2) / 24) for hour in hours]
    share, opened = 0.0, 0
    for hour, weight in zip(hours, weights, strict=True):
        share += weight
        number = round(sessions * share / sum(weights)) - opened
        opened += number
        yield from sorted(hour + min(_HOUR, now - hour) * chance.random() for _ in range(number))


def _write(engine: Engine, rows: Mapping[Table, list[Row]]) -> None:
    with engine.begin() as connection:
        add_segments(connection, (), [_NOTHING_COUNTED | row for row in rows[SEGMENTS]])
        for table, own in rows.items():
            if own:
                connection.execute(insert(table), own)
            own.clear()


def _device(chance: random.Random, number: int, begin: datetime, now: datetime) -> Row:
    presence = chance.choices(("online", "draining", "offline"), (95, 1, 4))[0]
    age = timedelta(seconds=chance.choices((60, 600, 3600), (9, 1, 1))[0] * chance.random())
    return {
        "device": name_of(number),
        "presence": presence,
        "presence_since": max(begin, now - age - timedelta(days=chance.randrange(20))),
        "software": chance.choice(("0.2.0", "0.2.0", "0.1.9")),
        "draft_model": "SmolLM2-135M",
        "quantization": "Q4_0",
        "first_seen_at": begin,
        "seen_at": now - age,
        "state_at": now - age,
        "telemetry_at": now - age,
        "plan": chance.choice(("edge-only", "4", "4 ahead")),
        "round_trip_ms": chance.lognormvariate(4, 0.5),
        "acceptance": chance.uniform(0.5, 0.9),
        "draft_ms_per_token": chance.uniform(5, 40),
        "certificate_until": now + timedelta(days=chance.randrange(3, 90)),
    }


def _edge(chance: random.Random, name: str, begin: datetime, now: datetime) -> Row:
    return {
        "edge": name,
        "target": "SmolLM2",
        "target_id": _TARGET_ID,
        "presence": "online",
        "presence_since": begin,
        "software": "0.2.0",
        "first_seen_at": begin,
        "seen_at": now,
        "state_at": now,
        "load_at": now,
        "open_sessions": chance.randrange(16),
        "max_sessions": 64,
        "batch_sessions": chance.uniform(1, 16),
        "step_ms": chance.lognormvariate(3.5, 0.3),
        "queue_ms": chance.lognormvariate(1, 0.5),
        "tokens_per_s": chance.uniform(1, 4),
        "kv_usage": chance.random(),
        "spooled_records": 0,
    }


def _loads(chance: random.Random, scale: Scale, begin: datetime, now: datetime) -> Iterator[Row]:
    for minute in range(minute_of(begin), minute_of(now)):
        if minute % 10 and minute < minute_of(now) - 2880:
            continue
        busy = 1.0 - 0.6 * math.cos(2 * math.pi * (minute / 60 - 2) / 24)
        connected = scale.devices * chance.uniform(0.94, 0.96)
        for edge in _edges(scale):
            yield {
                "minute": minute,
                "edge": edge,
                "at": BEGINNING + minute * timedelta(minutes=1),
                "open_sessions": int(20 * busy * chance.random()),
                "kv_usage": min(1.0, 0.5 * busy * chance.uniform(0.8, 1.2)),
                "memory_bytes": int(2e9 * chance.uniform(0.99, 1.01)),
                "devices_active": int(connected * busy / 1.7),
                "devices_connected": int(connected),
            }


def _session(chance: random.Random, at: datetime, scale: Scale, now: datetime) -> Iterator[tuple[Table, Row]]:
    session, device = f"{chance.getrandbits(64):016x}", name_of(chance.randrange(scale.devices))
    app = chance.choice((None, "alarms", "reports"))
    quantization = chance.choice(("Q4_0", "Q4_0", "Q2_K"))
    models = {"draft_model": "SmolLM2-135M", "quantization": quantization, "target": "SmolLM2", "target_id": _TARGET_ID}
    # One edge has served almost nothing, which makes its rows the hardest to find.
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
        SESSIONS,
        {
            "session": session,
            "device": device,
            "app": app,
            "opened_at": at,
            "last_at": at + length,
            "end_segment": last["segment"] if open_still else FOR_GOOD,
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
            "end_code": _ENDS[reason][0] if reason in _ENDS else None,
            "end_sentence": _ENDS[reason][1] if reason in _ENDS else None,
            "tokens": None if open_still else tokens,
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
        },
    )
    for segment in segments:
        yield SEGMENTS, segment
    if chance.random() < 0.01:
        yield from _rounds(chance, segments[0], at)
    if chance.random() < 0.1:
        yield EVENTS, _event(chance, session, device, edge, at)


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


def _rounds(chance: random.Random, segment: Row, at: datetime) -> Iterator[tuple[Table, Row]]:
    for number in range(10):
        yield (
            ROUNDS,
            {
                "session": segment["session"],
                "device": segment["device"],
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
    logged = chance.choice(_LOGGED)
    return {
        "id": f"{chance.getrandbits(128):032x}",
        "edge": edge,
        "device": device,
        "session": session,
        "kind": logged.kind,
        "code": logged.code,
        "severity": logged.severity,
        "sentence": logged.meaning,
        "who": "ada" if logged.kind.value in {"config", "command"} else None,
        "at": at,
        "last_at": at,
    }


Question = Callable[[SessionLog], object]

PAGES: Final = (
    "/",
    "/?range=1h",
    "/?range=6h",
    "/?range=30d",
    "/?range=365d",
    "/devices",
    "/devices/{device}",
    "/edges",
    "/edges/edge-1",
    "/sessions",
    "/sessions?filter=device%3D{device}",
    "/sessions?filter=edge%3Dedge-rare",
    "/sessions?filter=reason%3Dfailed",
    "/sessions/{session}",
    "/usage",
    "/usage?range=30d",
    "/usage?range=365d&by=device",
    "/alerts",
    "/audit",
)


def questions(now: datetime, devices: int) -> Mapping[str, Question]:
    """Return the queries by name, for a log that ends now and has devices of these numbers."""
    device, three = name_of(min(7, devices - 1)), [name_of(number) for number in range(min(3, devices))]
    middle, month = now - timedelta(days=20), now - timedelta(days=30)
    return {
        "devices": lambda log: log.devices(),
        "device": lambda log: log.device(device),
        "hours of a device": lambda log: log.usage(device=device, grain="hour", since=month),
        "edges": lambda log: log.edges(),
        "sessions": lambda log: log.sessions(),
        "sessions of a device": lambda log: log.sessions(device=device),
        "sessions of three devices": lambda log: log.sessions(device=three),
        "sessions at an edge": lambda log: log.sessions(edge="edge-1"),
        "sessions at an edge that has served few": lambda log: log.sessions(edge="edge-rare"),
        "sessions at an edge that has served none": lambda log: log.sessions(edge="nowhere"),
        "sessions at an edge in the middle": lambda log: log.sessions(edge="edge-1", until=middle),
        "sessions that failed": lambda log: log.sessions(reason="failed"),
        "sessions that failed at an edge": lambda log: log.sessions(reason="failed", edge="edge-1"),
        "sessions that failed at a rare edge": lambda log: log.sessions(reason="failed", edge="edge-rare"),
        "sessions of a mode": lambda log: log.sessions(mode="coupled"),
        "sessions that are open": lambda log: log.sessions(open=True),
        "sessions of a day in the middle": lambda log: log.sessions(since=middle, until=middle + timedelta(days=1)),
        "one session": lambda log: log.session(log.sessions(limit=1)[0].session[:10]),
        "segments of a session": lambda log: log.segments(log.sessions(limit=1)[0].session),
        "events": lambda log: log.events(),
        "events of a device": lambda log: log.events(device=device),
        "events of a code": lambda log: log.events(code="tokens-differ"),
        "events of a day in the middle": lambda log: log.events(since=middle, until=middle + timedelta(days=1)),
        "events counted, of a day": lambda log: log.event_counts(since=now - timedelta(days=1)),
        "events counted, of a week": lambda log: log.event_counts(since=now - timedelta(days=7)),
        "events counted, of all": lambda log: log.event_counts(),
        "usage": lambda log: log.usage(),
        "usage by device": lambda log: log.usage(by=("device",)),
        "usage by edge": lambda log: log.usage(by=("edge",)),
        "usage by draft": lambda log: log.usage(by=("draft_model", "quantization")),
        "usage by app": lambda log: log.usage(by=("device", "app")),
        "usage by day": lambda log: log.usage(grain="day"),
        "usage by month": lambda log: log.usage(grain="month"),
        "usage by hour, two days": lambda log: log.usage(grain="hour", since=now - timedelta(days=2)),
        "usage of an hour": lambda log: log.usage(since=now - timedelta(hours=1)),
        "usage of a day": lambda log: log.usage(since=now - timedelta(days=1)),
        "usage of a week by device": lambda log: log.usage(since=now - timedelta(days=7), by=("device",)),
        "usage of a month by device": lambda log: log.usage(since=month, by=("device",)),
        "usage by app and day, a month": lambda log: log.usage(since=month, by=("app",), grain="day"),
        "usage of a device by day": lambda log: log.usage(device=device, grain="day"),
        "latencies": lambda log: log.latencies(),
        "latencies of a day": lambda log: log.latencies(since=now - timedelta(days=1)),
    }


_MB: Final = 1e6
_GOAL_MS: Final = 300.0
_SAID_S: Final = 5.0
_WRITE_S: Final = 0.05


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=number_of(int, 1), default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--devices", type=number_of(int, 1), default=1000, help="(default: %(default)s)")
    parser.add_argument("--days", type=number_of(int, 1), default=90, help="over which the sessions are spread")
    parser.add_argument("--times", type=number_of(int, 1), default=20, help="each question is asked")
    parser.add_argument("--rows", type=int, default=200_000, help="exported of each kind, at most")
    parser.add_argument("--only", default="", help="questions that have this in their names")
    parser.add_argument("--db", metavar="URL", help="a database of its own, empty or filled by an earlier run")
    parser.add_argument("--folder", type=Path, help="where a SQLite file is made and kept")
    parser.add_argument("--purge", action="store_true", help="purge all at the end, next to a writer")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    scale = Scale(sessions=options.sessions, devices=options.devices, days=options.days)
    url = options.db or f"sqlite:///{(options.folder or bench.folder).absolute() / 'log.sqlite3'}"
    more: dict[str, Any] = {}
    with open_store(url) as store:
        with store.engine.connect() as connection:
            now = connection.scalar(select(func.max(EDGES.c.seen_at)))
            devices = connection.scalar(select(func.count()).select_from(DEVICES)) or scale.devices
        if now is None:
            begun, now = time.perf_counter(), datetime.now(UTC)
            fill(store.engine, scale, now=now, progress=_Progress())
            more["fill_s"] = time.perf_counter() - begun
            print(f"filled in {more['fill_s']:.0f} s", flush=True)
        more |= {"database": store.engine.dialect.name, "size_mb": _size_mb(store.engine, url)}
    with SessionLog(url, now=lambda: now) as log:
        asked = {name: ask for name, ask in questions(now, devices).items() if options.only in name}
        rows = [_timed(name, lambda ask=ask: ask(log), options.times) for name, ask in asked.items()]  # type: ignore[misc]
        more["export"] = [_export(log, what, options.rows) for what in ("sessions", "segments", "rounds", "events")]
    with _dashboard(url, now) as (viewer, session):
        for page in PAGES:
            path = page.format(session=session, device=name_of(min(7, devices - 1)))
            rows.append(_timed(f"page {page}", lambda path=path: viewer.look(path), options.times))  # type: ignore[misc]
    if options.purge:
        more["purge"] = _purge(url, now)
    return SuiteReport(
        rows, [at_most("slowest answer, ms (p95)", max(row["p95_ms"] for row in rows), _GOAL_MS)], more=more
    )


def _timed(name: str, ask: Callable[[], object], times: int) -> dict[str, Any]:
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        ask()
        taken.append(1000 * (time.perf_counter() - begun))
    late = sorted(taken)[min(int(0.95 * times), times - 1)]
    row = {"question": name, "median_ms": median(taken), "p95_ms": late, "first_ms": taken[0]}
    mark = "  above the goal" if late > _GOAL_MS else ""
    print(f"{name:45} p50 {row['median_ms']:8.1f} ms  p95 {late:8.1f} ms{mark}", flush=True)
    return row


class _Progress:
    def __init__(self) -> None:
        self._begun = self._said = time.perf_counter()

    def __call__(self, doing: str, share: float | None = None) -> None:
        now = time.perf_counter()
        if now - self._said > _SAID_S:
            self._said = now
            print(f"{doing}: {'' if share is None else f'{share:4.0%} '}after {now - self._begun:.0f} s", flush=True)


def _export(log: SessionLog, what: str, rows: int) -> dict[str, Any]:
    begun, before = time.perf_counter(), _peak_mb()
    number = sum(1 for _ in islice(log.export_rows(what), rows))
    per_s, grown = number / (time.perf_counter() - begun), _peak_mb() - before
    print(f"export of {what}: {number} rows, {per_s:.0f} rows/s, {grown:.0f} MB more", flush=True)
    return {"what": what, "rows": number, "rows_per_s": per_s, "grown_mb": grown}


@contextmanager
def _dashboard(url: str, now: datetime) -> Iterator[tuple[Viewer, str]]:
    settings = DashboardSettings(db=url, listen="127.0.0.1:0")
    services = open_services(settings, now=lambda: now)
    server = DashboardServer(settings, services=services)
    try:
        yield Viewer(server.address, services), services.log.sessions(limit=1)[0].session
    finally:
        server.stop()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MB


def _size_mb(engine: Engine, url: str) -> float:
    path = sqlite_path(parse_url(url))
    if path is not None:
        return path.stat().st_size / _MB
    with engine.connect() as connection:
        return float(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0) / _MB


def _purge(url: str, now: datetime) -> dict[str, Any]:
    """Purge all sessions; return the measurements of a writer in another process meanwhile."""
    command = [sys.executable, "-m", "benchmarks.administration.log", url]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path, stopping, wal = sqlite_path(parse_url(url)), threading.Event(), [0.0]

    def watch() -> None:
        while path is not None and not stopping.wait(0.02):
            journal = path.with_name(path.name + "-wal")
            if journal.exists():
                wal.append(journal.stat().st_size / _MB)

    watcher = threading.Thread(target=watch)
    watcher.start()
    progress = _Progress()

    def enough() -> bool:
        progress("purging")
        return False

    with open_store(url) as store:
        before, begun = _size_mb(store.engine, url), time.perf_counter()
        purged = housekeeping.purge_sessions(store.engine, before=now, pace=Pace(1000, enough=enough, pause=time.sleep))
        taken, after = time.perf_counter() - begun, _size_mb(store.engine, url)
    out, _ = writer.communicate("")
    stopping.set()
    watcher.join()
    waits = sorted(json.loads(out))
    found = {
        "sessions": purged,
        "taken_s": taken,
        "writer_batches": len(waits),
        "writer_p95_ms": waits[int(0.95 * len(waits))] if waits else None,  # it was over before the writer began
        "writer_max_ms": waits[-1] if waits else None,
        "wal_max_mb": max(wal),
        "size_before_mb": before,
        "size_after_mb": after,
    }
    print(json.dumps(found, indent=2), flush=True)
    return found


def _log_write(url: str) -> None:
    """Store batches as an edge does until standard input ends; then print the duration of each (ms), as JSON."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    taken: list[float] = []
    models = {
        "draft_model": "SmolLM2-135M",
        "quantization": "Q4_0",
        "target": "SmolLM2",
        "target_id": _TARGET_ID,
        "edge": "edge-0",
    }
    policy = {"mode": Mode.RESIDUAL, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "seed": 7}
    sizes = {"prompt_tokens": 100, "max_new_tokens": 256, "resumed_tokens": 0, "open_bytes": 150}
    with open_store(url) as store:
        number = 0
        while not ended.wait(_WRITE_S):
            records: list[Any] = []
            for _ in range(10):
                number += 1
                at = datetime.now(UTC)
                key = {"session": f"{number:016x}", "segment": segment_number(at), "device": "writer"}
                opened: dict[str, Any] = {**models, **policy, **sizes, "app": None}
                records += [
                    open_record(key, at, **opened),
                    Record(at, {"segments": key | {"tokens": number % 50, "rounds": 10}}),
                ]
            begun = time.perf_counter()
            store.apply(records)
            taken.append(1000 * (time.perf_counter() - begun))
    print(json.dumps(taken))


if __name__ == "__main__":
    _log_write(sys.argv[1])

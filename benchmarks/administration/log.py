"""Session log: how soon a log of a million sessions answers (ms), how fast it is exported, and what a purge costs.

The log is filled as edges would have filled it, up to now, unless `--db` names one that an earlier run has filled.
Then each question that an administrator or a page asks is timed, rows are exported, and the dashboard's pages are
loaded; with `--purge` all is purged while another process writes. Takes 10 minutes, most of them to fill the log.
"""

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final

from sqlalchemy import Engine, func, select, text

from benchmarks.administration.filling import Scale, fill, name_of
from benchmarks.administration.observability import Viewer
from benchmarks.administration.questions import PAGES, questions
from benchmarks.harness import Bench, Report, at_most, number_of
from fleet_admin.dashboard.app import DashboardServer
from fleet_admin.dashboard.services import open_services
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_edge.session_log import SessionLog
from fleet_edge.store import housekeeping
from fleet_edge.store.database import open_store
from fleet_edge.store.engine import parse_url, sqlite_path
from fleet_edge.store.housekeeping import give_back_space
from fleet_edge.store.models import DeviceRow, EdgeRow
from fleet_edge.store.records import SegmentProgress, SessionOpened, segment_number
from schemas.policy import Mode

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


def run(bench: Bench) -> Report:
    options = bench.options
    scale = Scale(sessions=options.sessions, devices=options.devices, days=options.days)
    url = options.db or f"sqlite:///{(options.folder or bench.folder).absolute() / 'log.sqlite3'}"
    more: dict[str, Any] = {}
    with open_store(url) as store:
        with store.engine.connect() as connection:
            now = connection.scalar(select(func.max(EdgeRow.seen_at)))
            devices = connection.scalar(select(func.count()).select_from(DeviceRow)) or scale.devices
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
    return Report(rows, [at_most("slowest answer, ms (p95)", max(row["p95_ms"] for row in rows), _GOAL_MS)], more=more)


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
    """Prints what is done every few seconds."""

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
    """Purge all sessions, and return what a writer in another process has met meanwhile."""
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
        purged = housekeeping.purge_sessions(store.engine, before=now, chunk=1000, enough=enough, pause=time.sleep)
        give_back_space(store.engine, pause=time.sleep)
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


def _write(url: str) -> None:
    """Store batches as an edge does until standard input ends; then print how long each took (ms), as JSON."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    taken: list[float] = []
    models = {"draft_model": "SmolLM2-135M", "quantization": "Q4_0", "target": "SmolLM2", "edge": "edge-0"}
    policy = {"mode": Mode.RESIDUAL, "temperature": 0.7, "top_k": 50, "top_p": 0.95, "seed": 7}
    sizes = {"prompt_tokens": 100, "max_new_tokens": 256, "resumed_tokens": 0, "open_bytes": 150}
    with open_store(url) as store:
        number = 0
        while not ended.wait(_WRITE_S):
            records: list[Any] = []
            for _ in range(10):
                number += 1
                at = datetime.now(UTC)
                key: dict[str, Any] = {"session": f"{number:016x}", "segment": segment_number(at), "device": "writer"}
                opened: dict[str, Any] = {**key, **models, **policy, **sizes, "at": at}
                records += [SessionOpened(**opened), SegmentProgress(**key, at=at, tokens=number % 50, rounds=10)]
            begun = time.perf_counter()
            store.apply(records)
            taken.append(1000 * (time.perf_counter() - begun))
    print(json.dumps(taken))


if __name__ == "__main__":
    _write(sys.argv[1])

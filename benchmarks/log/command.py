"""Log benchmark: fills a session log, and asks it all that is asked of one.

Then it is exported, the dashboard's pages are loaded over it, and it is purged beside a writer.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, func, select, text

from benchmarks.log.filling import Scale, fill
from benchmarks.log.pages import pages
from benchmarks.log.questions import Answered, Question, ask, questions
from benchmarks.shared.conditions import conditions
from fleet_edge.session_log import SessionLog
from fleet_edge.store import housekeeping
from fleet_edge.store.database import open_store
from fleet_edge.store.engine import parse_url, sqlite_path
from fleet_edge.store.models import DeviceRow, EdgeRow
from fleet_edge.store.purging import give_back_space

__all__ = ["main"]

_MB: Final = 1e6
_GOAL_MS: Final = 300.0
_SAID_S: Final = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return 1 if a question took longer than the goal."""
    arguments = _parse(argv)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-log-")))
        url = arguments.db or f"sqlite:///{folder.absolute() / 'log.sqlite3'}"
        report = _measure(url, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    answers = [*report["questions"].values(), *report["pages"].values()]
    return any(answered["p95_ms"] > _GOAL_MS for answered in answers)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks log", description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--days", type=int, default=90, help="over which the sessions are spread")
    parser.add_argument("--times", type=int, default=20, help="that each question is asked")
    parser.add_argument("--rows", type=int, default=200_000, help="that are exported of each kind")
    parser.add_argument("--only", default="", help="questions that have this in their names")
    parser.add_argument("--db", metavar="URL", help="a database of its own, empty or filled by an earlier run")
    parser.add_argument("--folder", type=Path, help="where a SQLite file is made and kept")
    parser.add_argument("--purge", action="store_true", help="purge all at the end, beside a writer")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def _measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    scale = Scale(sessions=arguments.sessions, devices=arguments.devices, days=arguments.days)
    report: dict[str, Any] = {"conditions": conditions("sqlalchemy", "psycopg"), "scale": asdict(scale)}
    with open_store(url) as store:
        report["database"] = store.engine.dialect.name
        with store.engine.connect() as connection:
            now = connection.scalar(select(func.max(EdgeRow.seen_at)))
            devices = connection.scalar(select(func.count()).select_from(DeviceRow)) or scale.devices
        if now is None:
            begun, now = time.perf_counter(), datetime.now(UTC)
            fill(store.engine, scale, now=now, progress=_Progress())
            report["fill_s"] = time.perf_counter() - begun
            _say(f"filled in {report['fill_s']:.0f} s")
        report["size_mb"] = _size_mb(store.engine, url)
    with SessionLog(url, now=lambda: now) as log:
        report["questions"] = _questions(log, questions(now, devices), arguments)
        report["export"] = _exports(log, arguments.rows)
    found = pages(url, now=now, devices=devices, times=arguments.times)
    report["pages"] = {path: _noted(f"page {path}", answered) for path, answered in found}
    if arguments.purge:
        report["purge"] = _purge(url, now)
    return report


def _say(line: str) -> None:
    print(line, flush=True)


class _Progress:
    """Prints what is done every few seconds."""

    def __init__(self) -> None:
        self._begun = self._said = time.perf_counter()

    def __call__(self, doing: str, share: float) -> None:
        now = time.perf_counter()
        if now - self._said > _SAID_S:
            self._said = now
            _say(f"{doing}: {share:4.0%} after {now - self._begun:.0f} s")


def _questions(log: SessionLog, asked: Mapping[str, Question], arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: question for name, question in asked.items() if arguments.only in name}
    return {name: _noted(name, ask(log, question, times=arguments.times)) for name, question in chosen.items()}


def _noted(name: str, answered: Answered) -> dict[str, Any]:
    late = "  above the goal" if answered.p95_ms > _GOAL_MS else ""
    _say(f"{name:45} p50 {answered.median_ms:8.1f} ms  p95 {answered.p95_ms:8.1f} ms{late}")
    return asdict(answered)


def _exports(log: SessionLog, rows: int) -> dict[str, Any]:
    found = {}
    for what in ("sessions", "segments", "rounds", "events"):
        begun, before = time.perf_counter(), _peak_mb()
        number = sum(1 for _ in islice(log.export_rows(what), rows))
        taken = time.perf_counter() - begun
        found[what] = {"rows": number, "rows_per_s": number / taken, "grown_mb": _peak_mb() - before}
        _say(f"export of {what}: {number} rows, {number / taken:.0f} rows/s, {_peak_mb() - before:.0f} MB more")
    return found


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MB


def _size_mb(engine: Engine, url: str) -> float:
    path = sqlite_path(parse_url(url))
    if path is not None:
        return path.stat().st_size / _MB
    with engine.connect() as connection:
        return float(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0) / _MB


def _purge(url: str, now: datetime) -> dict[str, Any]:
    """Purge all that is old, and tell what a writer in another process has met meanwhile."""
    command = [sys.executable, "-m", "benchmarks.log.writer", url]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path, stopping, wal = sqlite_path(parse_url(url)), threading.Event(), [0.0]

    def watch() -> None:
        while path is not None and not stopping.wait(0.02):
            journal = path.with_name(path.name + "-wal")
            if journal.exists():
                wal.append(journal.stat().st_size / _MB)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with open_store(url) as store:
        before = _size_mb(store.engine, url)
        begun = time.perf_counter()
        progress = _Progress()

        def enough() -> bool:
            progress("purging", math.nan)
            return False

        purged = housekeeping.purge_sessions(store.engine, before=now, chunk=1000, enough=enough, pause=time.sleep)
        give_back_space(store.engine, pause=time.sleep)
        taken = time.perf_counter() - begun
        after = _size_mb(store.engine, url)
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
    _say(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    sys.exit(main())

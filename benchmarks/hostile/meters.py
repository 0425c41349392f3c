"""Meters: tokens of honest devices, rows of the session log, memory of processes."""

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import httpx
import psutil
import sqlalchemy as sa

_SAMPLE_S: Final = 0.2
_SCRAPE_S: Final = 1.0
_KV_SHARES: Final = ("kv_cache_usage_ratio", "kv_cache_retained_ratio")
_MIB: Final = 1 << 20


@dataclass(slots=True)
class Throughput:
    """Committed tokens, with the time of each commit."""

    texts: int = 0
    failed: list[str] = field(default_factory=list)
    differing: int = 0
    resumes: int = 0
    quota_s: float = 0.0
    _commits: list[tuple[float, int]] = field(default_factory=list)

    def take(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "tokens", "at": at, "number": number}:
                self._commits.append((at, number))
            case {"event": "text", "resumes": resumes, "same": same, "quota_s": quota_s}:
                self.texts += 1
                self.resumes += resumes
                self.quota_s += quota_s
                self.differing += not same
            case {"event": "failed", "sentence": sentence}:
                self.failed.append(sentence)

    def rate(self, begin: float, end: float) -> float:
        return sum(number for at, number in list(self._commits) if begin <= at < end) / (end - begin)

    def count(self, begin: float) -> int:
        return sum(number for at, number in list(self._commits) if at >= begin)


_OF_ALL: Final = frozenset({"distributions", "edge_loads"})


def rows_beside(database: Path, honest: Collection[str]) -> int:
    """Return the rows of all tables except those of honest devices' own work.

    A row counts for the device that it names, or that its session names; one that names none is not honest work, unless
    its table sums up what all devices do.
    """
    engine = sa.create_engine(f"sqlite:///file:{database}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            tables = sa.MetaData()
            tables.reflect(connection)
            return sum(
                int(connection.execute(_not_of(table, tables.tables, honest)).scalar_one())
                for table in tables.sorted_tables
                if table.name not in _OF_ALL
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


class MemoryMeter:
    """Memory of a process, sampled on a thread; a context manager.

    `kept_mb` returns memory that is there to be kept; it stays in the process, so the most so far is left out.
    """

    def __init__(
        self, pid: int, *, kept_mb: Callable[[], float] = lambda: 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._process = psutil.Process(pid)
        self._kept_mb = kept_mb
        self._max_kept_mb = 0.0
        self._clock = clock
        self._samples: list[tuple[float, float]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name=f"meter-{pid}", daemon=True)

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def memory_mb(self, begin: float, end: float) -> float:
        """Return the greatest resident memory between two times; 0 if the process did not run then."""
        return max((memory for at, memory in list(self._samples) if begin <= at <= end), default=0.0)

    def _sample(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            self._take()

    def _take(self) -> None:
        try:
            memory = self._process.memory_info().rss
        except psutil.Error:
            return
        self._max_kept_mb = max(self._max_kept_mb, self._kept_mb())
        self._samples.append((self._clock(), memory / _MIB - self._max_kept_mb))


class KvMeter:
    """Memory for keys and values (MB) that an edge has used, by its metrics; it keeps it within `kv_bytes`."""

    def __init__(self, url: str, kv_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._whole_mb, self._clock = url, kv_bytes / _MIB, clock
        self._found_mb, self._not_before = 0.0, 0.0

    def __call__(self) -> float:
        """Return what the metrics said last; they are read once a second."""
        if self._clock() >= self._not_before:
            self._not_before = self._clock() + _SCRAPE_S
            with contextlib.suppress(httpx.HTTPError):
                self._found_mb = kv_share(httpx.get(self._url, timeout=_SCRAPE_S).text) * self._whole_mb
        return self._found_mb


def kv_share(metrics: str) -> float:
    """Return the share of the memory for keys and values that is in use or kept."""
    lines = (line.rpartition(" ") for line in metrics.splitlines() if not line.startswith("#"))
    return sum(float(value) for name, _, value in lines if name.partition("{")[0].endswith(_KV_SHARES))


def children_mb(pid: int) -> float:
    """Return the memory of all processes below one that they do not share with others."""
    found = 0
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += child.memory_full_info().uss
    return found / _MIB

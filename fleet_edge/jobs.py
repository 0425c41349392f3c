"""Recurring jobs of an edge, on their own threads: each fails alone, and is retried at its next time.

What keeps sessions running waits on the monotonic clock. What depends on dates runs at a time of the wall clock, which
is set again after each run and after each step of that clock, so that a step neither stops a job nor repeats it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy.exc import SQLAlchemyError

from fleet_common.host import give_back_free_memory
from fleet_edge.session_log import housekeeping
from fleet_edge.session_log.alerts.alerts import forget
from fleet_edge.session_log.alerts.settings import EVERY_S
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.errors import StoreError
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.housekeeping import Pace
from fleet_edge.session_log.periods import BEGINNING, Grain, floor
from fleet_edge.session_log.quarantines import Quarantines
from fleet_edge.session_log.records import SESSIONS_DAYS
from fleet_edge.session_log.tables import COMMANDS, EVENTS, ROUNDS

_log = logging.getLogger(__name__)

_ABANDONED_CHUNK: Final = 1000
_MINUTES_KEPT: Final = timedelta(days=2)  # each minute's load; pages show half a day by minutes


_ABANDONED_AFTER: Final = timedelta(hours=6)
"""Age at which a session that no edge serves is closed as lost; well above a lease and a database outage."""

_KEEP_REPORTED: Final = timedelta(days=7)
_MAX_REPORTED: Final = 1000
"""Age, and number of one device, from which reported Closes of unknown sessions are deleted."""

_KEEP_ALERTS: Final = timedelta(days=365)  # those that are over

_CLOCK_EVERY_S: Final = 5.0
_STEP: Final = timedelta(seconds=30)
"""Change of the wall clock against the monotonic one that is a step; NTP slews less between two looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """Intervals of jobs that follow from other settings, and ages in days at which data is deleted.

    `sessions_days` counts whole days and covers events; totals are kept at least as long.
    """

    lease_every_s: float = 2.0
    progress_every_s: float = 5.0
    rounds_days: float = 7.0
    sessions_days: float = SESSIONS_DAYS
    totals_days: float = 400.0
    purge_chunk: int = 1000


class EdgeJobs:
    """The recurring jobs of one edge. They call the given functions from their own threads.

    `store` has connections apart from the writer's. While it is away, jobs that need it fail and log that once. `tell`
    takes events, as `EventCounts.note` does.
    """

    def __init__(
        self,
        store: Store,
        *,
        expire_leases: Callable[[], object],
        flush_progress: Callable[[], object],
        flush_log: Callable[[], object],
        apply_quarantines: Callable[[Quarantines], object],
        evaluate_alerts: Callable[[], object],
        tell: Callable[..., object] = lambda *_event, **_more: None,
        settings: JobSettings | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._settings = settings or JobSettings()
        self._now = now
        self._stopping = threading.Event()
        self._setting = threading.Lock()
        self._waiting: set[str] = set()
        self._doubted = False
        self._tell = tell
        self._clock = clock
        self._ahead = self._wall_ahead()
        steady: Mapping[str, tuple[float, Callable[[], object]]] = {
            "expire-leases": (self._settings.lease_every_s, expire_leases),
            "flush-progress": (self._settings.progress_every_s, flush_progress),
            "flush-log": (10.0, flush_log),
            "read-quarantines": (2.0, lambda: apply_quarantines(store.quarantines(now=now()))),
            "give-back-memory": (60.0, give_back_free_memory),
            "watch-clock": (_CLOCK_EVERY_S, self.watch_clock),
        }
        self._dated: Mapping[str, tuple[float, Callable[[], object]]] = {
            "evaluate-alerts": (EVERY_S, evaluate_alerts),
            "close-abandoned": (300.0, self._close_abandoned),
            "purge": (3600.0, self._purge),
        }
        self._chores = {**steady, **self._dated}
        # One thread each: neither a hanging database nor a long purge must delay the end of leases.
        self._threads = [
            threading.Thread(target=self._repeat, args=(name, every_s), name=name, daemon=True)
            for name, (every_s, _) in steady.items()
        ]
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(len(self._dated))},
            job_defaults={"max_instances": 1, "misfire_grace_time": None},
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._chores)

    def start(self) -> None:
        """Start; each job first runs after its interval."""
        for name in self._dated:
            self._set(name)
        self._scheduler.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the jobs under way; a purge leaves the rest to the next run. Idempotent."""
        with self._setting:
            self._stopping.set()
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def watch_clock(self) -> None:
        """Set jobs again that the wall clock has moved away from, and report its steps."""
        latest = datetime.now(UTC)
        for job in self._scheduler.get_jobs():  # without those that run now: they are set afterwards
            if job.next_run_time > latest + timedelta(seconds=self._dated[job.id][0]):  # set before a step back
                self._set(job.id)
        before, self._ahead = self._ahead, self._wall_ahead()
        step = self._ahead - before
        if abs(step) < _STEP:
            return
        way, by = "forward" if step > timedelta() else "back", timedelta(seconds=round(abs(step).total_seconds()))
        sentence = (
            f"The machine's clock was set {way} by {by}, or the machine was suspended; if neither was intended, check "
            "its time synchronisation (timedatectl)."
        )
        _log.warning(sentence)
        self._tell(EventKind.EDGE, "clock-stepped", sentence)

    def _wall_ahead(self) -> timedelta:
        return datetime.now(UTC) - BEGINNING - timedelta(seconds=self._clock())

    def _repeat(self, name: str, every_s: float) -> None:
        while not self._stopping.wait(every_s):
            self.run(name)

    def _set(self, name: str) -> None:
        """Run a job once, after its interval; an interval trigger would list all times that a step has skipped."""
        every_s, _ = self._dated[name]
        # `shutdown` holds the lock that `add_job` takes, and waits for the thread that would call it.
        with self._setting:
            if self._stopping.is_set():
                return
            at = datetime.now(UTC) + timedelta(seconds=every_s)  # by the clock that the scheduler goes by
            self._scheduler.add_job(self._run_dated, "date", run_date=at, args=[name], id=name, replace_existing=True)

    def _run_dated(self, name: str) -> None:
        try:
            self.run(name)
        finally:
            self._set(name)

    def run(self, name: str) -> bool:
        """Run one job now; return whether it succeeded. Failures are logged."""
        _, chore = self._chores[name]
        try:
            chore()
        except (StoreError, SQLAlchemyError) as error:
            # Expected while the database is away: no traceback, and once per outage.
            level = logging.DEBUG if name in self._waiting else logging.WARNING
            _log.log(level, "The job %s failed and will be tried again: %s", name, _first_line(error))
            self._waiting.add(name)
            return False
        except Exception as error:  # noqa: BLE001 - whatever one chore does, the others go on
            _log.exception("The job %s failed and will be tried again.", name)
            sentence = (
                f"The job {name} failed and will be tried again ({type(error).__name__}); the edge's log says more."
            )
            self._tell(EventKind.EDGE, "job-failed", sentence)
            return False
        self._waiting.discard(name)
        return True

    def _close_abandoned(self) -> None:
        now = self._now()
        time = housekeeping.read_log_time(self._store.engine, now=now)
        if time.at is None or not time.awake:  # after a step forward all sessions look silent
            return
        closed = housekeeping.close_abandoned(
            self._store, now=now, abandoned_after=_ABANDONED_AFTER, limit=_ABANDONED_CHUNK
        )
        if closed:
            _log.info("%d sessions without an edge were closed as lost.", closed)
            sentence = "Sessions without an edge were closed as lost."
            self._tell(EventKind.SESSION, "abandoned", sentence, times=closed)

    def _purge(self) -> None:
        settings, engine = self._settings, self._store.engine
        time = housekeeping.read_log_time(engine, now=self._now())
        if time.doubt and not self._doubted:
            _log.warning(time.doubt)
            self._tell(EventKind.DATABASE, "clock-in-doubt", time.doubt)
        self._doubted = bool(time.doubt)
        if (now := time.at) is None:
            return
        # A purge may take longer than an edge has to end, and runs next to the writer.
        pace = Pace(settings.purge_chunk, enough=self._stopping.is_set, pause=self._stopping.wait)
        rounds = housekeeping.purge(engine, ROUNDS, before=now - timedelta(days=settings.rounds_days), pace=pace)
        oldest = floor(Grain.DAY, now - timedelta(days=settings.sessions_days))
        sessions = housekeeping.purge_sessions(engine, before=oldest, pace=pace)
        kept_days = max(settings.totals_days, settings.sessions_days)
        housekeeping.purge_rollups(engine, before=floor(Grain.DAY, now - timedelta(days=kept_days)), pace=pace)
        housekeeping.purge_loads(engine, thin_before=now - _MINUTES_KEPT, before=oldest, pace=pace)
        events = housekeeping.purge(engine, EVENTS, before=oldest, pace=pace)
        housekeeping.purge(engine, COMMANDS, before=oldest, pace=pace)
        housekeeping.purge_reported(engine, before=now - _KEEP_REPORTED, most=_MAX_REPORTED, pace=pace)
        housekeeping.purge_quarantines(engine, before=oldest, pace=pace)
        with engine.begin() as connection:
            forget(connection, before=now - _KEEP_ALERTS)
        if rounds or sessions or events:
            _log.info(
                "Purged %d rounds, %d sessions and %d events by age.",
                rounds,
                sessions,
                events,
            )
            sentence = f"Deleted after their retention: {rounds} rounds, {sessions} sessions, {events} events."
            self._tell(EventKind.DATABASE, "purged", sentence)


def _first_line(error: Exception) -> str:
    # SQLAlchemy's later lines repeat the statement and its parameters.
    return str(error).partition("\n")[0]

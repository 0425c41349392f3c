"""SessionLog: query the database that the edges write, and quarantine devices.

::

    from fleet_edge import SessionLog

    for session in SessionLog("sqlite:///fleet.sqlite3").sessions(since="2h", device="gateway-7"):
        print(session.session, session.counted.acceptance)
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, TypeVar

from sqlalchemy import ColumnElement, Connection, and_, func, literal_column, or_, select

from fleet_common.closing import Closing
from fleet_common.validation import read_duration, read_time
from fleet_edge.session_log import export, filters, quarantines, queries, totals
from fleet_edge.session_log.alerts.alerts import MAX_OPEN, Evaluation, last_evaluation, read_alerts
from fleet_edge.session_log.database import open_existing, transaction
from fleet_edge.session_log.engine import begin_of_time
from fleet_edge.session_log.errors import InvalidQuery, NotFound
from fleet_edge.session_log.event_codes import EventKind, Severity
from fleet_edge.session_log.filters import Filter
from fleet_edge.session_log.periods import BEGINNING, DAY, HOUR, MINUTES, Grain, floor
from fleet_edge.session_log.records import ADMINISTRATOR, event_record, minute_of
from fleet_edge.session_log.rollups import Dimension, Measure
from fleet_edge.session_log.steering import read_labels, record_audit
from fleet_edge.session_log.tables import (
    DEVICES,
    EDGE_LOADS,
    EVENTS,
    LABELS,
    ROUNDS,
    SEGMENTS,
    SESSIONS,
)
from fleet_edge.session_log.totals import Distribution, SpentTime, spent_times
from fleet_edge.session_log.views import (
    AlertView,
    AuditEntry,
    DeviceView,
    EdgeView,
    EventCount,
    EventView,
    LoadView,
    QuarantineView,
    RoundView,
    SegmentView,
    SessionView,
    UsageView,
)
from schemas.errors import InvalidName
from schemas.names import check_name
from schemas.policy import Mode
from schemas.reasons import EndReason

Time = str | datetime | timedelta
"""An age (`"90s"`, `"30m"`, `"2h"`, `"7d"`, a timedelta) or a time (ISO 8601, a datetime; UTC is assumed)."""

E = TypeVar("E", bound=StrEnum)

_ALL: Final = 2**31
"""More rows than there are: SQLite has no OFFSET without LIMIT."""

_GRAVEST: Final = tuple(Severity)
_LONGEST: Final = timedelta(minutes=1)
"""Longest time that an event lasts."""

_LABELS: Final = "labels"

_DAY_LENGTH: Final = 10  # of a date in ISO 8601
_HOUR_LENGTH: Final = 13
_MINUTE_LENGTH: Final = 16


class _EventGrouping(StrEnum):
    KIND = "kind"
    CODE = "code"
    SEVERITY = "severity"
    EDGE = "edge"
    DEVICE = "device"
    DAY = "day"


class SessionLog(Closing):
    """A session log, opened for reading; nothing is created or migrated. Thread-safe.

    Only `quarantine`, `unquarantine` and `record_event` write, each over a separate connection.
    Close the log, use it as a context manager, or drop it. Times are aware; ages count back from `now`.

    Every method raises `StoreUnavailable` if the database does not answer, `InvalidQuery` for an argument that cannot
    be understood, and every one that writes `StoreError` if the database may not be written.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER[:PASSWORD]@HOST/NAME`.
        now: The wall clock.

    Raises:
        StoreUnavailable: The database does not exist or cannot be opened.
        StoreError: The URL is wrong, the driver is missing, or the tables are missing or of another version.
    """

    def __init__(self, url: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._url = url
        self._engine = open_existing(url, read_only=True)
        weakref.finalize(self, self._engine.dispose)  # for a caller that asks one question and drops the log

    def sessions(
        self,
        *,
        since: Time | None = None,
        until: Time | None = None,
        device: str | Sequence[str] | None = None,
        edge: str | None = None,
        reason: EndReason | str | None = None,
        mode: Mode | str | None = None,
        open: bool = False,  # noqa: A002 - as the log says it
        where: Sequence[Filter] = (),
        limit: int = 100,
        skip: int = 0,
    ) -> list[SessionView]:
        """Return sessions, the latest opened first; arguments left out admit all.

        Args:
            since: Opened at or after.
            until: Opened before.
            device: Of this device, or of one of these.
            edge: Served last by this edge.
            reason: How it ended.
            mode: How it was verified.
            open: Only those that have not ended.
            where: Filters by `filters.SESSION_FIELDS`.
            limit: Maximum number.
            skip: Number of sessions to leave out.
        """
        _check_limit(limit)
        equal = {"edge": edge, "reason": _member(EndReason, reason), "mode": _member(Mode, mode)}
        conditions = [SESSIONS.c[name] == value for name, value in equal.items() if value is not None]
        conditions += self._within(SESSIONS.c.opened_at, since, until)
        if devices := _several(device):
            conditions.append(SESSIONS.c.device.in_(devices))
        if open:
            conditions.append(SESSIONS.c.reason.is_(None))
        conditions += filters.conditions(SESSIONS, [each for each in where if each.field != _LABELS])
        if labels := [each.value for each in where if each.field == _LABELS]:
            labelled = select(LABELS.c.device).where(LABELS.c.label.in_(labels))
            conditions.append(SESSIONS.c.device.in_(labelled))
        query = select(SESSIONS).where(*conditions).order_by(SESSIONS.c.opened_at.desc(), SESSIONS.c.session)
        with self._reading() as connection:
            query = query.limit(limit).offset(skip)
            return queries.session_views(connection, connection.execute(query).mappings().all())

    def session(self, session: str, *, device: str | None = None) -> SessionView:
        """Return one session, by its id or enough of its beginning.

        `device` is only needed where two devices have given their sessions the same id.

        Raises:
            NotFound: There is none.
            StoreError: There are several.
        """
        with self._reading() as connection:
            return queries.session_views(connection, [queries.find_session(connection, session, device=device)])[0]

    def segments(self, session: str, *, device: str | None = None) -> list[SegmentView]:
        """Return a session's stays at edges, in order. Arguments and errors as for `session`."""
        with self._reading() as connection:
            found = queries.find_session(connection, session, device=device)
            own = (SEGMENTS.c.session == found["session"], SEGMENTS.c.device == found["device"])
            query = select(SEGMENTS).where(*own).order_by(SEGMENTS.c.segment)
            return [queries.segment_view(row) for row in connection.execute(query).mappings()]

    def rounds(
        self, session: str, *, device: str | None = None, skip: int = 0, limit: int | None = None
    ) -> list[RoundView]:
        """Return a session's verdicts, in order, from number `skip` on.

        Otherwise as `session`.
        """
        if skip < 0 or (limit is not None and limit < 1):
            raise InvalidQuery("Rounds are left out from 0 on, and at least 1 is returned.")
        with self._reading() as connection:
            found = queries.find_session(connection, session, device=device)
            query = select(*(ROUNDS.c[field.name] for field in fields(RoundView)))
            query = query.where(ROUNDS.c.session == found["session"], ROUNDS.c.device == found["device"])
            query = query.order_by(ROUNDS.c.segment, ROUNDS.c.round)
            if skip or limit is not None:
                query = query.offset(skip).limit(_ALL if limit is None else limit)
            return [RoundView(**row) for row in connection.execute(query).mappings()]

    def devices(self, *, counted: bool = True) -> list[DeviceView]:
        """Return all devices, by name.

        Without `counted`, sums such as sessions, acceptance and tokens are zero or None, and no rollups are read.
        """
        with self._reading() as connection:
            return queries.read_devices(connection, now=self._now(), counted=counted)

    def device(self, name: str) -> DeviceView:
        """Return one device; raises `NotFound` if there is none of that name."""
        with self._reading() as connection:
            found = queries.read_devices(connection, now=self._now(), only=name)
        if not found:
            raise NotFound(f"There is no device {name!r} in the session log; 'devices' lists those there are.")
        return found[0]

    def events(
        self,
        *,
        since: Time | None = None,
        until: Time | None = None,
        device: str | Sequence[str] | None = None,
        edge: str | None = None,
        session: str | None = None,
        kind: str | None = None,
        code: str | None = None,
        severity: Severity | str | None = None,
        where: Sequence[Filter] = (),
        limit: int = 100,
        skip: int = 0,
    ) -> list[EventView]:
        """Return events, the latest first; arguments left out admit all.

        Args:
            since: Lasted until this time or later.
            until: Began before.
            device: Of this device, or of one of these; with a session: the one that owns it.
            edge: Logged by this edge.
            session: Of this session, by its id or enough of its beginning. Events of one minute, device and code are
                one, which names the first session.
            kind: A kind of `fleet_edge.session_log.event_codes`.
            code: A code of that kind.
            severity: At least this severe.
            where: Filters by `filters.EVENT_FIELDS`.
            limit: Maximum number.
            skip: Number of events to leave out.

        Raises:
            NotFound: There is no such session.
            StoreError: There are several.
        """
        _check_limit(limit)
        devices, of_session = _several(device), None
        with self._reading() as connection:
            if session is not None:
                found = queries.find_session(connection, session, device=devices[0] if devices else None)
                of_session, devices = found["session"], (found["device"],)
            equal = {"edge": edge, "session": of_session, "kind": kind, "code": code}
            query = select(EVENTS).where(*self._event_conditions(since, until, devices, equal, severity))
            query = query.where(*filters.conditions(EVENTS, where))
            query = query.order_by(EVENTS.c.at.desc(), EVENTS.c.id).limit(limit).offset(skip)
            return [EventView(**row) for row in connection.execute(query).mappings()]

    def event_counts(
        self,
        *,
        by: Sequence[str] = ("kind", "code"),
        since: Time | None = None,
        until: Time | None = None,
        device: str | Sequence[str] | None = None,
        edge: str | None = None,
        kind: str | None = None,
        code: str | None = None,
        severity: Severity | str | None = None,
        where: Sequence[Filter] = (),
        limit: int = 100,
    ) -> list[EventCount]:
        """Return the number of events, the most frequent first; by day, the latest first.

        Grouped by some of `kind`, `code`, `severity`, `edge`, `device`, `day`; otherwise as `events`.
        """
        _check_limit(limit)
        grouping = [_known(_EventGrouping, each) for each in by]
        conditions = self._event_conditions(
            since, until, _several(device), {"edge": edge, "kind": kind, "code": code}, severity
        )
        day = self._begin_of_time(_DAY_LENGTH)
        groups = {each: day if each is _EventGrouping.DAY else EVENTS.c[each] for each in grouping}
        named = [column.label(each.value) for each, column in groups.items()]
        times = func.sum(EVENTS.c.count).label("times")
        counted = (func.count().label("events"), times, func.max(EVENTS.c.last_at).label("last_at"))
        conditions += filters.conditions(EVENTS, where)
        query = select(*named, *counted).where(*conditions).group_by(*groups.values()).limit(limit)
        query = query.order_by(*(label.desc() for label in named if label.name == "day"), times.desc())
        with self._reading() as connection:
            rows = connection.execute(query).mappings().all()
        nothing = {each.value: None for each in _EventGrouping}
        return [EventCount(**{**nothing, **row, "times": int(row["times"])}) for row in rows if row["events"]]

    def failures(
        self, grain: str, *, since: Time | None = None, device: str | None = None, edge: str | None = None
    ) -> dict[datetime, Counter[str]]:
        """Return the number of failures, refusals and faults by time and code; arguments as for `usage`, `events`."""
        length = _known(Grain, grain)
        time = self._begin_of_time(
            _MINUTE_LENGTH if length in MINUTES else _HOUR_LENGTH if length is Grain.HOUR else _DAY_LENGTH
        )
        kind, code = EVENTS.c.kind, EVENTS.c.code
        of_sessions = and_(kind == EventKind.SESSION, code.in_(("failed", "lost", "abandoned")))
        query = select(time, kind, code, func.sum(EVENTS.c.count)).group_by(time, kind, code)
        query = query.where(*self._event_conditions(since, None, _several(device), {"edge": edge}))
        query = query.where(or_(kind.in_((EventKind.REFUSED, EventKind.FAULT)), of_sessions))
        found: dict[datetime, Counter[str]] = {}
        with self._reading() as connection:
            for at, of_kind, of_code, times in connection.execute(query):
                start = floor(length, datetime.fromisoformat(at).replace(tzinfo=UTC))
                found.setdefault(start, Counter())[f"{of_kind} {of_code}"] += int(times)
        return found

    def record_event(
        self,
        *,
        kind: str,
        code: str,
        sentence: str,
        who: str | None = None,
        device: str | None = None,
    ) -> None:
        """Write an event that an administrator, or a program of the administrator's, has caused or found."""
        record = event_record(self._now(), kind=kind, code=code, sentence=sentence, device=device, who=who)
        from fleet_edge.session_log.merge import merge_records  # noqa: PLC0415 - only to write

        with self._writing() as connection:
            merge_records(connection, [record])

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the labels of each device that has any, by name."""
        with self._reading() as connection:
            return read_labels(connection)

    def ends(self, *, since: Time | None = None, until: Time | None = None) -> dict[str, int]:
        """Return how many sessions opened within a time did not end as they should, by reason, of those kept."""
        query = select(func.count()).select_from(SESSIONS).where(*self._within(SESSIONS.c.opened_at, since, until))
        reasons = (EndReason.CANCELLED, EndReason.LOST, EndReason.FAILED)
        with self._reading() as connection:  # one range of an index each
            counts = [connection.scalar(query.where(SESSIONS.c.reason == reason)) for reason in reasons]
        return {reason.value: int(count or 0) for reason, count in zip(reasons, counts, strict=True)}

    def edges(self) -> list[EdgeView]:
        """Return all edges with their latest load, by name."""
        with self._reading() as connection:
            return queries.read_edges(connection, now=self._now())

    def edge(self, name: str) -> EdgeView:
        """Return one edge with its latest load; raises `NotFound` if there is none of that name."""
        with self._reading() as connection:
            found = queries.read_edges(connection, now=self._now(), only=name)
        if not found:
            raise NotFound(f"There is no edge {name!r} in the session log; 'edges' lists those there are.")
        return found[0]

    def spent_times(self, by: str, *, since: Time) -> dict[str, SpentTime]:
        """Return how the time of ended sessions was spent, by `device` or `edge`.

        Counts the latest 20,000 sessions opened since a time. A session counts for the edge that it was at last.
        """
        opened_after = self._time("since", since)
        assert opened_after is not None
        with self._reading() as connection:
            return spent_times(connection, by=_known(Dimension, by), since=opened_after)

    def usage(
        self,
        *,
        since: Time | None = None,
        until: Time | None = None,
        by: Sequence[str] = (),
        grain: str | None = None,
        device: str | Sequence[str] | None = None,
        edge: str | Sequence[str] | None = None,
        app: str | Sequence[str] | None = None,
    ) -> list[UsageView]:
        """Add up what the edges counted, including what is purged, for each combination of some dimensions.

        Args:
            since: Of segments opened at or after. In a period of more than 12 hours (2 days by device) the hour that
                contains it counts as a whole, in one of more than 8 days (2 days by device) the day (UTC).
            until: Opened before, likewise.
            by: Of `device`, `edge`, `app`, `draft_model`, `quantization`, `target_id`.
            grain: Also by `minute`, `5-minutes`, `hour`, `day` or `month`. Minutes, and hours of devices, are read from
                segments, which takes long for a long time. Where those are purged, minutes become hours, and devices
                have no hours.
            device: Of this device, or of one of these.
            edge: Of segments at this edge.
            app: Of this application, on any device.

        Returns:
            Sums in the order of time, then the most tokens first.
        """
        period = self._period(since, until, device=device, edge=edge, app=app)
        dimensions, length = [_known(Dimension, name) for name in by], _member(Grain, grain)
        with self._reading() as connection:
            found = totals.usage(connection, now=self._now(), period=period, by=dimensions, grain=length)
        names = [dimension.value for dimension in dimensions]
        return sorted(
            found,
            key=lambda view: (
                view.start or datetime.min.replace(tzinfo=UTC),
                -view.counted.tokens,
                *(getattr(view, name) or "" for name in names),
            ),
        )

    def latencies(
        self, *, since: Time | None = None, until: Time | None = None, edge: str | None = None
    ) -> dict[str, Distribution]:
        """Return the distribution of what segments measure (ms), by measure, including what is purged.

        Times as for `usage`.
        """
        found = self._latencies(since, until, edge, None).get(None, {})
        return {measure.value: found.get(measure, Distribution({})) for measure in Measure}

    def latencies_over_time(
        self, grain: str, *, since: Time | None = None, until: Time | None = None, edge: str | None = None
    ) -> dict[datetime, dict[str, Distribution]]:
        """Return `latencies` over time, by the measures that there are; `grain` as for `usage`."""
        found = self._latencies(since, until, edge, _known(Grain, grain))
        return {
            start: {measure.value: own for measure, own in measured.items()}
            for start, measured in found.items()
            if start is not None
        }

    def _latencies(
        self, since: Time | None, until: Time | None, edge: str | None, grain: Grain | None
    ) -> dict[datetime | None, dict[Measure, Distribution]]:
        period = self._period(since, until, edge=edge)
        with self._reading() as connection:
            return totals.latencies(connection, now=self._now(), period=period, grain=grain)

    def active_devices(self, grain: str, *, since: datetime) -> dict[datetime, int]:
        """Return how many devices opened sessions at edges, or resumed them, by time; `grain` as for `usage`."""
        with self._reading() as connection:
            return totals.active(connection, now=self._now(), since=since, grain=_known(Grain, grain))

    def edge_loads(
        self, grain: str, *, since: datetime, edge: str | None = None
    ) -> dict[datetime, dict[str, LoadView]]:
        """Return the mean loads of edges by time and edge; `grain` as for `usage`."""
        by = _known(Grain, grain)
        length = MINUTES.get(by, HOUR if by is Grain.HOUR else DAY)
        number: ColumnElement[int] = literal_column(f"edge_loads.minute / {length // timedelta(minutes=1)}")
        means = (func.avg(EDGE_LOADS.c[field.name]) for field in fields(LoadView))
        query = select(number, EDGE_LOADS.c.edge, *means).where(EDGE_LOADS.c.minute >= minute_of(since))
        if by is Grain.MONTH:  # one load an hour: a year has 200,000 with four edges
            query = query.where(EDGE_LOADS.c.minute % 60 == 0)
        if edge is not None:
            query = query.where(EDGE_LOADS.c.edge == edge)
        found: dict[datetime, dict[str, list[Sequence[Any]]]] = {}
        with self._reading() as connection:
            for place, name, *values in connection.execute(query.group_by(number, EDGE_LOADS.c.edge)):
                # Months differ in length: they are means of their days.
                found.setdefault(floor(by, BEGINNING + place * length), {}).setdefault(name, []).append(values)
        return {
            start: {name: LoadView(*map(_mean, zip(*rows, strict=True))) for name, rows in own.items()}
            for start, own in found.items()
        }

    def beginning(self) -> datetime | None:
        """Return when the first session was opened, of purged ones roughly; None without any. Cheap."""
        with self._reading() as connection:
            return totals.beginning(connection)

    def export_columns(self, what: str) -> tuple[str, ...]:
        """Return the names of the columns of `export_rows`."""
        return export.columns(_known(export.Exported, what))

    def export_rows(
        self, what: str, *, since: Time | None = None, until: Time | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Return all rows of a kind within a time, the earliest first, in bounded memory.

        Args:
            what: `sessions`, `segments`, `rounds` or `events`.
            since: Opened, judged or logged at or after.
            until: Likewise before.
        """
        kind = _known(export.Exported, what)
        after, before = self._time("since", since), self._time("until", until)
        return export.rows(self._reading, kind, since=after, until=before)

    def latest(self) -> datetime | None:
        """Return the time of the log's latest record; None if it has none. Cheap."""
        heard = (SESSIONS.c.last_at, DEVICES.c.seen_at, EVENTS.c.at)
        with self._reading() as connection:
            times = [connection.scalar(select(func.max(column))) for column in heard]
        return max((each for each in times if each is not None), default=None)

    def alerts(self, *, open: bool | None = None, limit: int = MAX_OPEN) -> list[AlertView]:  # noqa: A002 - as a column
        """Return alerts: open ones first, critical ones before others, then the latest."""
        with self._reading() as connection:
            return read_alerts(connection, is_open=open, limit=limit)

    def evaluation(self) -> Evaluation:
        """Return when the alerts were last evaluated."""
        with self._reading() as connection:
            return last_evaluation(connection, now=self._now())

    def quarantines(self) -> list[QuarantineView]:
        """Return the quarantined devices, by name."""
        with self._reading() as connection:
            return list(quarantines.read_quarantines(connection, now=self._now()).active.values())

    def quarantine(
        self,
        device: str,
        *,
        duration: str | timedelta | None = None,
        reason: str = "",
        who: str = ADMINISTRATOR,
        source: str = "",
    ) -> QuarantineView:
        """Quarantine a device: within seconds all edges that write to this database drop its messages.

        Args:
            device: Its name; it need not have been seen yet.
            duration: `90s`, `30m`, `2h`, `7d`, or a timedelta; None: until it is lifted.
            reason: A sentence for the log.
            who: Account or user, for the audit log.
            source: Machine or address, for the audit log.

        Returns:
            The quarantine in force: this one, or one by an edge that ends later.
        """
        now = self._now()
        try:
            until = None if duration is None else now + read_duration(duration)
        except (ValueError, OverflowError) as error:
            sentence = error if isinstance(error, ValueError) else "The duration is too long."
            raise InvalidQuery(f"duration: {sentence}") from None
        said = reason.strip() or "The administrator has quarantined the device."
        with self._writing() as connection:
            held = quarantines.quarantine_device(connection, _name(device), until=until, reason=said, now=now)
            ends = "until it is lifted" if until is None else f"until {until:%Y-%m-%d %H:%M:%S} UTC"
            entry = AuditEntry(who=who, action="quarantine", subject=device, after=f"{ends}: {said}", source=source)
            record_audit(connection, [entry], now=now)
        assert held is not None  # it ends after `now`
        return held

    def unquarantine(self, device: str, *, who: str = ADMINISTRATOR, source: str = "") -> QuarantineView | None:
        """Lift all quarantines of a device, including those not yet written; return the one that was in force."""
        now = self._now()
        with self._writing() as connection:
            held = quarantines.lift_quarantines(connection, _name(device), now=now)
            before = None if held is None else f"quarantined by {held.by}: {held.reason}"
            entry = AuditEntry(who=who, action="unquarantine", subject=device, before=before, source=source)
            record_audit(connection, [entry], now=now)
        return held

    def close(self) -> None:
        """Close all connections to the database."""
        self._engine.dispose()

    def _period(
        self, since: Time | None, until: Time | None, **chosen: str | Sequence[str] | None
    ) -> totals.UsageFilter:
        named = {Dimension(name): _several(values) for name, values in chosen.items() if values is not None}
        return totals.UsageFilter(since=self._time("since", since), until=self._time("until", until), chosen=named)

    def _within(self, column: ColumnElement[Any], since: Time | None, until: Time | None) -> list[ColumnElement[bool]]:
        after, before = self._time("since", since), self._time("until", until)
        return [
            *([] if after is None else [column >= after]),
            *([] if before is None else [column < before]),
        ]

    def _event_conditions(
        self,
        since: Time | None,
        until: Time | None,
        devices: Sequence[str],
        equal: Mapping[str, str | None],
        severity: Severity | str | None = None,
    ) -> list[ColumnElement[bool]]:
        """Return conditions on events that lasted until `since` or later, of columns that are `equal` to values."""
        conditions = self._within(EVENTS.c.at, None, until)
        if (after := self._time("since", since)) is not None:
            # The index has their beginning.
            conditions += [EVENTS.c.at >= after - _LONGEST, EVENTS.c.last_at >= after]
        if devices:
            conditions.append(EVENTS.c.device.in_(devices))
        if (grave := _member(Severity, severity)) is not None:
            conditions.append(EVENTS.c.severity.in_(_GRAVEST[_GRAVEST.index(grave) :]))
        return conditions + [EVENTS.c[name] == value for name, value in equal.items() if value is not None]

    def _begin_of_time(self, length: int) -> ColumnElement[str]:
        return begin_of_time(EVENTS.c.at, length, self._engine.dialect.name)

    def _time(self, name: str, value: Time | None) -> datetime | None:
        try:
            return None if value is None else read_time(value, now=self._now())
        except ValueError as error:
            raise InvalidQuery(f"{name}: {error}") from None

    def _reading(self) -> AbstractContextManager[Connection]:
        return transaction(self._engine, write=False)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        engine = open_existing(self._url, read_only=False)
        try:
            with transaction(engine) as connection:
                yield connection
        finally:
            engine.dispose()


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise InvalidQuery(f"The limit is {limit}; it must be at least 1.")


def _several(device: str | Sequence[str] | None) -> tuple[str, ...]:
    return (device,) if isinstance(device, str) else tuple(device or ())


def _name(device: str) -> str:
    try:
        return check_name(device)
    except InvalidName as error:
        raise InvalidQuery(str(error)) from None


def _member(kind: type[E], value: str | None) -> E | None:
    return None if value is None else _known(kind, value)


def _known(kind: type[E], value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(sorted(kind))
        raise InvalidQuery(f"There is no {value[:40]!r} to choose by; there are {known}.") from None


def _mean(values: Sequence[Any]) -> float | None:
    # PostgreSQL's means of integers are decimals.
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None

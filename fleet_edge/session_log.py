"""SessionLog: query the database that the edges write, and quarantine devices.

::

    from fleet_edge import SessionLog

    for session in SessionLog("sqlite:///fleet.sqlite3").sessions(since="2h", device="gateway-7"):
        print(session.session, session.counted.acceptance)
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import Connection

from fleet_common.closing import Closing
from fleet_common.validation import read_duration, read_time
from fleet_edge.store import export, quarantines, queries, totals
from fleet_edge.store.database import open_existing, transaction
from fleet_edge.store.errors import InvalidQuery
from fleet_edge.store.event_codes import Severity
from fleet_edge.store.periods import Grain
from fleet_edge.store.queries import EventFilter, EventGrouping
from fleet_edge.store.records import ADMINISTRATOR, EventLogged
from fleet_edge.store.rollups import Dimension, Measure
from fleet_edge.store.steering import devices_with_labels, read_labels, record_audit
from fleet_edge.store.totals import Distribution
from fleet_edge.store.views import (
    AuditEntry,
    DeviceView,
    EdgeView,
    EventCount,
    EventView,
    HourView,
    LoadView,
    QuarantineView,
    RoundView,
    SegmentView,
    SessionView,
    Tally,
    UsageView,
)
from schemas.errors import InvalidName
from schemas.names import check_name
from schemas.policy import Mode
from schemas.reasons import EndReason

Time = str | datetime | timedelta
"""An age (`"90s"`, `"30m"`, `"2h"`, `"7d"`, a timedelta) or a time (ISO 8601, a datetime; UTC is assumed)."""

E = TypeVar("E", bound=StrEnum)


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
        model: str | None = None,
        label: str | Sequence[str] | None = None,
        limit: int = 100,
    ) -> list[SessionView]:
        """Return sessions, the latest opened first; arguments left out admit all.

        Args:
            since: Opened at or after.
            until: Opened before.
            device: Of this device, or of one of these.
            edge: Served, at least once, by this edge.
            reason: How it ended.
            mode: How it was verified.
            open: Only those that have not ended.
            model: Name of the draft model.
            label: Of devices that have this label, or one of these.
            limit: Maximum number.
        """
        _check_limit(limit)
        chosen = queries.SessionFilter(
            devices=_several(device),
            edge=edge,
            reason=_member(EndReason, reason),
            mode=_member(Mode, mode),
            since=self._time("since", since),
            until=self._time("until", until),
            open=open,
            draft_model=model,
        )
        with self._reading() as connection:
            if label is not None:
                labelled = devices_with_labels(connection, (label,) if isinstance(label, str) else label)
                names = labelled.intersection(chosen.devices) if chosen.devices else labelled
                if not names:
                    return []
                chosen = replace(chosen, devices=tuple(sorted(names)))
            return queries.sessions(connection, chosen, limit=limit)

    def session(self, session: str, *, device: str | None = None) -> SessionView:
        """Return one session, by its id or enough of its beginning.

        `device` is only needed where two devices have given their sessions the same id.

        Raises:
            NotFound: There is none.
            StoreError: There are several.
        """
        with self._reading() as connection:
            return queries.session(connection, session, device=device)

    def segments(self, session: str, *, device: str | None = None) -> list[SegmentView]:
        """Return a session's stays at edges, in order. Arguments and errors as for `session`."""
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            return queries.segments(connection, found.session, device=found.device)

    def rounds(
        self, session: str, *, device: str | None = None, skip: int = 0, limit: int | None = None
    ) -> list[RoundView]:
        """Return a session's verdicts, in order, from number `skip` on.

        Otherwise as `session`.
        """
        if skip < 0 or (limit is not None and limit < 1):
            raise InvalidQuery("Rounds are left out from 0 on, and at least 1 is returned.")
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            return queries.rounds(connection, found.session, device=found.device, skip=skip, limit=limit)

    def devices(self, *, counted: bool = True) -> list[DeviceView]:
        """Return all devices, by name.

        Without `counted`, sums such as sessions, acceptance and tokens are zero or None, and no rollups are read.
        """
        with self._reading() as connection:
            return queries.devices(connection, now=self._now(), counted=counted)

    def device(self, name: str) -> DeviceView:
        """Return one device; raises `NotFound` if there is none of that name."""
        with self._reading() as connection:
            return queries.device(connection, name, now=self._now())

    def hours(self, device: str, *, limit: int = 24) -> list[HourView]:
        """Return a device's totals by hour, the latest first."""
        with self._reading() as connection:
            return queries.hours(connection, device, limit=limit)

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
        who: str | None = None,
        limit: int = 100,
    ) -> list[EventView]:
        """Return what happened, the latest first; arguments left out admit all.

        Args:
            since: Lasted until this time or later.
            until: Began before.
            device: Of this device, or of one of these; with a session: the one that owns it.
            edge: Logged by this edge.
            session: Of this session, by its id or enough of its beginning. Events of one minute, device and code are
                one, which names the first session.
            kind: A kind of `fleet_edge.store.event_codes`.
            code: A code of that kind.
            severity: At least this severe.
            who: Done by this person.
            limit: Maximum number.

        Raises:
            NotFound: There is no such session.
            StoreError: There are several.
        """
        _check_limit(limit)
        chosen = self._events(since, until, device, severity, edge=edge, kind=kind, code=code, who=who)
        with self._reading() as connection:
            if session is not None:
                owner = chosen.devices[0] if chosen.devices else None
                found = queries.session(connection, session, device=owner)
                chosen = replace(chosen, session=found.session, devices=(found.device,))
            return queries.events(connection, chosen, limit=limit)

    def event_counts(
        self,
        *,
        by: Sequence[EventGrouping | str] = ("kind", "code"),
        since: Time | None = None,
        until: Time | None = None,
        device: str | Sequence[str] | None = None,
        edge: str | None = None,
        kind: str | None = None,
        code: str | None = None,
        severity: Severity | str | None = None,
        limit: int = 100,
    ) -> list[EventCount]:
        """Return the number of events, the most frequent first.

        Grouped by some of `kind`, `code`, `severity`, `edge`, `device`, `day`; otherwise as `events`.
        """
        _check_limit(limit)
        grouping = [group for each in by if (group := _member(EventGrouping, each)) is not None]
        chosen = self._events(since, until, device, severity, edge=edge, kind=kind, code=code)
        with self._reading() as connection:
            return queries.event_counts(connection, chosen, by=grouping, limit=limit)

    def failures(
        self, grain: str, *, since: Time | None = None, device: str | None = None, edge: str | None = None
    ) -> dict[datetime, Counter[str]]:
        """Return the number of failures, refusals and faults by time and code; arguments as for `usage`, `events`."""
        chosen = self._events(since, None, device, edge=edge)
        with self._reading() as connection:
            return queries.failures(connection, chosen, grain=_known(Grain, grain))

    def record_event(
        self,
        *,
        kind: str,
        code: str,
        sentence: str,
        who: str | None = None,
        device: str | None = None,
        severity: Severity | None = None,
        edge: str = ADMINISTRATOR,
    ) -> None:
        """Write an event that an administrator, or a program of the administrator's, has caused or found.

        `severity` is by default that of `fleet_edge.store.event_codes`.
        """
        record = EventLogged(
            kind=kind,
            code=code,
            sentence=sentence,
            at=self._now(),
            device=device,
            who=who,
            severity=severity,
            edge=edge,
        )
        from fleet_edge.store.merge import merge_records  # noqa: PLC0415 - only to write

        with self._writing() as connection:
            merge_records(connection, [record])

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the labels of each device that has any, by name."""
        with self._reading() as connection:
            return read_labels(connection)

    def ends(self, *, since: Time | None = None, until: Time | None = None) -> dict[str, int]:
        """Return how many sessions opened within a time did not end as they should, by reason, of those kept."""
        after, before = self._time("since", since), self._time("until", until)
        reasons = (EndReason.CANCELLED, EndReason.LOST, EndReason.FAILED)
        with self._reading() as connection:
            return queries.ends(connection, [reason.value for reason in reasons], since=after, until=before)

    def edges(self) -> list[EdgeView]:
        """Return all edges with their latest load, by name."""
        with self._reading() as connection:
            return queries.edges(connection, now=self._now())

    def stats(self, *, since: Time | None = None, until: Time | None = None, by: str | None = None) -> dict[str, Tally]:
        """Add up what the edges counted, including what is purged.

        Of segments opened from `since` until before `until`; where segments are purged, the hour that contains these
        counts. `by` one of `device`, `draft`, `edge`, `app`, `hour`, `day`, `month`.

        Returns a tally by name, the most tokens first, or by time; without `by` the one name `all`.
        """
        grouping = _member(totals.Grouping, by)
        period = self._period(since, until)
        with self._reading() as connection:
            return totals.stats(connection, period=period, by=grouping)

    def usage(
        self,
        *,
        since: Time | None = None,
        until: Time | None = None,
        by: Sequence[str] = (),
        grain: str | None = None,
        device: str | Sequence[str] | None = None,
        edge: str | None = None,
        app: str | None = None,
    ) -> list[UsageView]:
        """Add up what the edges counted, including what is purged, for each combination of some dimensions.

        Args:
            since: As `stats`.
            until: As `stats`.
            by: Of `device`, `edge`, `app`, `draft_model`, `quantization`.
            grain: Also by `minute`, `5-minutes`, `hour`, `day` or `month`. Minutes are read from segments, which takes
                long for a long time; where those are purged, by the hour.
            device: Of this device, or of one of these.
            edge: Of segments at this edge.
            app: Of this application, on any device.

        Returns:
            Sums in the order of time, then the most tokens first.
        """
        period = self._period(since, until, device=device, edge=edge, app=app)
        dimensions, length = [_known(Dimension, name) for name in by], _member(Grain, grain)
        with self._reading() as connection:
            found = totals.usage(connection, period=period, by=dimensions, grain=length)
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

        Times as for `stats`.
        """
        found = self._latencies(since, until, edge, None).get(None, {})
        return {measure.value: found.get(measure, Distribution({})) for measure in Measure}

    def latencies_over_time(
        self, grain: str, *, since: Time | None = None, until: Time | None = None, edge: str | None = None
    ) -> dict[datetime, dict[str, Distribution]]:
        """Return what `latencies` does by time, and by the measures that there are; `grain` as for `usage`."""
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
            return totals.latencies(connection, period=period, grain=grain)

    def active_devices(self, grain: str, *, since: datetime) -> dict[datetime, int]:
        """Return how many devices opened sessions at edges, or resumed them, by time; `grain` as for `usage`."""
        with self._reading() as connection:
            return totals.active(connection, since=since, grain=_known(Grain, grain))

    def edge_loads(
        self, grain: str, *, since: datetime, edge: str | None = None
    ) -> dict[datetime, dict[str, LoadView]]:
        """Return the mean loads of edges by time and edge; `grain` as for `usage`."""
        with self._reading() as connection:
            return queries.loads(connection, since=since, grain=_known(Grain, grain), edge=edge)

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
            what: `sessions` (with the sums of their segments), `segments`, `rounds` or `events`.
            since: Opened, judged or logged at or after.
            until: Likewise before.
        """
        kind = _known(export.Exported, what)
        after, before = self._time("since", since), self._time("until", until)
        return export.rows(self._reading, kind, since=after, until=before)

    def latest(self) -> datetime | None:
        """Return the time of the log's latest record; None if it has none. Cheap."""
        with self._reading() as connection:
            return queries.latest(connection)

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

    def _events(
        self,
        since: Time | None,
        until: Time | None,
        device: str | Sequence[str] | None,
        severity: Severity | str | None = None,
        **equal: Any,  # noqa: ANN401 - further fields
    ) -> EventFilter:
        after, before = self._time("since", since), self._time("until", until)
        grave = _member(Severity, severity)
        return EventFilter(since=after, until=before, devices=_several(device), severity=grave, **equal)

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

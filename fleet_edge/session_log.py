"""SessionLog: query the database that the edges write, and quarantine devices.

::

    from fleet_edge import SessionLog

    for session in SessionLog("sqlite:///fleet.sqlite3").sessions(since="2h", device="gateway-7"):
        print(session.session, session.counted.acceptance)
"""

import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from fleet_common.validation import read_duration, read_time
from fleet_edge.store import edge_queries, event_queries, export, fences, queries, rollouts, texts, totals
from fleet_edge.store.database import open_existing, open_for_reading
from fleet_edge.store.errors import InvalidQuery, NotFound, StoreUnavailable
from fleet_edge.store.event_codes import Severity, severity_of
from fleet_edge.store.event_queries import EventFilter, EventGrouping
from fleet_edge.store.records.events import EventLogged
from fleet_edge.store.records.fences import ADMINISTRATOR
from fleet_edge.store.rollouts import MachineRelease, MachineRollout, Rollout
from fleet_edge.store.rollups.distribution import Distribution
from fleet_edge.store.steering.labels import devices_with_labels, read_labels
from fleet_edge.store.texts import StoredText
from fleet_edge.store.views import (
    DeviceView,
    EdgeView,
    EventCount,
    EventView,
    FenceView,
    HourView,
    RoundView,
    SegmentView,
    SessionView,
    Tally,
    UsageView,
)
from schemas.errors import InvalidName
from schemas.names import check_name
from schemas.policy import Mode
from schemas.printable import printable_line
from schemas.reasons import EndReason

Time = str | datetime | timedelta
"""An age (`"90s"`, `"30m"`, `"2h"`, `"7d"`, a timedelta) or a time (ISO 8601, a datetime; UTC is assumed)."""

E = TypeVar("E", bound=StrEnum)


class SessionLog:
    """A session log, opened for reading; nothing is created or migrated. Thread-safe.

    Only `fence`, `unfence`, `record_event` and `record_rollouts` write, each over its own connection. Close the log,
    use it
    as a context manager, or drop it. Every method raises `StoreUnavailable` if the database does not answer, and
    `InvalidQuery` for an invalid time, name or limit. Filters that are left out match everything.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER[:PASSWORD]@HOST/NAME`.
        now: The wall clock (aware), from which ages are counted back.

    Raises:
        StoreUnavailable: The database does not exist or cannot be opened.
        StoreError: The URL is wrong, the driver is missing, or the tables are missing or of another version.
    """

    def __init__(self, url: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._url = url
        self._engine = open_for_reading(url)
        weakref.finalize(self, self._engine.dispose)  # for callers that ask once and drop the log

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
        """Return sessions, the latest opened first.

        Args:
            since: Opened at or after.
            until: Opened before.
            device: Device, or several.
            edge: An edge that served the session.
            reason: How it ended.
            mode: Sampling mode.
            open: Only sessions that have not ended.
            model: Draft model.
            label: Label of the device, or several.
            limit: Most sessions.
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
        """Return one session by its id, or by an unambiguous prefix of it.

        Give the device if two devices use the same id.

        Raises:
            NotFound: There is none.
            StoreError: There are several.
        """
        with self._reading() as connection:
            return queries.session(connection, session, device=device)

    def segments(self, session: str, *, device: str | None = None) -> list[SegmentView]:
        """Return a session's segments, one for each stay at an edge, in order. Arguments and errors as in `session`."""
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            return queries.segments(connection, found.session, device=found.device)

    def rounds(
        self, session: str, *, device: str | None = None, skip: int = 0, limit: int | None = None
    ) -> list[RoundView]:
        """Return a traced session's verdicts in order, from the `skip`-th on. Otherwise as `session`."""
        if skip < 0 or (limit is not None and limit < 1):
            raise InvalidQuery("Rounds are left out from 0 on, and at least 1 is returned.")
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            return queries.rounds(connection, found.session, device=found.device, skip=skip, limit=limit)

    def text(self, session: str, *, device: str | None = None) -> StoredText | None:
        """Return the stored generation of a session; None if nothing is stored. Otherwise as `session`."""
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            own = queries.segments(connection, found.session, device=found.device)
            return texts.read_text(connection, found, own)

    def devices(self, *, counted: bool = True) -> list[DeviceView]:
        """Return all devices, by name. Without `counted` their totals are left out, which is faster."""
        with self._reading() as connection:
            return queries.devices(connection, now=self._now(), counted=counted)

    def device(self, name: str) -> DeviceView:
        """Return one device.

        Raises:
            NotFound: There is none of that name.
        """
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
        """Return events, the latest first.

        Args:
            since: Last occurrence at or after.
            until: First occurrence before.
            device: Device, or several; with `session` its owner.
            edge: Edge that logged it.
            session: Id of a session, or a prefix. Events of one minute, device and code are one event, which names the
                first session.
            kind: Subject (see `fleet_edge.store.event_codes`).
            code: What happened.
            severity: Least severity.
            who: Person who did it.
            limit: Most events.

        Raises:
            NotFound: There is no such session.
            StoreError: There are several.
        """
        _check_limit(limit)
        chosen = EventFilter(
            since=self._time("since", since),
            until=self._time("until", until),
            devices=_several(device),
            edge=edge,
            kind=kind,
            code=code,
            severity=_member(Severity, severity),
            who=who,
        )
        with self._reading() as connection:
            if session is not None:
                owner = chosen.devices[0] if chosen.devices else None
                found = queries.session(connection, session, device=owner)
                chosen = replace(chosen, session=found.session, devices=(found.device,))
            return event_queries.events(connection, chosen, limit=limit)

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

        `by` lists what to count separately: `kind`, `code`, `severity`, `edge`, `device`, `day`. Filters as in
        `events`.
        """
        _check_limit(limit)
        grouping = [group for each in by if (group := _member(EventGrouping, each)) is not None]
        chosen = EventFilter(
            since=self._time("since", since),
            until=self._time("until", until),
            devices=_several(device),
            edge=edge,
            kind=kind,
            code=code,
            severity=_member(Severity, severity),
        )
        with self._reading() as connection:
            return event_queries.event_counts(connection, chosen, by=grouping, limit=limit)

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
        """Write an event that an administrator, or a program, has caused or found.

        Args:
            kind: Subject (see `fleet_edge.store.event_codes`).
            code: What happened.
            sentence: Description.
            who: Person who did it.
            device: The device concerned, if any.
            severity: Severity; by default that of `event_codes`.
            edge: Who logs it.

        Raises:
            StoreError: The database may not be written.
        """
        record = EventLogged(
            id=uuid.uuid4().hex,
            edge=edge,
            device=device,
            session=None,
            kind=kind,
            code=code,
            sentence=sentence,
            at=self._now(),
            who=who,
            severity=severity or severity_of(kind, code),
        )
        # Imported late: only needed to write.
        from fleet_edge.store.merge.merge import merge_for  # noqa: PLC0415

        with self._writing() as connection:
            merge_for(connection.dialect.name).apply(connection, [record])

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the labels of each device that has any, by name."""
        with self._reading() as connection:
            return read_labels(connection)

    def ends(self, *, since: Time | None = None, until: Time | None = None) -> dict[str, int]:
        """Return the number of sessions that were cancelled, lost or failed, by reason, of those still stored."""
        after, before = self._time("since", since), self._time("until", until)
        reasons = (EndReason.CANCELLED, EndReason.LOST, EndReason.FAILED)
        with self._reading() as connection:
            return queries.ends(connection, [reason.value for reason in reasons], since=after, until=before)

    def edges(self) -> list[EdgeView]:
        """Return all edges with their latest load, by name."""
        with self._reading() as connection:
            return edge_queries.edges(connection, now=self._now())

    def stats(self, *, since: Time | None = None, until: Time | None = None, by: str | None = None) -> dict[str, Tally]:
        """Return totals of what the edges counted, including purged sessions.

        Args:
            since: Segments opened at or after; where they are purged, the whole hour, day or month.
            until: Segments opened before; likewise.
            by: Separate totals by `device`, `draft`, `edge`, `app`, `hour`, `day` or `month`.

        Returns:
            Totals by name, the most tokens first, or by time; without `by` under the name `all`.
        """
        grouping = _member(totals.Grouping, by)
        period = totals.Period(since=self._time("since", since), until=self._time("until", until))
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
        """Return totals for each combination of some dimensions, including purged sessions.

        Args:
            since: As in `stats`.
            until: As in `stats`.
            by: Any of `device`, `edge`, `app`, `draft_model`, `quantization`.
            grain: Separate totals by `hour`, `day` or `month`; coarser where only coarser rollups are left.
            device: Device, or several.
            edge: Edge of the segments.
            app: Application.

        Returns:
            Totals by time, then the most tokens first.
        """
        chosen = {
            totals.Dimension.DEVICE: (device,) if isinstance(device, str) else device,
            totals.Dimension.EDGE: None if edge is None else (edge,),
            totals.Dimension.APP: None if app is None else (app,),
        }
        period = totals.Period(
            since=self._time("since", since),
            until=self._time("until", until),
            chosen={name: tuple(values) for name, values in chosen.items() if values is not None},
        )
        dimensions, length = [_known(totals.Dimension, name) for name in by], _member(totals.Grain, grain)
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
        """Return the distributions of segments' measures in milliseconds, by measure, including purged ones."""
        period = totals.Period(
            since=self._time("since", since),
            until=self._time("until", until),
            chosen=None if edge is None else {totals.Dimension.EDGE: (edge,)},
        )
        with self._reading() as connection:
            found = totals.latencies(connection, period=period)
        return {
            measure.value: Distribution.total(own for (_, name), own in found.items() if name is measure)
            for measure in totals.Measure
        }

    def export_columns(self, what: str) -> tuple[str, ...]:
        """Return the names of the columns of `export_rows`."""
        return export.columns(_known(export.Exported, what))

    def export_rows(
        self, what: str, *, since: Time | None = None, until: Time | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Return all rows of a kind within a time, the earliest first, in bounded memory.

        `what` is `sessions` (with the sums of their segments' counters), `segments`, `rounds` or `events`.
        """
        kind = _known(export.Exported, what)
        after, before = self._time("since", since), self._time("until", until)
        return export.rows(self._reading, kind, since=after, until=before)

    def latest(self) -> datetime | None:
        """Return the time of the latest session, device state or event; None if there is none. Cheap."""
        with self._reading() as connection:
            return queries.latest(connection)

    def fences(self) -> list[FenceView]:
        """Return the quarantined devices, by name."""
        with self._reading() as connection:
            return list(fences.read_fences(connection, now=self._now()).active.values())

    def fence(
        self,
        device: str,
        *,
        duration: str | timedelta | None = None,
        reason: str = "",
        who: str = ADMINISTRATOR,
        source: str = "",
    ) -> FenceView:
        """Quarantine a device: within seconds all edges that write to this database drop its messages.

        Args:
            device: Its name; it may be unknown so far.
            duration: `90s`, `30m`, `2h`, `7d`, or a timedelta; None until it is lifted.
            reason: A sentence for the log and for other administrators.
            who: Who does it, for the audit log.
            source: From where, likewise.

        Returns:
            The quarantine in force: this one, or one by an edge that ends later.

        Raises:
            StoreError: The database may not be written.
        """
        now = self._now()
        try:
            until = None if duration is None else now + read_duration(duration)
        except (ValueError, OverflowError) as error:
            sentence = error if isinstance(error, ValueError) else "It is longer than the calendar."
            raise InvalidQuery(f"duration: {sentence}") from None
        said = reason.strip() or "The administrator has fenced the device."
        with self._writing() as connection:
            held = fences.fence_device(connection, _name(device), until=until, reason=said, now=now)
            ends = "until it is lifted" if until is None else f"until {until:%Y-%m-%d %H:%M:%S} UTC"
            from fleet_edge.store.steering.audit import AuditEntry, record_audit  # noqa: PLC0415 - only to write

            entry = AuditEntry(who=who, action="fence", subject=device, after=f"{ends}: {said}", source=source)
            record_audit(connection, [entry], now=now)
        assert held is not None  # it ends after `now`
        return held

    def unfence(self, device: str, *, who: str = ADMINISTRATOR, source: str = "") -> FenceView | None:
        """Lift all quarantines of a device, including those not logged yet; return the one in force, if any.

        Raises:
            StoreError: The database may not be written.
        """
        now = self._now()
        with self._writing() as connection:
            held = fences.lift_fences(connection, _name(device), now=now)
            before = None if held is None else f"fenced by {held.by}: {held.reason}"
            from fleet_edge.store.steering.audit import AuditEntry, record_audit  # noqa: PLC0415 - only to write

            entry = AuditEntry(who=who, action="unfence", subject=device, before=before, source=source)
            record_audit(connection, [entry], now=now)
        return held

    def rollouts(self, *, since: Time | None = None, limit: int = 100) -> list[Rollout]:
        """Return rollouts and rollbacks begun at or after `since`, the latest first."""
        _check_limit(limit)
        after = self._time("since", since)
        with self._reading() as connection:
            return rollouts.rollouts(connection, since=after, limit=limit)

    def rollout(self, rollout: str) -> list[MachineRollout]:
        """Return what one rollout did to each of its machines, by name.

        Raises:
            NotFound: There is none of that id.
        """
        with self._reading() as connection:
            found = rollouts.machines_of(connection, rollout)
        if not found:
            raise NotFound(f"There is no rollout {printable_line(rollout)[:60]}.")
        return found

    def releases(self) -> list[MachineRelease]:
        """Return the wanted and the running release of each machine, by kind and name."""
        with self._reading() as connection:
            return rollouts.releases(connection)

    def record_rollouts(self, machines: Sequence[MachineRollout], *, stopped: bool = False) -> None:
        """Write the progress of a rollout, and an event for each machine that is done.

        Args:
            machines: A row each; writing the same row again changes nothing.
            stopped: Whether the rollout is over: machines that still wait were not touched.

        Raises:
            StoreError: The database may not be written.
        """
        with self._writing() as connection:
            rollouts.record_rollouts(connection, machines, stopped=stopped)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _time(self, name: str, value: Time | None) -> datetime | None:
        try:
            return None if value is None else read_time(value, now=self._now())
        except ValueError as error:
            raise InvalidQuery(f"{name}: {error}") from None

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            # Further lines repeat the statement.
            raise StoreUnavailable(f"The database could not be read: {str(error).partition(chr(10))[0]}") from error

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        engine = open_existing(self._url, read_only=False)
        try:
            with engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"The database could not be written: {str(error).partition(chr(10))[0]}") from error
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

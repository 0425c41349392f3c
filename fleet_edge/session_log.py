"""SessionLog: reads what devices, edges and sessions did, from the database that the edges write; fences devices.

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
    """A session log, open to read: nothing is created or migrated. May be used by several threads.

    Only `fence`, `unfence`, `record_event` and `record_rollouts` write, each over a connection of its own. Close the
    log, use it as a context manager, or drop it.

    Every method raises `StoreUnavailable` if the database does not answer.

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
        weakref.finalize(self, self._engine.dispose)  # for whoever asks one question and drops the log

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
        """Return sessions, the latest opened first; what is left out admits all.

        Args:
            since: Opened at or after.
            until: Opened before.
            device: Of this device, or of one of these.
            edge: Served, at least once, by this edge.
            reason: Ended so.
            mode: Verified so.
            open: True for those that have not ended.
            model: Drafted with this model.
            label: Of devices that have this label, or one of these.
            limit: At most so many.

        Raises:
            InvalidQuery: A time, a reason or a mode is none, or the limit is below 1.
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
        """Return one session.

        Args:
            session: Its id, or enough of its beginning.
            device: Whose it is; only needed where two devices have named their sessions alike.

        Raises:
            NotFound: There is none.
            StoreError: There are several.
        """
        with self._reading() as connection:
            return queries.session(connection, session, device=device)

    def segments(self, session: str, *, device: str | None = None) -> list[SegmentView]:
        """Return a session's stays at edges, in order. Takes and raises what `session` does."""
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            return queries.segments(connection, found.session, device=found.device)

    def rounds(
        self, session: str, *, device: str | None = None, skip: int = 0, limit: int | None = None
    ) -> list[RoundView]:
        """Return a session's verdicts, in order; none unless it was traced. Otherwise as `session`.

        Args:
            session: Its id, or enough of its beginning.
            device: Whose it is.
            skip: So many of the first are left out.
            limit: At most so many; None: all.

        Raises:
            InvalidQuery: The numbers cannot be.
        """
        if skip < 0 or (limit is not None and limit < 1):
            raise InvalidQuery("Rounds are left out from 0 on, and at least 1 is returned.")
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            return queries.rounds(connection, found.session, device=found.device, skip=skip, limit=limit)

    def text(self, session: str, *, device: str | None = None) -> StoredText | None:
        """Return what is stored of a session's text, None if nothing is. Takes and raises what `session` does."""
        with self._reading() as connection:
            found = queries.session(connection, session, device=device)
            own = queries.segments(connection, found.session, device=found.device)
            return texts.read_text(connection, found, own)

    def devices(self, *, counted: bool = True) -> list[DeviceView]:
        """Return all devices, by name.

        Args:
            counted: Whether to add up what each came to: its sessions, its acceptance, its tokens. Else these are zero
                and None, and no rollups are read.
        """
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
        """Return what a device did in each hour, the latest first."""
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
        """Return what happened, the latest first; what is left out admits all.

        Args:
            since: That went on at or after this.
            until: That began before.
            device: Of this device, or of one of these; beside a session: whose it is.
            edge: Logged by this edge.
            session: Of this session, by its id or enough of its beginning. Events of one minute, device and code are
                one, which names the first session.
            kind: What it is about; `fleet_edge.store.event_codes` has all there are.
            code: What it is.
            severity: At least so grave.
            who: Done by this person.
            limit: At most so many.

        Raises:
            InvalidQuery: A time or the severity is none, or the limit is below 1.
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
        """Return how often what happened, the most frequent first.

        Args:
            by: What is counted separately: `kind`, `code`, `severity`, `edge`, `device`, `day`.
            since: As `events` has it; likewise the others.
            until: Likewise.
            device: Likewise.
            edge: Likewise.
            kind: Likewise.
            code: Likewise.
            severity: Likewise.
            limit: At most so many counts.

        Raises:
            InvalidQuery: As `events`, or `by` is something else.
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
        """Write an event: what an administrator, or a program of the administrator's, has done or found.

        Args:
            kind: What it is about; `fleet_edge.store.event_codes` has all there are.
            code: What it is.
            sentence: The same for a person.
            who: Which person did it.
            device: Whom it concerns, if it is one device.
            severity: How grave it is; by default as `fleet_edge.store.event_codes` says.
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
        # Whoever only reads does without.
        from fleet_edge.store.merge.merge import merge_for  # noqa: PLC0415

        with self._writing() as connection:
            merge_for(connection.dialect.name).apply(connection, [record])

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the labels of each device that has any, by its name."""
        with self._reading() as connection:
            return read_labels(connection)

    def ends(self, *, since: Time | None = None, until: Time | None = None) -> dict[str, int]:
        """Return how many sessions did not end as they should, by reason, of those that are kept.

        Args:
            since: Opened at or after.
            until: Opened before.

        Raises:
            InvalidQuery: A time is none.
        """
        after, before = self._time("since", since), self._time("until", until)
        reasons = (EndReason.CANCELLED, EndReason.LOST, EndReason.FAILED)
        with self._reading() as connection:
            return queries.ends(connection, [reason.value for reason in reasons], since=after, until=before)

    def edges(self) -> list[EdgeView]:
        """Return all edges with their latest load, by name."""
        with self._reading() as connection:
            return edge_queries.edges(connection, now=self._now())

    def stats(self, *, since: Time | None = None, until: Time | None = None, by: str | None = None) -> dict[str, Tally]:
        """Add up what the edges counted, of what is purged too.

        Args:
            since: Of segments opened at or after. Where segments are purged, of the hour, day or month that it is in.
            until: Of segments opened before; likewise.
            by: `device`, `draft`, `edge`, `app`, `hour`, `day` or `month` adds up separately.

        Returns:
            A tally by name, the most tokens first, or by time; without `by` the one name `all`.

        Raises:
            InvalidQuery: A time is none, or `by` is something else.
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
        """Add up what the edges counted, of what is purged too, separately for each combination of some dimensions.

        Args:
            since: As `stats`.
            until: As `stats`.
            by: Of `device`, `edge`, `app`, `draft_model`, `quantization`.
            grain: `hour`, `day` or `month` adds up separately too; where only coarser rollups are left, these.
            device: Of this device, or of one of these.
            edge: Of segments at this edge.
            app: Of this application, of whichever device.

        Returns:
            What there is, in the order of time and then the most tokens first.

        Raises:
            InvalidQuery: A time, a dimension or a grain is none.
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
        """Return how what segments measure (ms) is distributed, by measure, of what is purged too.

        Args:
            since: As `stats`.
            until: As `stats`.
            edge: Of segments at this edge.

        Raises:
            InvalidQuery: A time is none.
        """
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
        """Return the names of the columns of `export_rows`.

        Raises:
            InvalidQuery: There is no such thing.
        """
        return export.columns(_known(export.Exported, what))

    def export_rows(
        self, what: str, *, since: Time | None = None, until: Time | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Return all rows of a kind within a time, the earliest first, in bounded memory however many they are.

        Args:
            what: `sessions` (with their segments' counters summed), `segments`, `rounds` or `events`.
            since: Opened, judged or logged at or after.
            until: Likewise before.

        Raises:
            InvalidQuery: A time is none, or there is no such thing.
        """
        kind = _known(export.Exported, what)
        after, before = self._time("since", since), self._time("until", until)
        return export.rows(self._reading, kind, since=after, until=before)

    def latest(self) -> datetime | None:
        """Return when the log last heard of a session, a device or an event; None if of nothing yet. Cheap."""
        with self._reading() as connection:
            return queries.latest(connection)

    def fences(self) -> list[FenceView]:
        """Return the devices that are fenced now, by name."""
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
        """Fence a device: within seconds all edges that write to this database drop what it sends.

        Args:
            device: Its name; it need not have been seen yet.
            duration: For how long (`90s`, `30m`, `2h`, `7d`, or a timedelta); None: until it is lifted.
            reason: A sentence for the log, and for whoever wonders.
            who: Who does it, for the audit log.
            source: From where, likewise.

        Returns:
            The fence that holds: this one, or one by an edge that ends later.

        Raises:
            InvalidQuery: The name or the duration is none.
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
        """Lift all fences of a device, those included of which the log has not heard yet.

        Args:
            device: Its name.
            who: Who does it, for the audit log.
            source: From where, likewise.

        Returns:
            The fence that was in force, if one was.

        Raises:
            InvalidQuery: The name is none.
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
        """Return what was rolled out, back or off, the latest first.

        Args:
            since: Begun at or after.
            limit: At most so many.

        Raises:
            InvalidQuery: The time is none, or the limit is below 1.
        """
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
        """Return the release that each machine should run beside the one that it runs, by kind and name."""
        with self._reading() as connection:
            return rollouts.releases(connection)

    def record_rollouts(self, machines: Sequence[MachineRollout], *, stopped: bool = False) -> None:
        """Write what a rollout does to machines, and an event for each that is done.

        Args:
            machines: A row each; the same row again changes nothing.
            stopped: Whether their rollouts are over: machines that still wait were not touched.

        Raises:
            StoreError: The database may not be written.
        """
        with self._writing() as connection:
            rollouts.record_rollouts(connection, machines, stopped=stopped)

    def close(self) -> None:
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
            # The first line: the others repeat the statement.
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

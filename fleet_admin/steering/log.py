"""Steering log: labels, wanted and reported settings, commands and the audit log, in the session log's database."""

import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Self

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from fleet_admin.steering.errors import SteeringError
from fleet_admin.steering.selection import KnownDevice
from fleet_admin.steering.views import Actor
from fleet_common.validation import read_time
from fleet_edge.store import queries
from fleet_edge.store.database import open_existing
from fleet_edge.store.errors import StoreUnavailable
from fleet_edge.store.event_codes import EventKind, severity_of
from fleet_edge.store.merge.merge import Merge
from fleet_edge.store.models import SegmentRow
from fleet_edge.store.records.events import EventLogged
from fleet_edge.store.records.fences import ADMINISTRATOR
from fleet_edge.store.records.segments import segment_number
from fleet_edge.store.steering import labels, settings
from fleet_edge.store.steering.audit import AuditEntry, end_audit, read_audit, record_audit
from fleet_edge.store.steering.commands import CommandEnd, end_commands, keep_commands, read_commands
from fleet_edge.store.steering.views import AuditView, CommandView, ReportedView, WantedView
from schemas.control import CommandRequest, DesiredSettings, Presence, ReportedSettings
from schemas.errors import InvalidName
from schemas.names import check_name

ASKED: Final = "asked"
"""Outcome in the audit log of what devices have not answered yet."""

_EDGE_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringEvent:
    """What an administrator's wish or command has led to at a device, as `fleet_edge.store.event_codes` has it."""

    device: str
    kind: EventKind
    code: str
    sentence: str
    who: str


class SteeringLog:
    """The part of the database that administrators write. May be used by several threads.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER[:PASSWORD]@HOST/NAME`; an edge has created it.
        now: The wall clock (aware).

    Raises:
        StoreUnavailable: The database does not exist or cannot be opened.
        StoreError: The URL is wrong, the driver is missing, or the tables are of another version.
    """

    def __init__(self, url: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._url = url
        self._now = now
        self._reader: Engine = open_existing(url, read_only=True)
        self._writer: Engine | None = None
        self._opening = threading.Lock()

    # Labels

    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the labels of each device that has any."""
        with self._reading() as connection:
            return labels.read_labels(connection)

    def label(
        self, devices: Sequence[str], *, add: Collection[str] = (), remove: Collection[str] = (), actor: Actor
    ) -> dict[str, tuple[str, ...]]:
        """Give devices labels, and take others off; return what they have then. They need not have been seen yet.

        Raises:
            SteeringError: A device or a label cannot be called so, or nothing is asked for.
        """
        for word in (*devices, *add, *remove):
            _checked(word)
        if not devices or not (add or remove):
            raise SteeringError("Nothing is to be labelled: name a device, and a label to add or to remove.")
        now = self._now()
        with self._writing() as connection:
            before = labels.read_labels(connection, devices=devices)
            labels.remove_labels(connection, dict.fromkeys(devices, remove))
            labels.add_labels(connection, dict.fromkeys(devices, add), who=actor.who, now=now)
            after = labels.read_labels(connection, devices=devices)
            entries = [
                AuditEntry(
                    who=actor.who,
                    action="label",
                    subject=device,
                    before=" ".join(before.get(device, ())),
                    after=" ".join(after.get(device, ())),
                    source=actor.source,
                )
                for device in devices
                if before.get(device, ()) != after.get(device, ())
            ]
            record_audit(connection, entries, now=now)
        return {device: after.get(device, ()) for device in devices}

    def retire(self, device: str, *, undo: bool = False, actor: Actor) -> None:
        """Take a device out of service, or put it back: it is no longer chosen but by name, nor said to be silent.

        Raises:
            SteeringError: The log does not know it.
        """
        now = self._now()
        with self._writing() as connection:
            before = labels.retired(connection).get(_checked(device))
            if not labels.retire(connection, device, None if undo else before or now):
                raise SteeringError(f"No device {device} has been seen, so that none can be retired; check the name.")
            if not undo:
                settings.forget_settings(connection, [device])
            entry = AuditEntry(
                who=actor.who,
                action="restore" if undo else "retire",
                subject=device,
                before="in service" if before is None else "retired",
                after="in service" if undo else "retired",
                source=actor.source,
            )
            record_audit(connection, [entry], now=now)

    def known(self, *, edges: bool = False) -> dict[str, KnownDevice]:
        """Return the devices that the log has seen, by name, with what they are chosen by.

        Args:
            edges: Whether also with the edges that have served them within a day, which takes longer to find.
        """
        now = self._now()
        recent = (
            select(SegmentRow.device, SegmentRow.edge)
            .where(SegmentRow.segment >= segment_number(now - _EDGE_DAY), SegmentRow.edge.is_not(None))
            .distinct()
        )
        with self._reading() as connection:
            labelled = labels.read_labels(connection)
            served: dict[str, tuple[str, ...]] = {}
            for row in connection.execute(recent) if edges else ():
                served[row.device] = (*served.get(row.device, ()), row.edge)
            found = {
                view.device: KnownDevice(
                    device=view.device,
                    presence=_presence(view.presence),
                    software=view.software,
                    draft_model=view.draft_model,
                    state=view.state,
                    retired_at=view.retired_at,
                    labels=view.labels,
                    edges=served.get(view.device, ()),
                )
                for view in queries.devices(connection, now=now, counted=False)
            }
            steered = settings.known_devices(connection)
        for device in (labelled.keys() | steered) - found.keys():
            found[device] = KnownDevice(device=device, labels=labelled.get(device, ()))
        return found

    # Settings

    def wanted(self) -> dict[str, WantedView]:
        """Return the settings that devices are wanted to have."""
        with self._reading() as connection:
            return settings.read_wanted(connection)

    def reported(self) -> dict[str, ReportedView]:
        """Return what devices have last said of their settings, as far as an administrator has heard it."""
        with self._reading() as connection:
            return settings.read_reported(connection)

    def keep_wanted(self, wanted: Mapping[str, DesiredSettings], entries: Sequence[AuditEntry]) -> list[str]:
        """Keep settings that are about to be wanted, and who has asked for them; return the ids of the entries."""
        now = self._now()
        with self._writing() as connection:
            settings.keep_wanted(connection, wanted, now=now)
            return record_audit(connection, entries, now=now)

    def keep_reported(self, reported: Mapping[str, ReportedSettings]) -> None:
        """Keep what devices have said of their settings."""
        if reported:
            with self._writing() as connection:
                settings.keep_reported(connection, reported, now=self._now())

    # Commands

    def commands(
        self,
        *,
        since: str | datetime | None = None,
        devices: Sequence[str] = (),
        batch: str | None = None,
        limit: int = 100,
    ) -> list[CommandView]:
        """Return commands, the latest first; what is left out admits all."""
        after = self._time(since)
        with self._reading() as connection:
            return read_commands(connection, since=after, devices=devices, batch=batch, limit=limit)

    def keep_commands(
        self, requests: Mapping[str, CommandRequest], entries: Sequence[AuditEntry], *, batch: str
    ) -> list[str]:
        """Keep commands that are about to be sent, and who gives them; return the ids of the entries."""
        now = self._now()
        with self._writing() as connection:
            keep_commands(connection, requests, batch=batch, now=now)
            return record_audit(connection, entries, now=now)

    def end_commands(self, ended: Mapping[str, CommandEnd]) -> None:
        """Keep what came of commands, by their ids."""
        if ended:
            with self._writing() as connection:
                end_commands(connection, ended, now=self._now())

    # Audit

    def audit(
        self,
        *,
        since: str | datetime | None = None,
        until: str | datetime | None = None,
        who: str | None = None,
        subject: str | None = None,
        action: str | None = None,
        limit: int = 100,
    ) -> list[AuditView]:
        """Return actions of administrators, the latest first; what is left out admits all.

        Raises:
            SteeringError: A time is none.
        """
        after, before = self._time(since), self._time(until)
        with self._reading() as connection:
            return read_audit(
                connection, since=after, until=before, who=who, subject=subject, action=action, limit=limit
            )

    def record(self, entries: Sequence[AuditEntry]) -> list[str]:
        """Write entries of the audit log; return their ids."""
        with self._writing() as connection:
            return record_audit(connection, entries, now=self._now())

    def end_audit(self, outcomes: Mapping[str, str]) -> None:
        """Complete entries, by their ids, with what has come of them."""
        if outcomes:
            with self._writing() as connection:
                end_audit(connection, outcomes)

    def note(self, events: Sequence[SteeringEvent]) -> None:
        now = self._now()
        records = [
            EventLogged(
                id=uuid.uuid4().hex,
                edge=ADMINISTRATOR,
                device=each.device,
                session=None,
                kind=each.kind.value,
                code=each.code,
                sentence=each.sentence,
                at=now,
                who=each.who,
                severity=severity_of(each.kind, each.code),
            )
            for each in events
        ]
        if records:
            with self._writing() as connection:
                Merge(connection.dialect.name).apply(connection, records)

    def close(self) -> None:
        self._reader.dispose()
        if self._writer is not None:
            self._writer.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _time(self, value: str | datetime | None) -> datetime | None:
        try:
            return None if value is None else read_time(value, now=self._now())
        except ValueError as error:
            raise SteeringError(str(error)) from None

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._reader.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"The database could not be read: {str(error).partition(chr(10))[0]}") from error

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._opening:
            if self._writer is None:
                self._writer = open_existing(self._url, read_only=False)
        try:
            with self._writer.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"The database could not be written: {str(error).partition(chr(10))[0]}") from error


def _checked(word: str) -> str:
    try:
        return check_name(word)
    except InvalidName as error:
        raise SteeringError(str(error)) from None


def _presence(value: str | None) -> Presence | None:
    try:
        return None if value is None else Presence(value)
    except ValueError:
        return Presence.DRAINING

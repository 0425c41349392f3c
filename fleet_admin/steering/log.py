"""Steering log: labels, retired devices, commands and the audit log, in the session log's database."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import ColumnElement, Connection, Engine, delete, insert, select, update

from fleet_admin.steering.planning import Actor, KnownDevice, SteeringError
from fleet_common.closing import Closing
from fleet_common.validation import read_time
from fleet_edge.session_log import (
    AUDIT,
    COMMANDS,
    DEVICES,
    LABELS,
    AuditEntry,
    AuditView,
    CommandView,
    EventKind,
    Filter,
    add_labels,
    audit_text,
    conditions,
    event_record,
    merge_records,
    open_existing,
    read_devices,
    read_labels,
    record_audit,
    retire,
    transaction,
)
from schemas.control import CommandRequest, Presence
from schemas.errors import InvalidName
from schemas.names import check_name

ASKED: Final = "asked"
"""Outcome in the audit log while devices have not answered."""


class SteeringLog(Closing):
    """Part of the database that administrators write, created by an edge. Thread-safe.

    Raises `StoreUnavailable` if the database cannot be opened, `StoreError` if URL, driver or tables are wrong.
    """

    def __init__(self, url: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._url = url
        self._now = now
        self._reader: Engine = open_existing(url, read_only=True)
        self._writer: Engine | None = None
        self._opening = threading.Lock()

    def labels(self) -> dict[str, tuple[str, ...]]:
        with self._reading() as connection:
            return read_labels(connection)

    def label(
        self, devices: Sequence[str], *, add: Collection[str] = (), remove: Collection[str] = (), actor: Actor
    ) -> dict[str, tuple[str, ...]]:
        """Add and remove labels; return the devices' labels. Devices need not have been seen yet."""
        for word in (*devices, *add, *remove):
            _checked(word)
        if not devices or not (add or remove):
            raise SteeringError("Nothing is to be labelled: name a device, and a label to add or to remove.")
        now = self._now()
        with self._writing() as connection:
            before = read_labels(connection, devices=devices)
            connection.execute(delete(LABELS).where(LABELS.c.device.in_(devices), LABELS.c.label.in_(remove)))
            add_labels(connection, dict.fromkeys(devices, add), who=actor.who, now=now)
            after = read_labels(connection, devices=devices)
            entries = [
                actor.entry("label", device, before=" ".join(old), after=" ".join(new))
                for device in devices
                if (old := before.get(device, ())) != (new := after.get(device, ()))
            ]
            record_audit(connection, entries, now=now)
        return {device: after.get(device, ()) for device in devices}

    def retire(self, device: str, *, undo: bool = False, actor: Actor) -> None:
        """Retire a device that the log knows, or undo that: it is selected only by name."""
        now = self._now()
        with self._writing() as connection:
            before = connection.scalar(select(DEVICES.c.retired_at).where(DEVICES.c.device == _checked(device)))
            if not retire(connection, device, None if undo else before or now):
                raise SteeringError(f"No device {device} has been seen, so that none can be retired; check the name.")
            entry = actor.entry(
                "restore" if undo else "retire",
                device,
                before="in service" if before is None else "retired",
                after="in service" if undo else "retired",
            )
            record_audit(connection, [entry], now=now)

    def known(self) -> dict[str, KnownDevice]:
        """Return the devices in the log by name."""
        with self._reading() as connection:
            labelled = read_labels(connection)
            found = {
                view.device: KnownDevice(
                    device=view.device,
                    presence=_presence(view.presence),
                    software=view.software,
                    draft_model=view.draft_model,
                    retired_at=view.retired_at,
                    labels=view.labels,
                )
                for view in read_devices(connection, now=self._now(), counted=False)
            }
        for device in labelled.keys() - found.keys():
            found[device] = KnownDevice(device=device, labels=labelled.get(device, ()))
        return found

    def commands(
        self,
        *,
        since: str | datetime | None = None,
        until: str | datetime | None = None,
        where: Sequence[Filter] = (),
        limit: int = 100,
        skip: int = 0,
    ) -> list[CommandView]:
        """Return commands, the latest first; `where` filters by `filters.COMMAND_FIELDS`."""
        query = select(COMMANDS).where(*conditions(COMMANDS, where), *self._within(COMMANDS.c.at, since, until))
        query = query.order_by(COMMANDS.c.at.desc(), COMMANDS.c.device, COMMANDS.c.id).limit(limit).offset(skip)
        with self._reading() as connection:
            return [CommandView(**row) for row in connection.execute(query).mappings()]

    def keep_commands(
        self, requests: Mapping[str, CommandRequest], entries: Sequence[AuditEntry], *, batch: str
    ) -> list[str]:
        """Store commands before they are sent, with audit entries; return the entries' ids."""
        now = self._now()
        rows = [
            {
                "id": each.id,
                "batch": batch,
                "device": device,
                "command": each.command,
                "who": each.who,
                "at": now,
                "deadline_at": each.deadline,
            }
            for device, each in requests.items()
        ]
        with self._writing() as connection:
            if rows:
                connection.execute(insert(COMMANDS), rows)
            return record_audit(connection, entries, now=now)

    def end_commands(self, ended: Mapping[str, tuple[str, str]]) -> None:
        """Store outcome and sentence of commands, by their ids."""
        if ended:
            with self._writing() as connection:
                for command, (outcome, sentence) in ended.items():
                    values = {"outcome": outcome, "sentence": sentence, "ended_at": self._now()}
                    connection.execute(update(COMMANDS).where(COMMANDS.c.id == command).values(values))

    def end_access(self, command: CommandView, outcome: str, sentence: str) -> None:
        """Store the outcome of a request for access, unless it has one, and complete its audit entry."""
        mine = (AUDIT.c.action == command.command, AUDIT.c.subject == command.device, AUDIT.c.at == command.at)
        values = {"outcome": outcome, "sentence": sentence, "ended_at": self._now()}
        with self._writing() as connection:
            connection.execute(
                update(COMMANDS).where(COMMANDS.c.id == command.id, COMMANDS.c.outcome.is_(None)).values(values)
            )
            asked = update(AUDIT).where(*mine, AUDIT.c.outcome == ASKED)
            connection.execute(asked.values(outcome=audit_text(f"{outcome}: {sentence}")))

    def audit(
        self,
        *,
        since: str | datetime | None = None,
        until: str | datetime | None = None,
        where: Sequence[Filter] = (),
        limit: int = 100,
        skip: int = 0,
    ) -> list[AuditView]:
        """Return actions of administrators, the latest first; `where` filters by `filters.AUDIT_FIELDS`.

        Raises `SteeringError` for an invalid time.
        """
        query = select(*(AUDIT.c[field.name] for field in fields(AuditView)))
        query = query.where(*conditions(AUDIT, where), *self._within(AUDIT.c.at, since, until))
        query = query.order_by(AUDIT.c.at.desc(), AUDIT.c.id).limit(limit).offset(skip)
        with self._reading() as connection:
            return [AuditView(**row) for row in connection.execute(query).mappings()]

    def record(self, entries: Sequence[AuditEntry]) -> list[str]:
        """Write audit entries; return their ids."""
        with self._writing() as connection:
            return record_audit(connection, entries, now=self._now())

    def end_audit(self, outcomes: Mapping[str, str]) -> None:
        """Complete audit entries, by their ids, with their outcomes."""
        if outcomes:
            with self._writing() as connection:
                for entry, outcome in outcomes.items():
                    values = {"outcome": audit_text(outcome)}
                    connection.execute(update(AUDIT).where(AUDIT.c.id == entry).values(values))

    def note(self, kind: EventKind, events: Sequence[tuple[str, str, str]], *, actor: Actor) -> None:
        """Record what came of an administrator's settings or commands: device, code of `event_codes`, sentence."""
        now = self._now()
        records = [
            event_record(now, kind=kind.value, code=code, sentence=sentence, device=device, who=actor.who)
            for device, code, sentence in events
        ]
        if records:
            with self._writing() as connection:
                merge_records(connection, records)

    def close(self) -> None:
        self._reader.dispose()
        if self._writer is not None:
            self._writer.dispose()

    def _within(
        self, column: ColumnElement[datetime], since: str | datetime | None, until: str | datetime | None
    ) -> list[ColumnElement[bool]]:
        try:
            after, before = (each if each is None else read_time(each, now=self._now()) for each in (since, until))
        except ValueError as error:
            raise SteeringError(str(error)) from None
        return [
            *([] if after is None else [column >= after]),
            *([] if before is None else [column < before]),
        ]

    def _reading(self) -> AbstractContextManager[Connection]:
        return transaction(self._reader, write=False)

    def _writing(self) -> AbstractContextManager[Connection]:
        with self._opening:
            if self._writer is None:
                self._writer = open_existing(self._url, read_only=False)
        return transaction(self._writer)


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

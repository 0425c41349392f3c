"""Audit log: every action that changes something, written in the transaction that changes it where there is one."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, insert, select, update

from fleet_edge.store.models import AuditRow
from fleet_edge.store.steering.views import AuditView
from schemas.printable import printable_line

DONE: Final = "done"
"""Outcome of an action that was carried out; any other is a sentence or a word that says what came of it."""

_LONGEST: Final = 2000  # characters of each text: an entry is a line, not an archive


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One action.

    Attributes:
        who: The user of the operating system, or the account of the dashboard.
        action: What: `fence`, `set`, `command self-test`.
        subject: Whom: a device, a label, a table.
        before: What was, where something was.
        after: What is now.
        outcome: What came of it.
        source: From where: the command line's machine, or the address of the dashboard's reader.
    """

    who: str
    action: str
    subject: str
    before: str | None = None
    after: str | None = None
    outcome: str = DONE
    source: str = ""


def record_audit(connection: Connection, entries: Sequence[AuditEntry], *, now: datetime) -> list[str]:
    """Write entries, in the transaction that `connection` is in; return their ids."""
    rows = [
        {
            "id": uuid.uuid4().hex,
            "at": now,
            "who": _line(each.who),
            "action": _line(each.action),
            "subject": _line(each.subject),
            "before": None if each.before is None else _line(each.before),
            "after": None if each.after is None else _line(each.after),
            "outcome": _line(each.outcome),
            "source": _line(each.source),
        }
        for each in entries
    ]
    if rows:
        connection.execute(insert(AuditRow), rows)
    return [str(row["id"]) for row in rows]


def end_audit(connection: Connection, outcomes: Mapping[str, str]) -> None:
    """Complete entries, by their ids, with what has come of them."""
    for entry, outcome in outcomes.items():
        connection.execute(update(AuditRow).where(AuditRow.id == entry).values(outcome=_line(outcome)))


def read_audit(
    connection: Connection,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    who: str | None = None,
    subject: str | None = None,
    action: str | None = None,
    limit: int = 100,
) -> list[AuditView]:
    """Return actions, the latest first; what is left out admits all."""
    query = select(
        AuditRow.at,
        AuditRow.who,
        AuditRow.action,
        AuditRow.subject,
        AuditRow.before,
        AuditRow.after,
        AuditRow.outcome,
        AuditRow.source,
    )
    if since is not None:
        query = query.where(AuditRow.at >= since)
    if until is not None:
        query = query.where(AuditRow.at < until)
    if who is not None:
        query = query.where(AuditRow.who == who)
    if subject is not None:
        query = query.where(AuditRow.subject == subject)
    if action is not None:
        query = query.where(AuditRow.action == action)
    rows = connection.execute(query.order_by(AuditRow.at.desc(), AuditRow.id).limit(limit)).mappings()
    return [AuditView(**row) for row in rows]


def _line(text: str) -> str:
    shown = printable_line(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"

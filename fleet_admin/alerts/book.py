"""Book of alerts: the table, and the lease of whoever evaluates the rules. All within the caller's transaction."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from fleet_admin.alerts.errors import NoSuchAlert
from fleet_admin.alerts.views import AlertSeverity, AlertView
from fleet_edge.store.event_codes import EventKind, Severity, severity_of
from fleet_edge.store.merge.merge import merge_for
from fleet_edge.store.models import AlertLeaseRow, AlertRow
from fleet_edge.store.records.events import EventLogged
from fleet_edge.store.records.fences import ADMINISTRATOR

_EVALUATOR: Final = "evaluator"
MOST_OPEN: Final = 10_000
"""Open alerts; a fleet with more has one trouble, not ten thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """That something is wrong, as it is now.

    Attributes:
        rule: Which rule says so.
        subject: Of whom.
        severity: How soon somebody has to look.
        sentence: What is wrong, and what to do.
        value: What was measured, if it is a number.
        threshold: What it is held against.
        device: The subject, if it is a device.
    """

    rule: str
    subject: str
    severity: str
    sentence: str
    value: float | None = None
    threshold: float | None = None
    device: str | None = None


def alerts(
    connection: Connection,
    *,
    open: bool | None = None,  # noqa: A002 - as the table says it
    rule: str | None = None,
    subject: str | None = None,
    since: datetime | None = None,
    limit: int = 100,
) -> list[AlertView]:
    """Return alerts: the open ones first, of these the critical ones, then the latest.

    Args:
        connection: Of a database with this version's tables.
        open: Only those that are open, or only those that are over.
        rule: Of this rule.
        subject: Of this subject.
        since: Begun at or after.
        limit: At most so many.
    """
    query = select(AlertRow.__table__)
    if open is not None:
        query = query.where(AlertRow.cleared_at.is_(None) if open else AlertRow.cleared_at.is_not(None))
    if rule is not None:
        query = query.where(AlertRow.rule == rule)
    if subject is not None:
        query = query.where(AlertRow.subject == subject)
    if since is not None:
        query = query.where(AlertRow.since_at >= since)
    is_over = AlertRow.cleared_at.is_not(None)
    can_wait = or_(is_over, AlertRow.severity != AlertSeverity.CRITICAL)
    ordered = query.order_by(is_over, can_wait, AlertRow.since_at.desc(), AlertRow.id).limit(limit)
    return [_view(row) for row in connection.execute(ordered)]


def find(connection: Connection, prefix: str) -> AlertView:
    """Return an alert by its id, or enough of its beginning.

    Raises:
        NoSuchAlert: There is none, or there are several.
    """
    escaped = prefix.lower()
    if not escaped or not set(escaped) <= set("0123456789abcdef"):
        raise NoSuchAlert(f"{prefix[:40]!r} is no alert's id; `fleet admin alerts` lists them.")
    found = connection.execute(select(AlertRow.__table__).where(AlertRow.id.startswith(escaped)).limit(2)).all()
    if not found:
        raise NoSuchAlert(f"There is no alert {prefix[:40]!r}; `fleet admin alerts --all` lists them.")
    if len(found) > 1:
        raise NoSuchAlert(f"Several alerts begin with {prefix[:40]!r}; give more of the id.")
    return _view(found[0])


def acknowledge(connection: Connection, alert: AlertView, *, who: str, now: datetime) -> AlertView:
    """Note that somebody takes care of an alert; the first one counts."""
    changed = connection.execute(
        update(AlertRow)
        .where(AlertRow.id == alert.id, AlertRow.acknowledged_at.is_(None))
        .values(acknowledged_at=now, acknowledged_by=who)
    )
    if changed.rowcount:
        _log(
            connection, alert, code="acknowledged", sentence=f"{who} takes care of: {alert.sentence}", now=now, who=who
        )
    return find(connection, alert.id)


def clear(connection: Connection, alert: AlertView, *, now: datetime, who: str | None = None) -> AlertView:
    """End an alert.

    Args:
        connection: Of the database.
        alert: Which.
        now: The time (aware).
        who: Who does so; None if it is over by itself.
    """
    changed = connection.execute(
        update(AlertRow)
        .where(AlertRow.id == alert.id, AlertRow.cleared_at.is_(None))
        .values(cleared_at=now, cleared_by=who)
    )
    if changed.rowcount:
        how = "It is over" if who is None else f"{who} has cleared it"
        _log(connection, alert, code="cleared", sentence=f"{how}: {alert.sentence}", now=now, who=who)
    return find(connection, alert.id)


def see(
    connection: Connection,
    sighting: Sighting,
    *,
    since: datetime,
    now: datetime,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
) -> AlertView | None:
    """Open an alert, or note that the open one still holds.

    Args:
        connection: Of the database.
        sighting: What is wrong.
        since: Since when it is so (aware).
        now: The time (aware).
        new_id: Makes the id of an alert.

    Returns:
        The alert if it is new, or has become graver; else None, also if so many are open that there is no room.
    """
    last = {
        "last_at": now,
        "sentence": sighting.sentence,
        "severity": sighting.severity,
        "value": sighting.value,
        "threshold": sighting.threshold,
    }
    held = (AlertRow.rule == sighting.rule, AlertRow.subject == sighting.subject, AlertRow.cleared_at.is_(None))
    before = connection.execute(select(AlertRow.id, AlertRow.severity).where(*held)).first()
    if before is not None:
        connection.execute(update(AlertRow).where(AlertRow.id == before.id).values(**last))
        graver = sighting.severity == AlertSeverity.CRITICAL and before.severity != AlertSeverity.CRITICAL
        return find(connection, before.id) if graver else None
    crowd = select(AlertRow.id).where(AlertRow.cleared_at.is_(None)).limit(1).offset(MOST_OPEN - 1)
    if connection.execute(crowd).first() is not None:
        return None
    row = {
        "id": new_id(),
        "rule": sighting.rule,
        "subject": sighting.subject,
        "device": sighting.device,
        "since_at": since,
        **last,
    }
    connection.execute(insert(AlertRow).values(**row))
    alert = find(connection, str(row["id"]))
    _log(connection, alert, code="opened", sentence=alert.sentence, now=now)
    return alert


def take_lease(connection: Connection, *, holder: str, now: datetime, for_s: float) -> bool:
    """Become, or stay, the one who evaluates the rules; return whether that is so.

    Args:
        connection: In a transaction of its own.
        holder: Who asks.
        now: The time (aware).
        for_s: Seconds for which nobody else becomes it.
    """
    until = now + timedelta(seconds=for_s)
    # A holder whose clock runs ahead must not keep the lease for hours after it has gone.
    over = or_(
        AlertLeaseRow.holder == holder, AlertLeaseRow.until_at < now, AlertLeaseRow.until_at > now + timedelta(hours=1)
    )
    mine = update(AlertLeaseRow).where(AlertLeaseRow.name == _EVALUATOR, over).values(holder=holder, until_at=until)
    if connection.execute(mine).rowcount:
        return True
    known = connection.execute(select(AlertLeaseRow.holder).where(AlertLeaseRow.name == _EVALUATOR)).first()
    if known is not None:
        return False
    try:
        with connection.begin_nested():
            connection.execute(insert(AlertLeaseRow).values(name=_EVALUATOR, holder=holder, until_at=until))
    except IntegrityError:
        return False  # another was faster
    return True


def forget(connection: Connection, *, before: datetime) -> int:
    """Delete alerts that were over before a time; return how many."""
    return connection.execute(delete(AlertRow).where(AlertRow.cleared_at < before)).rowcount


def _view(row: Row[Any]) -> AlertView:
    return AlertView(**row._mapping)  # noqa: SLF001 - the public name of a row's fields


def _log(
    connection: Connection, alert: AlertView, *, code: str, sentence: str, now: datetime, who: str | None = None
) -> None:
    event = EventLogged(
        id=uuid.uuid4().hex,
        edge=ADMINISTRATOR,
        device=alert.device,
        session=None,
        kind=EventKind.ALERT.value,
        code=code,
        sentence=sentence,
        at=now,
        who=who,
        severity=Severity.ERROR
        if alert.severity == AlertSeverity.CRITICAL and code == "opened"
        else severity_of(EventKind.ALERT, code),
    )
    merge_for(connection.dialect.name).apply(connection, [event])

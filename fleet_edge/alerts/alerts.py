"""Alerts of a fleet: the table, the lease of the evaluator, and what the command line and the dashboard use.

::

    with Alerts("sqlite:///fleet.sqlite3") as alerts:
        for alert in alerts.open():
            print(alert.severity, alert.subject, alert.sentence)
"""

import threading
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Final, TypedDict, Unpack

from sqlalchemy import Connection, Engine, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from fleet_common.closing import Closing
from fleet_edge.store.database import open_existing, transaction
from fleet_edge.store.event_codes import EventKind, Severity
from fleet_edge.store.merge import merge_records
from fleet_edge.store.records import EventLogged
from fleet_edge.store.steering import record_audit
from fleet_edge.store.tables import ALERT_LEASES, ALERTS
from fleet_edge.store.views import AlertView, AuditEntry
from schemas.control import Alert, AlertState
from schemas.errors import FleetError


class AlertError(FleetError):
    """Base of all errors of alerts."""


class NoSuchAlert(AlertError):  # noqa: N818 - reads as what it says
    """There is no alert of that id, or several begin with it."""


class DeliveryFailed(AlertError):  # noqa: N818 - likewise
    """An alert could not be delivered; another attempt may succeed."""


class AlertSeverity(StrEnum):
    WARNING = "warning"
    CRITICAL = "critical"


def notice_of(alert: AlertView, *, fleet: str, at: datetime) -> Alert:
    """Return the message about an alert that was opened or cleared at `at`; `fleet` is empty if unknown."""
    return Alert(
        id=alert.id,
        fleet=fleet or None,
        rule=alert.rule,
        subject=alert.subject,
        device=alert.device,
        severity=alert.severity,
        state=AlertState.OPEN if alert.open else AlertState.CLEARED,
        sentence=alert.sentence,
        value=alert.value,
        threshold=alert.threshold,
        since=alert.since_at,
        at=at,
    )


_EVALUATOR: Final = "evaluator"
MOST_OPEN: Final = 10_000
"""Open alerts; a fleet with more has one common problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleReading:
    """What a rule finds about one subject. If neither `wrong` nor `right`, the alert stays as it is.

    `value` was measured, `threshold` is its limit, `device` the subject if it is a device.
    """

    subject: str
    sentence: str
    wrong: bool = True
    right: bool = False
    severity: AlertSeverity = AlertSeverity.WARNING
    value: float | None = None
    threshold: float | None = None
    device: str | None = None


class AlertFilter(TypedDict, total=False):
    """Conditions on alerts; what is left out or None admits all."""

    open: bool | None
    rule: str | None
    subject: str | None
    limit: int


def list_alerts(connection: Connection, **chosen: Unpack[AlertFilter]) -> list[AlertView]:
    """Return alerts: open ones first, critical ones before others, then the latest; 100 unless `limit` is given."""
    query = select(ALERTS)
    if (is_open := chosen.get("open")) is not None:
        query = query.where(ALERTS.c.cleared_at.is_(None) if is_open else ALERTS.c.cleared_at.is_not(None))
    if (rule := chosen.get("rule")) is not None:
        query = query.where(ALERTS.c.rule == rule)
    if (subject := chosen.get("subject")) is not None:
        query = query.where(ALERTS.c.subject == subject)
    is_over = ALERTS.c.cleared_at.is_not(None)
    can_wait = or_(is_over, ALERTS.c.severity != AlertSeverity.CRITICAL)
    ordered = query.order_by(is_over, can_wait, ALERTS.c.since_at.desc(), ALERTS.c.id).limit(chosen.get("limit", 100))
    return [AlertView(**row) for row in connection.execute(ordered).mappings()]


def find(connection: Connection, prefix: str) -> AlertView:
    """Return an alert by a unique prefix of its id; otherwise raises `NoSuchAlert`."""
    escaped = prefix.lower()
    if not escaped or not set(escaped) <= set("0123456789abcdef"):
        raise NoSuchAlert(f"{prefix[:40]!r} is no alert's id; `fleet admin alerts` lists them.")
    query = select(ALERTS).where(ALERTS.c.id.startswith(escaped)).limit(2)
    found = connection.execute(query).mappings().all()
    if not found:
        raise NoSuchAlert(f"There is no alert {prefix[:40]!r}; `fleet admin alerts --all` lists them.")
    if len(found) > 1:
        raise NoSuchAlert(f"Several alerts begin with {prefix[:40]!r}; give more of the id.")
    return AlertView(**found[0])


def acknowledge(connection: Connection, alert: AlertView, *, who: str, now: datetime) -> AlertView:
    """Record who has acknowledged an alert; the first one counts."""
    changed = connection.execute(
        update(ALERTS)
        .where(ALERTS.c.id == alert.id, ALERTS.c.acknowledged_at.is_(None))
        .values(acknowledged_at=now, acknowledged_by=who)
    )
    if changed.rowcount:
        _log(
            connection,
            alert,
            code="acknowledged",
            sentence=f"{who} has acknowledged: {alert.sentence}",
            now=now,
            who=who,
        )
    return find(connection, alert.id)


def clear(connection: Connection, alert: AlertView, *, now: datetime, who: str | None = None) -> AlertView:
    """End an alert; `who` None: its rule no longer matches."""
    changed = connection.execute(
        update(ALERTS)
        .where(ALERTS.c.id == alert.id, ALERTS.c.cleared_at.is_(None))
        .values(cleared_at=now, cleared_by=who)
    )
    if changed.rowcount:
        how = "It is over" if who is None else f"{who} has cleared it"
        _log(connection, alert, code="cleared", sentence=f"{how}: {alert.sentence}", now=now, who=who)
    return find(connection, alert.id)


def see(connection: Connection, rule: str, reading: RuleReading, *, since: datetime, now: datetime) -> AlertView | None:
    """Open an alert, or record that the open one still matches.

    Return the alert if it is new or has become critical, else None, also if `MOST_OPEN` alerts are open.
    """
    last = {
        "last_at": now,
        "sentence": reading.sentence,
        "severity": reading.severity,
        "value": reading.value,
        "threshold": reading.threshold,
    }
    held = (ALERTS.c.rule == rule, ALERTS.c.subject == reading.subject, ALERTS.c.cleared_at.is_(None))
    before = connection.execute(select(ALERTS.c.id, ALERTS.c.severity).where(*held)).first()
    if before is not None:
        connection.execute(update(ALERTS).where(ALERTS.c.id == before.id).values(**last))
        graver = reading.severity == AlertSeverity.CRITICAL and before.severity != AlertSeverity.CRITICAL
        return find(connection, before.id) if graver else None
    crowd = select(ALERTS.c.id).where(ALERTS.c.cleared_at.is_(None)).limit(1).offset(MOST_OPEN - 1)
    if connection.execute(crowd).first() is not None:
        return None
    key = {"id": uuid.uuid4().hex, "rule": rule, "subject": reading.subject, "device": reading.device}
    connection.execute(insert(ALERTS).values(**key, since_at=since, **last))
    alert = find(connection, str(key["id"]))
    _log(connection, alert, code="opened", sentence=alert.sentence, now=now)
    return alert


def take_lease(connection: Connection, *, holder: str, now: datetime, for_s: float) -> bool:
    """Take or renew the lease of the evaluator for `for_s`; return whether it is held. Needs its own transaction."""
    until = now + timedelta(seconds=for_s)
    # A holder whose clock is ahead must not keep the lease for hours after its end.
    over = or_(
        ALERT_LEASES.c.holder == holder,
        ALERT_LEASES.c.until_at < now,
        ALERT_LEASES.c.until_at > now + timedelta(hours=1),
    )
    mine = update(ALERT_LEASES).where(ALERT_LEASES.c.name == _EVALUATOR, over).values(holder=holder, until_at=until)
    if connection.execute(mine).rowcount:
        return True
    known = connection.execute(select(ALERT_LEASES.c.holder).where(ALERT_LEASES.c.name == _EVALUATOR)).first()
    if known is not None:
        return False
    try:
        with connection.begin_nested():
            connection.execute(insert(ALERT_LEASES).values(name=_EVALUATOR, holder=holder, until_at=until))
    except IntegrityError:
        return False  # another was faster
    return True


def forget(connection: Connection, *, before: datetime) -> int:
    return connection.execute(delete(ALERTS).where(ALERTS.c.cleared_at < before)).rowcount


def _log(
    connection: Connection, alert: AlertView, *, code: str, sentence: str, now: datetime, who: str | None = None
) -> None:
    grave = alert.severity == AlertSeverity.CRITICAL and code == "opened"
    event = EventLogged(
        kind=EventKind.ALERT.value,
        code=code,
        sentence=sentence,
        at=now,
        device=alert.device,
        who=who,
        severity=Severity.ERROR if grave else None,
    )
    merge_records(connection, [event])


class Alerts(Closing):
    """The alerts of a session log, as a context manager. Thread-safe.

    Raises `StoreError` if URL, driver or tables are wrong, and as its methods `StoreUnavailable` without the database.
    """

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        later: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._open = partial(open_existing, url, read_only=read_only)
        self._opening = threading.Lock()
        self._engine = None if later else self._open()
        self._now = now

    def open(self, *, limit: int = 1000) -> list[AlertView]:
        return self.list(open=True, limit=limit)

    def list(self, **chosen: Unpack[AlertFilter]) -> list[AlertView]:
        with self.connection() as connection:
            return list_alerts(connection, **chosen)

    def acknowledge(self, alert: str, *, who: str, source: str = "") -> AlertView:
        """Record who has acknowledged an alert, by a unique prefix of its id; the first one counts."""
        return self._act("acknowledge", acknowledge, alert, who=who, source=source)

    def clear(self, alert: str, *, who: str, source: str = "") -> AlertView:
        """End an alert, by a unique prefix of its id; a problem that remains opens a new one."""
        return self._act("clear", clear, alert, who=who, source=source)

    def _act(self, word: str, act: Callable[..., AlertView], alert: str, *, who: str, source: str) -> AlertView:
        with self.connection() as connection:
            found = act(connection, find(connection, alert), who=who, now=self._now())
            subject = f"{found.id[:8]} {found.subject}"
            entry = AuditEntry(who=who, action=f"alert {word}", subject=subject, after=found.sentence, source=source)
            record_audit(connection, [entry], now=self._now())
            return found

    def connection(self) -> AbstractContextManager[Connection]:
        return transaction(self._opened())

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()

    def _opened(self) -> Engine:
        with self._opening:
            if self._engine is None:
                self._engine = self._open()
            return self._engine

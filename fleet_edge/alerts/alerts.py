"""Alerts of a fleet: the table, the lease of the evaluator, and what the command line and the dashboard use.

::

    with Alerts("sqlite:///fleet.sqlite3") as alerts:
        for alert in alerts.open():
            print(alert.severity, alert.subject, alert.sentence)
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, and_, bindparam, delete, insert, or_, select, text, update
from sqlalchemy.exc import IntegrityError

from fleet_common.closing import Closing
from fleet_edge.store.database import open_existing, transaction
from fleet_edge.store.event_codes import EventKind, Severity
from fleet_edge.store.merge import merge_records
from fleet_edge.store.records import EventLogged
from fleet_edge.store.tables import ALERT_LEASES, ALERTS
from fleet_edge.store.views import AlertView
from schemas.control import Alert, AlertState
from schemas.errors import FleetError


class DeliveryFailed(FleetError):  # noqa: N818 - reads as what it says
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
_RECENT: Final = timedelta(minutes=1)
_ID_BYTES: Final = 4  # short enough to type
MAX_OPEN: Final = 10_000
"""Open alerts; a fleet with more has one common problem."""


class RuleReading(NamedTuple):
    """What a rule finds about one subject. If neither `wrong` nor `right`, the alert stays as it is.

    `value` was measured, `threshold` is its limit, `device` the subject if it is a device. `since` is the begin of the
    problem if the log has it; otherwise it is as long as it has been read.
    """

    subject: str
    sentence: str
    wrong: bool = True
    right: bool = False
    severity: AlertSeverity = AlertSeverity.WARNING
    value: float | None = None
    threshold: float | None = None
    device: str | None = None
    since: datetime | None = None


def open_alerts(connection: Connection) -> dict[tuple[str, str], Row[Any]]:
    """Return the open alerts by rule and subject, as far as an evaluation needs them."""
    names = ("rule", "subject", "id", "severity", "sentence", "threshold")
    query = select(*(ALERTS.c[name] for name in names)).where(ALERTS.c.cleared_at.is_(None))
    return {row[:2]: row for row in connection.execute(query).all()}


def read_again(connection: Connection, alerts: Sequence[AlertView | Row[Any]]) -> list[AlertView]:
    if not alerts:
        return []
    found = connection.execute(select(ALERTS).where(ALERTS.c.id.in_([each.id for each in alerts])))
    by_id = {row["id"]: AlertView(**row) for row in found.mappings()}
    return [by_id[each.id] for each in alerts]


def clear(
    connection: Connection, alerts: Sequence[AlertView], *, sentence: Callable[[AlertView], str], now: datetime
) -> list[AlertView]:
    """End alerts whose rules no longer match. `sentence` says so: that of the problem is no longer true."""
    if alerts:
        end = update(ALERTS).where(ALERTS.c.id == bindparam("alert"), ALERTS.c.cleared_at.is_(None))
        over = [{"alert": each.id, "over": sentence(each)} for each in alerts]
        connection.execute(end.values(cleared_at=now, sentence=bindparam("over")), over)
        _log(connection, alerts, "cleared", sentence, now=now)
    return read_again(connection, alerts)


Found = tuple[str, RuleReading, datetime]
"""Rule, its reading, and since when it has been wrong."""


def note_wrong(
    connection: Connection,
    found: Sequence[Found],
    *,
    held: Mapping[tuple[str, str], Row[Any]],
    quiet: Sequence[Row[Any]] = (),
    now: datetime,
) -> list[AlertView]:
    """Open alerts, at most `MAX_OPEN`, or change open ones; return the new and graver ones.

    `found` is new or says something new about an alert of `held`, the open ones. Thousands may only remain wrong: all
    of `held` but those of `quiet`.
    """
    changed, opened, graver = list[dict[str, Any]](), list[AlertView](), list[Row[Any]]()
    for rule, reading, since in found:
        before = held.get((rule, reading.subject))
        if before is None:
            if len(held) + len(opened) < MAX_OPEN:
                opened.append(_new_alert(rule, reading, since=since, now=now))
        else:
            changed.append({"alert": before.id} | {f"new_{name}": value for name, value in _columns(reading).items()})
            if reading.severity == AlertSeverity.CRITICAL and before.severity != AlertSeverity.CRITICAL:
                graver.append(before)
    if changed:
        refresh = update(ALERTS).where(ALERTS.c.id == bindparam("alert"))
        values: dict[str, Any] = {name.removeprefix("new_"): bindparam(name) for name in changed[0] if name != "alert"}
        connection.execute(refresh.values(values), changed)
    if len(quiet) < len(held):
        still_wrong = ALERTS.c.cleared_at.is_(None), ALERTS.c.id.not_in([each.id for each in quiet])
        connection.execute(update(ALERTS).where(*still_wrong).values(last_at=now))
    if opened:
        connection.execute(insert(ALERTS), [asdict(each) for each in opened])
        _log(connection, opened, "opened", lambda alert: alert.sentence, now=now)
    return opened + read_again(connection, graver)


def is_news(reading: RuleReading, alert: Row[Any]) -> bool:
    """A reading is news if its open alert does not say it."""
    return (reading.severity, reading.sentence, reading.threshold) != (alert.severity, alert.sentence, alert.threshold)


def _columns(reading: RuleReading) -> dict[str, Any]:
    """Return the columns that a reading writes if it says something new."""
    return {
        "severity": reading.severity.value,
        "sentence": reading.sentence,
        "value": reading.value,
        "threshold": reading.threshold,
    }


def _new_alert(rule: str, reading: RuleReading, *, since: datetime, now: datetime) -> AlertView:
    return AlertView(
        id=secrets.token_hex(_ID_BYTES),  # one that is in use fails the evaluation, and the next one draws others
        rule=rule,
        subject=reading.subject,
        device=reading.device,
        since_at=since,
        last_at=now,
        cleared_at=None,
        delivered=None,
        **_columns(reading),
    )


CLEARED: Final = "cleared"
_NOT_OVER: Final = text("(delivered IS NULL OR delivered <> 'cleared')")  # as the partial index has it


def undelivered(connection: Connection, *, limit: int) -> list[AlertView]:
    """Return alerts whose opening, end, or turn to critical was not delivered yet, the oldest first."""
    is_over = ALERTS.c.cleared_at.is_not(None)
    graver = and_(ALERTS.c.severity == AlertSeverity.CRITICAL, ALERTS.c.delivered == AlertSeverity.WARNING)
    query = select(ALERTS).where(_NOT_OVER, or_(ALERTS.c.delivered.is_(None), is_over, graver))
    ordered = query.order_by(ALERTS.c.since_at, ALERTS.c.id).limit(limit)
    return [AlertView(**row) for row in connection.execute(ordered).mappings()]


def note_delivered(connection: Connection, notices: Sequence[Alert]) -> None:
    """Record that all receivers have accepted messages about alerts."""
    if notices:
        note = update(ALERTS).where(ALERTS.c.id == bindparam("alert")).values(delivered=bindparam("as"))
        states = [(each.id, CLEARED if each.state is AlertState.CLEARED else each.severity) for each in notices]
        connection.execute(note, [{"alert": name, "as": state} for name, state in states])


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


def give_up_lease(connection: Connection, *, holder: str, now: datetime) -> None:
    """Let another process evaluate at once."""
    mine = update(ALERT_LEASES).where(ALERT_LEASES.c.name == _EVALUATOR, ALERT_LEASES.c.holder == holder)
    connection.execute(mine.where(ALERT_LEASES.c.until_at > now).values(until_at=now))


def note_evaluation(connection: Connection, *, now: datetime) -> None:
    connection.execute(update(ALERT_LEASES).where(ALERT_LEASES.c.name == _EVALUATOR).values(evaluated_at=now))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The latest evaluation of the rules: its time, the process that did it, and whether it is recent."""

    at: datetime | None
    holder: str | None
    recent: bool

    @property
    def sentence(self) -> str:
        """Return why open alerts say nothing about now; empty if they do."""
        if self.recent:
            return ""
        since = "Never evaluated" if self.at is None else f"Not evaluated since {self.at:%Y-%m-%d %H:%M:%S} UTC"
        return f"{since}: no edge and no dashboard evaluates the alerts of this database now."


def last_evaluation(connection: Connection, *, now: datetime) -> Evaluation:
    query = select(ALERT_LEASES.c.evaluated_at, ALERT_LEASES.c.holder).where(ALERT_LEASES.c.name == _EVALUATOR)
    row = connection.execute(query).first()
    if row is None or row.evaluated_at is None:
        return Evaluation(None, None, recent=False)
    return Evaluation(row.evaluated_at, row.holder, recent=now - row.evaluated_at <= _RECENT)


def forget(connection: Connection, *, before: datetime) -> int:
    return connection.execute(delete(ALERTS).where(ALERTS.c.cleared_at < before)).rowcount


def _log(
    connection: Connection,
    alerts: Sequence[AlertView],
    code: str,
    sentence: Callable[[AlertView], str],
    *,
    now: datetime,
) -> None:
    grave = AlertSeverity.CRITICAL if code == "opened" else None
    events = [
        EventLogged(
            kind=EventKind.ALERT.value,
            code=code,
            sentence=sentence(each),
            at=now,
            device=each.device,
            severity=Severity.ERROR if each.severity == grave else None,
        )
        for each in alerts
    ]
    if events:
        merge_records(connection, events)


class Alerts(Closing):
    """The alerts of a session log, as a context manager. Thread-safe.

    Raises `StoreError` if URL, driver or tables are wrong, and as its methods `StoreUnavailable` without the database.
    """

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._engine = open_existing(url, read_only=read_only)
        self._now = now

    def open(self, *, limit: int = 1000) -> list[AlertView]:
        return self.list(open=True, limit=limit)

    def list(self, *, open: bool | None = None, limit: int = 100) -> list[AlertView]:  # noqa: A002 - as a column
        """Return alerts: open ones first, critical ones before others, then the latest."""
        is_over = ALERTS.c.cleared_at.is_not(None)
        can_wait = or_(is_over, ALERTS.c.severity != AlertSeverity.CRITICAL)
        query = select(ALERTS).order_by(is_over, can_wait, ALERTS.c.since_at.desc(), ALERTS.c.id).limit(limit)
        if open is not None:
            query = query.where(ALERTS.c.cleared_at.is_(None) if open else is_over)
        with self.connection() as connection:
            return [AlertView(**row) for row in connection.execute(query).mappings()]

    def evaluation(self) -> Evaluation:
        with self.connection() as connection:
            return last_evaluation(connection, now=self._now())

    def connection(self) -> AbstractContextManager[Connection]:
        return transaction(self._engine)

    def close(self) -> None:
        self._engine.dispose()

"""Table of alerts: which problems began, ended, and were delivered; and the lease of the process that evaluates."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, bindparam, case, delete, insert, or_, select, text, update

from fleet_edge.session_log.alerts.rules import AlertProblem, Problems, sentence_when_over
from fleet_edge.session_log.engine import insert_into
from fleet_edge.session_log.event_codes import EventKind, Severity
from fleet_edge.session_log.records import event_record
from fleet_edge.session_log.tables import ALERT_LEASES, ALERTS
from fleet_edge.session_log.views import CLEARED, AlertSeverity, AlertView

_EVALUATOR: Final = "evaluator"
_RECENT: Final = timedelta(minutes=1)
_ID_BYTES: Final = 4  # short enough to type
MAX_OPEN: Final = 10_000
"""Open alerts; a fleet with more has one common problem."""

_IS_OPEN: Final = ALERTS.c.cleared_at.is_(None)
_STATE: Final = case((_IS_OPEN, ALERTS.c.severity), else_=CLEARED)
_NOT_OVER: Final = text("(delivered IS NULL OR delivered <> 'cleared')")  # as the partial index has it


_ORDER: Final = (
    ALERTS.c.cleared_at.is_not(None),
    or_(ALERTS.c.cleared_at.is_not(None), ALERTS.c.severity != AlertSeverity.CRITICAL),
    ALERTS.c.since_at.desc(),
    ALERTS.c.id,
)


def read_alerts(connection: Connection, *, is_open: bool | None = None, limit: int = MAX_OPEN) -> list[AlertView]:
    """Return alerts: open ones first, critical ones before others, then the latest."""
    found = select(ALERTS) if is_open is None else select(ALERTS).where(_IS_OPEN if is_open else ~_IS_OPEN)
    return [AlertView(**row) for row in connection.execute(found.order_by(*_ORDER).limit(limit)).mappings()]


def update_alerts(
    connection: Connection,
    problems: Problems,
    *,
    begun: Mapping[tuple[str, str], datetime],
    hold: timedelta,
    observed: bool,
    now: datetime,
) -> list[AlertView]:
    """Make the table say what the rules find; return the alerts that opened, became critical or are over.

    `begun` has the begin of each problem. One that has lasted for `hold` becomes an alert, which is over when no rule
    has found its problem for twice that time; not `observed` is time in which nothing was evaluated.
    """
    held = {(each.rule, each.subject): each for each in read_alerts(connection, is_open=True)}
    opened = [
        _new_alert(rule, problem, since=begun[rule, subject], now=now)
        for (rule, subject), problem in problems.items()
        if (rule, subject) not in held and not problem.near and now - begun[rule, subject] >= hold
    ][: MAX_OPEN - len(held)]
    changed = [
        replace(alert, **_measured(problem))
        for key, alert in held.items()
        if (problem := problems.get(key)) is not None and _is_news(problem, alert)
    ]
    gone = [alert for key, alert in held.items() if key not in problems]
    over = [
        replace(alert, cleared_at=now, sentence=sentence_when_over(alert))
        for alert in gone
        if observed and now - alert.last_at >= 2 * hold
    ]
    if changed or over:
        names = ("severity", "sentence", "value", "threshold", "cleared_at")
        change = update(ALERTS).where(ALERTS.c.id == bindparam("alert"))
        rows = [{"alert": each.id} | {f"new_{name}": getattr(each, name) for name in names} for each in changed + over]
        connection.execute(change.values({name: bindparam(f"new_{name}") for name in names}), rows)
    # Thousands may only go on: one statement for all.
    unseen = [each.id for each in (gone if observed else over)]
    if len(unseen) < len(held):
        connection.execute(update(ALERTS).where(_IS_OPEN, ALERTS.c.id.not_in(unseen)).values(last_at=now))
    if opened:
        connection.execute(insert(ALERTS), [asdict(each) for each in opened])
    _record_events(connection, opened, "opened", now=now)
    _record_events(connection, over, "cleared", now=now)
    return opened + [each for each in changed if each.severity != held[each.rule, each.subject].severity] + over


def _is_news(problem: AlertProblem, alert: AlertView) -> bool:
    return (problem.severity, problem.sentence, problem.threshold) != (alert.severity, alert.sentence, alert.threshold)


def _measured(problem: AlertProblem) -> dict[str, Any]:
    return {
        "severity": problem.severity.value,
        "sentence": problem.sentence,
        "value": problem.value,
        "threshold": problem.threshold,
    }


def _new_alert(rule: str, problem: AlertProblem, *, since: datetime, now: datetime) -> AlertView:
    return AlertView(
        id=secrets.token_hex(_ID_BYTES),  # one that is in use fails the evaluation, and the next one draws others
        rule=rule,
        subject=problem.subject,
        device=problem.device,
        since_at=since,
        last_at=now,
        cleared_at=None,
        delivered=None,
        **_measured(problem),
    )


def _record_events(connection: Connection, alerts: Sequence[AlertView], code: str, *, now: datetime) -> None:
    events = [
        event_record(
            now,
            kind=EventKind.ALERT.value,
            code=code,
            sentence=each.sentence,
            device=each.device,
            severity=Severity.ERROR if each.state == AlertSeverity.CRITICAL else None,
        )
        for each in alerts
    ]
    if events:
        from fleet_edge.session_log.merge import merge_records  # noqa: PLC0415 - only to write

        merge_records(connection, events)


def undelivered(connection: Connection, *, limit: int) -> list[AlertView]:
    """Return alerts whose opening, end, or turn to critical was not delivered yet, the oldest first."""
    query = select(ALERTS).where(_NOT_OVER, ALERTS.c.delivered.is_distinct_from(_STATE))
    ordered = query.order_by(ALERTS.c.since_at, ALERTS.c.id).limit(limit)
    return [AlertView(**row) for row in connection.execute(ordered).mappings()]


def note_delivered(connection: Connection, alerts: Sequence[AlertView]) -> None:
    """Record that all receivers have accepted messages about alerts."""
    note = update(ALERTS).where(ALERTS.c.id == bindparam("alert")).values(delivered=bindparam("as"))
    connection.execute(note, [{"alert": each.id, "as": each.state} for each in alerts])


def forget(connection: Connection, *, before: datetime) -> int:
    return connection.execute(delete(ALERTS).where(ALERTS.c.cleared_at < before)).rowcount


def take_lease(connection: Connection, *, holder: str, now: datetime, for_s: float) -> bool:
    """Take or renew the lease of the evaluator for `for_s`; return whether it is held."""
    lease = ALERT_LEASES.c
    new = insert_into(ALERT_LEASES, connection.dialect.name).values(name=_EVALUATOR, holder=holder, until_at=now)
    connection.execute(new.on_conflict_do_nothing())
    # A holder whose clock is ahead must not keep the lease for hours after its end.
    over = or_(lease.holder == holder, lease.until_at < now, lease.until_at > now + timedelta(hours=1))
    mine = update(ALERT_LEASES).where(lease.name == _EVALUATOR, over)
    return connection.execute(mine.values(holder=holder, until_at=now + timedelta(seconds=for_s))).rowcount > 0


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

"""Views of alerts, for people and for JSON."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from schemas.control import Alert, AlertState


class AlertSeverity(StrEnum):
    """How soon somebody has to look."""

    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertView:
    """One alert.

    Attributes:
        id: Hexadecimal; enough of its beginning names it.
        rule: Which rule found it.
        subject: A device, an edge, or an edge and a code.
        device: The device, if it concerns one.
        severity: How soon somebody has to look.
        sentence: What is wrong, as it was last seen, and what to do.
        value: What was measured last, if it is a number.
        threshold: What it is held against.
        since_at: When it was first so.
        last_at: When it was last so.
        cleared_at: When it was over; None while it is open.
        cleared_by: Who has cleared it; None if it was over by itself.
        acknowledged_at: When somebody took note of it, if anybody has.
        acknowledged_by: Who.
    """

    id: str
    rule: str
    subject: str
    device: str | None
    severity: str
    sentence: str
    value: float | None
    threshold: float | None
    since_at: datetime
    last_at: datetime
    cleared_at: datetime | None
    cleared_by: str | None
    acknowledged_at: datetime | None
    acknowledged_by: str | None

    @property
    def open(self) -> bool:
        return self.cleared_at is None


def notice_of(alert: AlertView, *, fleet: str, at: datetime) -> Alert:
    """Return what is told of an alert that was opened or is over.

    Args:
        alert: Which.
        fleet: Whose; empty if that is not known.
        at: When that was (aware).
    """
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

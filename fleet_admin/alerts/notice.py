"""Notice of an alert: what is told of it, by webhook and over MQTT alike."""

from datetime import datetime

from fleet_admin.alerts.views import AlertView
from schemas.control import Alert, AlertState

__all__ = ["notice_of"]


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

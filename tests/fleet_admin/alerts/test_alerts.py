from datetime import UTC, datetime, timedelta

from fleet_admin.alerts import alerts as book
from fleet_edge.store.database import SessionStore

NOW = datetime(2026, 3, 5, 12, 0, tzinfo=UTC)


def test_what_cannot_wait_is_listed_first_while_it_is_open(store: SessionStore) -> None:
    with store.engine.begin() as connection:
        for hours, subject, severity in (
            (3, "old", book.AlertSeverity.CRITICAL),
            (2, "b", book.AlertSeverity.WARNING),
            (1, "c", book.AlertSeverity.WARNING),
        ):
            reading = book.RuleReading(subject=subject, severity=severity, sentence="It is away.")
            book.see(connection, "edge-away", reading, since=NOW - timedelta(hours=hours), now=NOW)
        assert [each.subject for each in book.list_alerts(connection, open=True)] == ["old", "c", "b"]

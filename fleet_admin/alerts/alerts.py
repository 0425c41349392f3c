"""Alerts of a fleet: read, acknowledged and cleared; what the command line and the dashboard use.

::

    with Alerts("sqlite:///fleet.sqlite3") as alerts:
        for alert in alerts.open():
            print(alert.severity, alert.subject, alert.sentence)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from fleet_admin.alerts import book
from fleet_admin.alerts.views import AlertView
from fleet_edge.store.database import open_existing
from fleet_edge.store.errors import StoreUnavailable
from fleet_edge.store.steering.audit import AuditEntry, record_audit


class Alerts:
    """The alerts of a session log. May be used by several threads; close it, or use it as a context manager.

    Every method raises `StoreUnavailable` if the database does not answer.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER[:PASSWORD]@HOST/NAME`.
        read_only: Whether nothing is to be acknowledged, cleared or evaluated.
        later: Whether the database is opened when it is first needed, and may not be there yet.
        now: The wall clock (aware).

    Raises:
        StoreUnavailable: The database does not exist or cannot be opened.
        StoreError: The URL is wrong, the driver is missing, or the tables are missing or of another version.
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
        """Return the alerts that are open, the latest first."""
        return self.list(open=True, limit=limit)

    def list(
        self,
        *,
        open: bool | None = None,  # noqa: A002 - as the table says it
        rule: str | None = None,
        subject: str | None = None,
        since: datetime | None = None,
        limit: int = 100,
    ) -> list[AlertView]:
        """Return alerts, the open ones first, then the latest; what is left out admits all.

        Args:
            open: Only those that are open, or only those that are over.
            rule: Of this rule.
            subject: Of this subject.
            since: Begun at or after (aware).
            limit: At most so many.
        """
        with self.connection() as connection:
            return book.alerts(connection, open=open, rule=rule, subject=subject, since=since, limit=limit)

    def get(self, alert: str) -> AlertView:
        """Return one alert, by its id or enough of its beginning.

        Raises:
            NoSuchAlert: There is none, or there are several.
        """
        with self.connection() as connection:
            return book.find(connection, alert)

    def acknowledge(self, alert: str, *, who: str, source: str = "") -> AlertView:
        """Note that somebody takes care of an alert; the first one counts. Takes and raises what `get` does."""
        with self.connection() as connection:
            found = book.acknowledge(connection, book.find(connection, alert), who=who, now=self._now())
            self._audit(connection, found, who=who, action="alert acknowledge", source=source)
            return found

    def clear(self, alert: str, *, who: str, source: str = "") -> AlertView:
        """End an alert; what is still wrong makes a new one. Takes and raises what `get` does."""
        with self.connection() as connection:
            found = book.clear(connection, book.find(connection, alert), who=who, now=self._now())
            self._audit(connection, found, who=who, action="alert clear", source=source)
            return found

    def _audit(self, connection: Connection, alert: AlertView, *, who: str, action: str, source: str) -> None:
        entry = AuditEntry(
            who=who, action=action, subject=f"{alert.id[:8]} {alert.subject}", after=alert.sentence, source=source
        )
        record_audit(connection, [entry], now=self._now())

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Begin a transaction, for what is done in this package.

        Raises:
            StoreUnavailable: The database did not do what it was asked.
        """
        try:
            with self._opened().begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            # The first line: the others repeat the statement.
            raise StoreUnavailable(f"The alerts could not be reached: {str(error).partition(chr(10))[0]}") from error

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()

    def _opened(self) -> Engine:
        with self._opening:
            if self._engine is None:
                self._engine = self._open()
            return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

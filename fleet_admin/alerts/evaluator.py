"""Evaluator: looks at the facts now and then, opens and ends alerts, and has them told.

Wherever it runs, beside a dashboard, in an edge, or as `fleet admin alerts --watch`, only one evaluates at a time: it
holds a lease in the database, and another takes over when that runs out.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection

from fleet_admin.alerts import book
from fleet_admin.alerts.alerts import Alerts
from fleet_admin.alerts.facts import Facts, read_facts
from fleet_admin.alerts.notice import notice_of
from fleet_admin.alerts.rules import Reading, readings
from fleet_admin.alerts.settings import AlertSettings
from fleet_admin.alerts.views import AlertSeverity, AlertView
from fleet_edge.store.errors import StoreUnavailable
from schemas.control import Alert, AlertState
from schemas.errors import FleetError

__all__ = ["DATABASE_AWAY", "Evaluator", "default_holder"]

_log = logging.getLogger(__name__)

DATABASE_AWAY: Final = "database-away"
"""The one alert that is told and not in the table: that the table cannot be reached."""

_LEASE_LOOKS: Final = 4
"""The lease lasts for so many looks: one that is missed makes no second evaluator."""

_FORGET_EVERY: Final = timedelta(hours=1)

_Key = tuple[str, str]
"""Rule and subject."""


def default_holder() -> str:
    """Return a name for this process, as the lease has it."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(slots=True)
class Evaluator:
    """Evaluates the rules.

    Attributes:
        alerts: The table, open to write.
        settings: Thresholds.
        tell: Is given each alert that was opened or is over; must not block.
        holder: This process's name.
        now: The wall clock (aware).
        read: Returns the facts.
    """

    alerts: Alerts
    settings: AlertSettings
    tell: Callable[[Alert], None] = lambda _alert: None
    holder: str = field(default_factory=default_holder)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    read: Callable[..., Facts] = read_facts
    _wrong_since: dict[_Key, datetime] = field(default_factory=dict)
    _right_since: dict[_Key, datetime] = field(default_factory=dict)
    _away_since: datetime | None = None
    _away_told: Alert | None = None
    _forgotten_at: datetime | None = None

    def run(self, stop: threading.Event) -> None:
        """Look every `every_s` until told to stop."""
        while not stop.is_set():
            try:
                self.step()
            except FleetError as error:
                _log.warning("The alerts could not be evaluated: %s", error)
            except Exception:  # noqa: BLE001 - logged with its traceback; the next look may succeed
                _log.exception("The alerts could not be evaluated.")
            stop.wait(self.settings.every_s)

    def step(self) -> list[AlertView] | None:
        """Look once.

        Returns:
            Alerts that were opened or ended, or None if another evaluates, or the database is away.
        """
        now = self.now()
        try:
            with self.alerts.connection() as connection:
                lease_s = max(30.0, _LEASE_LOOKS * self.settings.every_s)
                if not book.take_lease(connection, holder=self.holder, now=now, for_s=lease_s):
                    self._wrong_since.clear()
                    self._right_since.clear()
                    return None
            with self.alerts.connection() as connection:
                facts = self.read(connection, self.settings, now=now)
            with self.alerts.connection() as connection:
                changed = self._apply(connection, facts)
        except StoreUnavailable as error:
            self._note_away(now, error)
            return None
        self._note_back(now)
        for alert in changed:
            level = logging.WARNING if alert.open else logging.INFO
            _log.log(level, "Alert %s (%s): %s", "opened" if alert.open else "over", alert.rule, alert.sentence)
            self.tell(notice_of(alert, fleet=self.settings.fleet or "", at=now))
        return changed

    def _apply(self, connection: Connection, facts: Facts) -> list[AlertView]:
        """Bring the table in step with what the rules say; return what has changed."""
        now, changed = facts.now, list[AlertView]()
        held = {(each.rule, each.subject): each for each in book.alerts(connection, open=True, limit=book.MOST_OPEN)}
        read: set[_Key] = set()
        for rule, reading in readings(facts, self.settings):
            key = (rule, reading.subject)
            read.add(key)
            if reading.wrong:
                self._right_since.pop(key, None)
                since = self._wrong_since.setdefault(key, now)
                if key in held or now - since >= timedelta(seconds=self.settings.hold_s):
                    opened = book.see(connection, _sighting(rule, reading), since=since, now=now)
                    changed += [] if opened is None else [opened]
            else:
                self._wrong_since.pop(key, None)
                if key in held:
                    changed += self._settle(connection, held[key], now, right=reading.right)
        for key in held.keys() - read:  # of whom nothing can be said, nothing is wrong
            self._wrong_since.pop(key, None)
            changed += self._settle(connection, held[key], now, right=True)
        for key in self._wrong_since.keys() - read:
            del self._wrong_since[key]
        for key in self._right_since.keys() - held.keys():
            del self._right_since[key]
        if self._forgotten_at is None or now - self._forgotten_at >= _FORGET_EVERY:
            self._forgotten_at = now
            book.forget(connection, before=now - timedelta(days=self.settings.keep_days))
        return changed

    def _settle(self, connection: Connection, alert: AlertView, now: datetime, *, right: bool) -> list[AlertView]:
        """End an alert whose subject has been right for long enough."""
        key = (alert.rule, alert.subject)
        if not right:
            self._right_since.pop(key, None)
            return []
        if now - self._right_since.setdefault(key, now) < timedelta(seconds=self.settings.clear_s):
            return []
        del self._right_since[key]
        return [book.clear(connection, alert, now=now)]

    def _note_away(self, now: datetime, error: StoreUnavailable) -> None:
        """Tell, once, that the database is away for as long as something must be wrong to be an alert."""
        if self._away_since is None:
            self._away_since = now
            _log.warning("The alerts cannot be evaluated: %s", error)
        if self._away_told is None and now - self._away_since >= timedelta(seconds=self.settings.hold_s):
            self._away_told = Alert(
                id=f"{DATABASE_AWAY}-{int(self._away_since.timestamp())}",
                fleet=self.settings.fleet,
                rule=DATABASE_AWAY,
                subject="database",
                severity=AlertSeverity.CRITICAL.value,
                state=AlertState.OPEN,
                sentence="The session log's database cannot be reached; edges keep what they write in their spools.",
                since=self._away_since,
                at=now,
            )
            self.tell(self._away_told)

    def _note_back(self, now: datetime) -> None:
        if self._away_told is not None:
            self.tell(self._away_told.model_copy(update={"state": AlertState.CLEARED, "at": now}))
        self._away_since = self._away_told = None


def _sighting(rule: str, reading: Reading) -> book.Sighting:
    return book.Sighting(
        rule=rule,
        subject=reading.subject,
        severity=reading.severity.value,
        sentence=reading.sentence,
        value=reading.value,
        threshold=reading.threshold,
        device=reading.device,
    )

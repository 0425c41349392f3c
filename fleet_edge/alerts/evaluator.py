"""Evaluator: evaluates the rules regularly, opens and clears alerts, and delivers them.

It runs next to a dashboard, in an edge, or as `fleet admin alerts --watch`. Only one process evaluates at a time: it
holds a lease in the database, and another takes over when that expires.
"""

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, Self

from sqlalchemy import Connection

from fleet_common.closing import Closing
from fleet_common.metrics import read_token
from fleet_edge.alerts import alerts as book
from fleet_edge.alerts.alerts import Alerts, AlertSeverity, DeliveryFailed, notice_of
from fleet_edge.alerts.delivery import BrokerChannel, Webhook
from fleet_edge.alerts.home_assistant import HomeAssistant
from fleet_edge.alerts.rules import Facts, read_facts, readings
from fleet_edge.alerts.settings import AlertSettings
from fleet_edge.store import queries
from fleet_edge.store.errors import StoreUnavailable
from fleet_edge.store.views import AlertView, DeviceView
from schemas.control import Alert, AlertState
from schemas.errors import FleetError

_log = logging.getLogger(__name__)

DATABASE_AWAY: Final = "database-away"
"""The only alert that is delivered but not stored: the table cannot be reached."""

EVERY_S: Final = 15.0
"""Seconds between two evaluations."""

_LEASE_LOOKS: Final = 4
"""Evaluations within one lease, so that a missed one does not lose the lease."""

_FORGET_EVERY: Final = timedelta(hours=1)
_KEPT: Final = timedelta(days=365)  # alerts that are over

_Key = tuple[str, str]
"""Rule and subject."""


@dataclass(slots=True)
class Evaluator:
    """Evaluates the rules.

    `tell` is called with each alert that was opened or cleared, and must not block; `show` with all devices, if set.
    """

    alerts: Alerts
    settings: AlertSettings
    tell: Callable[[Alert], None] = lambda _alert: None
    show: Callable[[Sequence[DeviceView]], None] | None = None
    holder: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    read: Callable[..., Facts] = read_facts
    _wrong_since: dict[_Key, datetime] = field(default_factory=dict)
    _right_since: dict[_Key, datetime] = field(default_factory=dict)
    _away_since: datetime | None = None
    _away_told: Alert | None = None
    _forgotten_at: datetime | None = None

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self.step()
            except FleetError as error:
                _log.warning("The alerts could not be evaluated: %s", error)
            except Exception:  # noqa: BLE001 - logged with its traceback; the next look may succeed
                _log.exception("The alerts could not be evaluated.")
            stop.wait(EVERY_S)

    def step(self) -> list[AlertView] | None:
        """Evaluate once and return the changed alerts; None if another process evaluates or the database is away."""
        now = self.now()
        try:
            with self.alerts.connection() as connection:
                lease_s = _LEASE_LOOKS * EVERY_S
                if not book.take_lease(connection, holder=self.holder, now=now, for_s=lease_s):
                    self._wrong_since.clear()
                    self._right_since.clear()
                    return None
            with self.alerts.connection() as connection:
                facts = self.read(connection, now=now)
                devices = queries.devices(connection, now=now) if self.show is not None else []
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
        if self.show is not None:
            self.show(devices)
        return changed

    def _apply(self, connection: Connection, facts: Facts) -> list[AlertView]:
        now, changed = facts.now, list[AlertView]()
        held = {
            (each.rule, each.subject): each for each in book.list_alerts(connection, open=True, limit=book.MOST_OPEN)
        }
        read: set[_Key] = set()
        for rule, reading in readings(facts, self.settings):
            key = (rule, reading.subject)
            read.add(key)
            if reading.wrong:
                self._right_since.pop(key, None)
                since = self._wrong_since.setdefault(key, now)
                if key in held or now - since >= timedelta(seconds=self.settings.hold_s):
                    opened = book.see(connection, rule, reading, since=since, now=now)
                    changed += [] if opened is None else [opened]
            else:
                self._wrong_since.pop(key, None)
                if key in held:
                    changed += self._settle(connection, held[key], now, right=reading.right)
        for key in held.keys() - read:  # without data there is no alert
            self._wrong_since.pop(key, None)
            changed += self._settle(connection, held[key], now, right=True)
        for key in self._wrong_since.keys() - read:
            del self._wrong_since[key]
        for key in self._right_since.keys() - held.keys():
            del self._right_since[key]
        if self._forgotten_at is None or now - self._forgotten_at >= _FORGET_EVERY:
            self._forgotten_at = now
            book.forget(connection, before=now - _KEPT)
        return changed

    def _settle(self, connection: Connection, alert: AlertView, now: datetime, *, right: bool) -> list[AlertView]:
        key = (alert.rule, alert.subject)
        if not right:
            self._right_since.pop(key, None)
            return []
        if now - self._right_since.setdefault(key, now) < timedelta(seconds=2 * self.settings.hold_s):
            return []
        del self._right_since[key]
        return [book.clear(connection, alert, now=now)]

    def _note_away(self, now: datetime, error: StoreUnavailable) -> None:
        """Report once that the database is unavailable, after the time that makes a problem an alert."""
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


_MOST_WAITING: Final = 1000
_ATTEMPTS: Final = 20
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 300.0


class Channel(Protocol):
    """A destination of alerts."""

    @property
    def name(self) -> str: ...

    def send(self, alert: Alert) -> None:
        """Deliver; may block for seconds. Raises `DeliveryFailed` if another attempt may succeed."""


class _Round:
    def __init__(self, channel: Channel, pause: Callable[[float], bool]) -> None:
        self.channel = channel
        self._pause = pause
        self._waiting: deque[Alert] = deque(maxlen=_MOST_WAITING)
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        self._thread.start()

    def put(self, alert: Alert) -> None:
        with self._changed:
            if len(self._waiting) == _MOST_WAITING:
                _log.error("Alerts for %s are dropped: it has accepted none for a long time.", self.channel.name)
            self._waiting.append(alert)
            self._changed.notify()

    def end(self, timeout_s: float) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    return
                alert = self._waiting.popleft()
            try:
                self._send(alert)
            except Exception:  # noqa: BLE001 - logged with its traceback
                _log.exception("An alert could not be delivered to %s.", self.channel.name)

    def _send(self, alert: Alert) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.channel.send(alert)
            except DeliveryFailed as error:
                if attempt == _ATTEMPTS or self._ended:
                    _log.error("The alert %s is not sent again: %s", alert.id, error)
                    return
                if attempt == 1:
                    _log.warning("The alert %s will be sent again: %s", alert.id, error)
                self._pause(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)))
            else:
                return


class Courier:
    """Delivers every alert to all channels. `pause` waits before the next attempt, or until the end."""

    def __init__(self, channels: Iterable[Channel], *, pause: Callable[[float], bool] | None = None) -> None:
        self._ending = threading.Event()
        self._rounds = [_Round(channel, pause or self._ending.wait) for channel in channels]

    def tell(self, alert: Alert) -> None:
        """Queue an alert. Never blocks. Thread-safe."""
        for each in self._rounds:
            each.put(alert)

    def close(self, timeout_s: float = 5.0) -> None:
        self._ending.set()
        for each in self._rounds:
            each.end(timeout_s)


_END_S: Final = 5.0


class RunningAlerts(Closing):
    """Evaluates and delivers alerts: by `step`, or on a thread between `start` and `close`.

    `channels` are notified in addition to those of the settings. Raises `MetricsError` if the secret's file cannot be
    used.
    """

    def __init__(self, alerts: Alerts, settings: AlertSettings, *, channels: Sequence[Channel] = ()) -> None:
        self._broker = None if settings.fleet is None else BrokerChannel(settings)
        self._courier = Courier([*channels, *_webhooks(settings), *([self._broker] if self._broker else [])])
        self._evaluator = Evaluator(alerts, settings, tell=self._courier.tell)
        if settings.home_assistant and settings.fleet is not None and self._broker is not None:
            shown = HomeAssistant(settings.fleet, self._broker.retain)
            self._broker.on_connection(lambda _up: shown.forget())
            self._evaluator.show = shown.show
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._evaluator.run, args=(self._stop,), name="alert-rules", daemon=True)

    def step(self) -> list[AlertView]:
        """Evaluate once; return the changed alerts, none if another process evaluates."""
        return self._evaluator.step() or []

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_END_S)
        self._courier.close(_END_S)
        if self._broker is not None:
            self._broker.close()


def _webhooks(settings: AlertSettings) -> list[Webhook]:
    if not settings.webhook:
        return []
    secret = settings.webhook_secret_file
    return [Webhook(settings.webhook, secret=None if secret is None else read_token(secret.expanduser()))]

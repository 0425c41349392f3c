"""Evaluator: evaluates the rules regularly, opens and clears alerts, and delivers them.

It runs in every edge, next to a dashboard, or as `fleet admin alerts --watch`. Only one process evaluates at a time: it
holds a lease in the database, and another takes over when that expires.
"""

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, Self

from sqlalchemy import Connection

from fleet_common.closing import Closing
from fleet_edge.alerts import alerts as book
from fleet_edge.alerts.alerts import AlertSeverity, DeliveryFailed, RuleReading, notice_of
from fleet_edge.alerts.delivery import BrokerChannel, Webhook
from fleet_edge.alerts.home_assistant import HomeAssistant
from fleet_edge.alerts.rules import Facts, grouped, read_facts, readings
from fleet_edge.alerts.settings import EVERY_S, AlertSettings
from fleet_edge.store import queries
from fleet_edge.store.errors import StoreUnavailable
from fleet_edge.store.views import AlertView, DeviceView
from schemas.control import Alert, AlertState
from schemas.errors import FleetError

_log = logging.getLogger(__name__)

DATABASE_AWAY: Final = "database-away"
"""The only alert that is delivered but not stored: the table cannot be reached."""

_LEASE_LOOKS: Final = 3
"""Evaluations within one lease, so that a missed one does not lose the lease."""

_FORGET_EVERY: Final = timedelta(hours=1)
_KEPT: Final = timedelta(days=365)  # alerts that are over

Connect = Callable[[], AbstractContextManager[Connection]]
"""Begins a transaction; raises `StoreUnavailable`."""

_Key = tuple[str, str]
"""Rule and subject."""

_Notice = tuple[str, str, str]
"""Alert, its state and its severity."""


def _key(notice: Alert) -> _Notice:
    return notice.id, notice.state, notice.severity


def _process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(slots=True)
class Evaluator:
    """Evaluates the rules, and sends what has to be delivered.

    `send` queues a message and must not block. `settled` returns the messages that all receivers have accepted since
    the last call, and those that they have not: these are sent again. Without it, `send` itself delivers. `show` is
    called with all devices, if set.
    """

    connect: Connect
    settings: AlertSettings
    send: Callable[[Alert], None] = lambda _alert: None
    settled: Callable[[], tuple[list[Alert], list[Alert]]] | None = None
    show: Callable[[Sequence[DeviceView]], None] | None = None
    holder: str = field(default_factory=_process)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    read: Callable[..., Facts] = read_facts
    _wrong_since: dict[_Key, datetime] = field(default_factory=dict)
    _right_since: dict[_Key, datetime] = field(default_factory=dict)
    _held: book.OpenAlerts = field(default_factory=lambda: book.OpenAlerts({}))
    _sending: set[_Notice] = field(default_factory=set)
    _other_holds: bool = False
    _away_since: datetime | None = None
    _away_told: Alert | None = None
    _back_at: datetime | None = None
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
            with self.connect() as connection:
                lease_s = _LEASE_LOOKS * EVERY_S
                self._other_holds = not book.take_lease(connection, holder=self.holder, now=now, for_s=lease_s)
            if self._other_holds:
                self._wrong_since.clear()
                self._right_since.clear()
                return None
            with self.connect() as connection:
                facts = self.read(connection, now=now)
                devices = queries.devices(connection, now=now) if self.show is not None else []
            if self._away_since is not None:
                self._back_at = now
            with self.connect() as connection:
                changed = self._apply(connection, facts)
                notices = self._notices(connection, now)
                book.note_evaluation(connection, now=now)
        except StoreUnavailable as error:
            self._note_away(now, error)
            return None
        self._note_back(now)
        for group in grouped(each for each in changed if each.open):
            _log.warning("Alerts opened (%s): %s", group.rule, group.sentence)
        for group in grouped(each for each in changed if not each.open):
            _log.info("Alerts over (%s): %s", group.rule, group.subjects)
        for notice in notices:
            if self.settled is not None:
                self._sending.add(_key(notice))
            self.send(notice)
        if self.show is not None:
            self.show(devices)
        return changed

    def give_up(self) -> None:
        """Record what was delivered, and let another process evaluate at once."""
        accepted = [] if self.settled is None else self.settled()[0]
        with suppress(StoreUnavailable), self.connect() as connection:
            book.note_delivered(connection, [each for each in accepted if each.rule != DATABASE_AWAY])
            book.give_up_lease(connection, holder=self.holder, now=self.now())

    def _notices(self, connection: Connection, now: datetime) -> list[Alert]:
        """Return what has to be sent; an earlier evaluator may have ended before its messages were accepted."""
        if self.settled is not None:
            accepted, refused = self.settled()
            book.note_delivered(connection, [each for each in accepted if each.rule != DATABASE_AWAY])
            self._sending -= {_key(each) for each in (*accepted, *refused)}
        pending = book.undelivered(connection, limit=_MOST_WAITING)
        notices = [notice_of(each, fleet=self.settings.fleet or "", at=now) for each in pending]
        fresh = [each for each in notices if _key(each) not in self._sending]
        if self.settled is None:
            book.note_delivered(connection, fresh)
        return fresh

    def _apply(self, connection: Connection, facts: Facts) -> list[AlertView]:
        now, hold = facts.now, timedelta(seconds=self.settings.hold_s)
        held = book.open_alerts(connection, self._held)
        unread, quiet = dict(held), list[tuple[_Key, bool]]()
        found, wrong_since = list[book.Found](), dict[_Key, datetime]()
        for rule, reading in readings(facts, self.settings):
            key = (rule, reading.subject)
            alert = unread.pop(key, None)
            if reading.wrong:
                self._right_since.pop(key, None)
                since = wrong_since[key] = self._wrong_since.get(key) or self._begin(reading, now)
                if now - since >= hold if alert is None else book.is_news(reading, alert):
                    found.append((rule, reading, since))
            elif alert is not None:
                quiet.append((key, reading.right))
        self._wrong_since = wrong_since
        quiet += [(key, True) for key in unread]  # without data there is no alert
        over = [held[key] for key, right in quiet if self._is_over(key, now, right=right)]
        ending = book.read_again(connection, over)
        changed = book.note_wrong(connection, found, held=held, quiet=[held[key] for key, _ in quiet], now=now)
        changed += book.clear(connection, ending, now=now)
        self._held = book.OpenAlerts(held, None if found or over else now)
        for key in self._right_since.keys() - held.keys():
            del self._right_since[key]
        if self._forgotten_at is None or now - self._forgotten_at >= _FORGET_EVERY:
            self._forgotten_at = now
            book.forget(connection, before=now - _KEPT)
        return changed

    def _begin(self, reading: RuleReading, now: datetime) -> datetime:
        """Return the begin of a problem; times from before an outage of the database say nothing about now."""
        known = [each for each in (reading.since, self._back_at) if each is not None]
        return now if reading.since is None else min(max(known), now)

    def _is_over(self, key: _Key, now: datetime, *, right: bool) -> bool:
        if not right:
            self._right_since.pop(key, None)
            return False
        if now - self._right_since.setdefault(key, now) < timedelta(seconds=2 * self.settings.hold_s):
            return False
        del self._right_since[key]
        return True

    def _note_away(self, now: datetime, error: StoreUnavailable) -> None:
        """Report once that the database is unavailable, after the time that makes a problem an alert."""
        if self._away_since is None:
            self._away_since = now
            _log.warning("The alerts cannot be evaluated: %s", error)
        if self._other_holds:  # it reports that: one message is enough
            return
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
            self.send(self._away_told)

    def _note_back(self, now: datetime) -> None:
        if self._away_told is not None:
            self.send(self._away_told.model_copy(update={"state": AlertState.CLEARED, "at": now}))
        self._away_since = self._away_told = None


_MOST_WAITING: Final = 1000
_MOST_TOGETHER: Final = 100
_MOST_NAMED: Final = 5
_ATTEMPTS: Final = 20
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 300.0


class Channel(Protocol):
    """A destination of alerts."""

    @property
    def name(self) -> str: ...

    def send(self, alerts: Sequence[Alert]) -> None:
        """Deliver alerts of one rule and state; may block for seconds.

        Raises `DeliveryFailed` if another attempt may succeed.
        """


class _Round:
    """Delivers to one channel on a thread; `done` is called with each alert, and whether it was accepted."""

    def __init__(
        self, channel: Channel, pause: Callable[[float], bool], done: Callable[["_Round", Alert, bool], None]
    ) -> None:
        self.channel = channel
        self._pause = pause
        self._done = done
        self._waiting: deque[Alert] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        self._thread.start()

    def put(self, alert: Alert) -> None:
        with self._changed:
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
                alerts = self._next()
            accepted = False
            try:
                accepted = self._send(alerts)
            except Exception:  # noqa: BLE001 - logged with its traceback
                _log.exception("An alert could not be delivered to %s.", self.channel.name)
            for alert in alerts:
                self._done(self, alert, accepted)

    def _next(self) -> list[Alert]:
        """Take the first alert, and those after it of the same rule and state."""
        first = self._waiting[0]
        alike = [each for each in self._waiting if (each.rule, each.state) == (first.rule, first.state)]
        taken = alike[:_MOST_TOGETHER]
        names = {id(each) for each in taken}
        self._waiting = deque(each for each in self._waiting if id(each) not in names)
        return taken

    def _send(self, alerts: Sequence[Alert]) -> bool:
        names = " ".join(each.id for each in alerts[:_MOST_NAMED])
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self.channel.send(alerts)
            except DeliveryFailed as error:
                if attempt == _ATTEMPTS or self._ended:
                    _log.error("%d alerts (%s) were not delivered: %s", len(alerts), names, error)
                    return False
                if attempt == 1:
                    _log.warning("%d alerts (%s) will be sent again: %s", len(alerts), names, error)
                self._pause(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)))
            else:
                return True
        return False


class Courier:
    """Delivers every alert to all channels. `pause` waits before the next attempt, or until the end."""

    def __init__(self, channels: Iterable[Channel], *, pause: Callable[[float], bool] | None = None) -> None:
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._accepted: list[Alert] = []
        self._refused: list[Alert] = []
        self._waiting: dict[_Notice, set[_Round]] = {}  # the channels that have not accepted it
        self._rounds = [_Round(channel, pause or self._ending.wait, self._done) for channel in channels]

    def send(self, alert: Alert) -> None:
        """Queue an alert. Never blocks. Thread-safe."""
        with self._lock:
            if self._rounds:
                self._waiting[_key(alert)] = set(self._rounds)
            else:
                self._accepted.append(alert)
        for each in self._rounds:
            each.put(alert)

    def settled(self) -> tuple[list[Alert], list[Alert]]:
        """Return the alerts that all channels have accepted since the last call, and those that one has not."""
        with self._lock:
            settled = self._accepted, self._refused
            self._accepted, self._refused = [], []
        return settled

    def close(self, timeout_s: float = 5.0) -> None:
        self._ending.set()
        for each in self._rounds:
            each.end(timeout_s)

    def _done(self, channel: _Round, alert: Alert, accepted: bool) -> None:
        with self._lock:
            waiting = self._waiting.get(_key(alert))
            if waiting is None:
                return  # another channel has refused it
            waiting.discard(channel)
            if accepted and waiting:
                return
            del self._waiting[_key(alert)]
            (self._accepted if accepted else self._refused).append(alert)


_END_S: Final = 5.0


class RunningAlerts(Closing):
    """Evaluates and delivers alerts: by `step`, or on a thread between `start` and `close`.

    `channels` are notified in addition to those of the settings. Raises `MetricsError` if the secret's file cannot be
    used.
    """

    def __init__(
        self,
        connect: Connect,
        settings: AlertSettings,
        *,
        holder: str = "",
        channels: Sequence[Channel] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._broker = None if settings.fleet is None else BrokerChannel(settings)
        self._courier = Courier([*channels, *_webhooks(settings), *([self._broker] if self._broker else [])])
        self._evaluator = Evaluator(
            connect,
            settings,
            send=self._courier.send,
            settled=self._courier.settled,
            holder=holder or _process(),
            now=now,
        )
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
        self._evaluator.give_up()
        if self._broker is not None:
            self._broker.close()


def _webhooks(settings: AlertSettings) -> list[Webhook]:
    if not settings.webhook:
        return []
    return [Webhook(settings.webhook, secret=settings.secret())]

"""Evaluator: evaluates the rules regularly, opens and clears alerts, and delivers them.

It runs in every edge and next to a dashboard. Only one process evaluates at a time: it holds a lease in the database,
and another takes over when that expires.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
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
from fleet_edge.alerts.rules import Facts, grouped, read_facts, readings, sentence_when_over
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

_GAP: Final = timedelta(minutes=30)
"""Time between two evaluations from which the clock was stepped, or the machine suspended: nothing was observed."""

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
    """Evaluates the rules, and delivers what they find.

    `deliver` sends alerts of one rule and state, and raises `DeliveryFailed` if they have to be sent again. `show` is
    called with all devices, if set.
    """

    connect: Connect
    settings: AlertSettings
    deliver: Callable[[Sequence[Alert]], None] = lambda _alerts: None
    show: Callable[[Sequence[DeviceView]], None] | None = None
    holder: str = field(default_factory=_process)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    read: Callable[..., Facts] = read_facts
    _wrong_since: dict[_Key, datetime] = field(default_factory=dict)
    _right_since: dict[_Key, datetime] = field(default_factory=dict)
    _other_holds: bool = False
    _away_since: datetime | None = None
    _away_alert: Alert | None = None
    _away_waiting: list[Alert] = field(default_factory=list)
    _back_at: datetime | None = None
    _evaluated_at: datetime | None = None
    _failures: int = 0
    _retry_at: datetime | None = None

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
            before, self._evaluated_at = self._evaluated_at, now
            if self._away_since is not None or (before is not None and abs(now - before) > _GAP):
                self._back_at = now
                self._wrong_since.clear()
                self._right_since.clear()
            with self.connect() as connection:
                changed = self._apply(connection, facts)
                pending = book.undelivered(connection, limit=_MAX_WAITING)
                book.note_evaluation(connection, now=now)
        except StoreUnavailable as error:
            self._note_away(now, error)
            return None
        self._note_back(now)
        for group in grouped(each for each in changed if each.open):
            _log.warning("Alerts opened (%s): %s", group.rule, group.sentence)
        for group in grouped(each for each in changed if not each.open):
            _log.info("Alerts over (%s): %s", group.rule, group.subjects)
        self._send([notice_of(each, fleet=self.settings.fleet or "", at=now) for each in pending], now)
        if self.show is not None:
            self.show(devices)
        return changed

    def give_up(self) -> None:
        """Let another process evaluate at once."""
        with suppress(StoreUnavailable), self.connect() as connection:
            book.give_up_lease(connection, holder=self.holder, now=self.now())

    def _send(self, notices: Sequence[Alert], now: datetime) -> None:
        """Deliver what is due; after a failure the rest waits, longer each time, also for the next evaluator."""
        # A wait that is longer than any is left from before the clock was set back.
        if self._retry_at is not None and now < self._retry_at <= now + timedelta(seconds=_LONGEST_WAIT_S):
            return
        groups: dict[tuple[str, str], list[Alert]] = {}
        for each in (*self._away_waiting, *notices):
            groups.setdefault((each.rule, each.state), []).append(each)
        parts = (
            group[place : place + _MAX_TOGETHER]
            for group in groups.values()
            for place in range(0, len(group), _MAX_TOGETHER)
        )
        for part in parts:
            # A slow receiver must not outlast the lease.
            if self.now() - now > timedelta(seconds=EVERY_S) or not self._deliver(part, now):
                return

    def _deliver(self, alerts: Sequence[Alert], now: datetime) -> bool:
        """Deliver alerts of one rule and state, and record that; return whether they were accepted."""
        try:
            self.deliver(alerts)
        except DeliveryFailed as error:
            if not self._failures:
                names = " ".join(each.id for each in alerts[:_MAX_NAMED])
                _log.warning("%d alerts (%s) will be sent again: %s", len(alerts), names, error)
            # Half an interval less, as an evaluation may come a little early.
            wait_s = min(_LONGEST_WAIT_S, EVERY_S * (2.0**self._failures - 0.5))
            self._failures, self._retry_at = min(self._failures + 1, 16), now + timedelta(seconds=wait_s)
            return False
        self._failures, self._retry_at = 0, None
        self._away_waiting = [each for each in self._away_waiting if each not in alerts]
        stored = [each for each in alerts if each.rule != DATABASE_AWAY]
        if stored:
            with suppress(StoreUnavailable), self.connect() as connection:  # else they are sent again
                book.note_delivered(connection, stored)
        return True

    def _apply(self, connection: Connection, facts: Facts) -> list[AlertView]:
        now, hold = facts.now, timedelta(seconds=self.settings.hold_s)
        held = book.open_alerts(connection)
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
        changed += book.clear(connection, ending, sentence=sentence_when_over, now=now)
        for key in self._right_since.keys() - held.keys():
            del self._right_since[key]
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
        if self._away_since is None or self._away_since > now:  # or the clock was set back
            self._away_since = now
            _log.warning("The alerts cannot be evaluated: %s", error)
        if self._other_holds:  # it reports that: one message is enough
            return
        if self._away_alert is None and now - self._away_since >= timedelta(seconds=self.settings.hold_s):
            self._away_alert = Alert(
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
            self._away_waiting.append(self._away_alert)
        self._send([], now)

    def _note_back(self, now: datetime) -> None:
        if self._away_alert is not None:
            sentence = "The session log's database can be reached again."
            over = {"state": AlertState.CLEARED, "at": now, "sentence": sentence}
            self._away_waiting.append(self._away_alert.model_copy(update=over))
        self._away_since = self._away_alert = None


_MAX_WAITING: Final = 1000
_MAX_TOGETHER: Final = 100
_MAX_NAMED: Final = 5
_LONGEST_WAIT_S: Final = 300.0


class AlertChannel(Protocol):
    """A destination of alerts."""

    @property
    def name(self) -> str: ...

    def send(self, alerts: Sequence[Alert]) -> None:
        """Deliver alerts of one rule and state; may block for seconds.

        Raises `DeliveryFailed` if another attempt may succeed.
        """


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
        channels: Sequence[AlertChannel] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._broker = None if settings.fleet is None else BrokerChannel(settings)
        webhooks = [Webhook(settings.webhook, secret=settings.secret())] if settings.webhook else []
        self._channels: list[AlertChannel] = [*channels, *webhooks, *([self._broker] if self._broker else [])]
        # By channel, while another one has not accepted the same.
        self._accepted: list[set[_Notice]] = [set() for _ in self._channels]
        self._evaluator = Evaluator(connect, settings, deliver=self._deliver, holder=holder or _process(), now=now)
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
        self._evaluator.give_up()
        if self._broker is not None:
            self._broker.close()

    def _deliver(self, alerts: Sequence[Alert]) -> None:
        """Send alerts to every channel that has not accepted them; raises `DeliveryFailed` if one does not."""
        failed: DeliveryFailed | None = None
        for channel, accepted in zip(self._channels, self._accepted, strict=True):
            fresh = [each for each in alerts if _key(each) not in accepted]
            try:
                if fresh:
                    channel.send(fresh)
            except DeliveryFailed as error:
                failed = error
            else:
                accepted.update(map(_key, fresh))
        if failed is not None:
            raise failed
        for accepted in self._accepted:
            accepted.clear()

"""Evaluation of the rules, every few seconds: open and clear alerts, and deliver what was not delivered.

It runs in every edge and next to a dashboard. Only one process evaluates at a time: it holds a lease in the database,
and another takes over when that expires.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final, Self

from sqlalchemy import Connection

from fleet_common.closing import Closing
from fleet_edge.session_log import queries
from fleet_edge.session_log.alerts import alerts as table
from fleet_edge.session_log.alerts.delivery import AlertChannel, BrokerChannel, DeliveryFailed, HomeAssistant, Webhook
from fleet_edge.session_log.alerts.rules import AlertProblem, Facts, find_problems, grouped, read_facts
from fleet_edge.session_log.alerts.settings import EVERY_S, AlertSettings
from fleet_edge.session_log.errors import StoreUnavailable
from fleet_edge.session_log.views import AlertSeverity, AlertView
from schemas.errors import FleetError

_log = logging.getLogger(__name__)

DATABASE_AWAY: Final = "database-away"
"""The only alert that is delivered but not stored: the table cannot be reached."""

_LEASE_S: Final = 3 * EVERY_S  # a missed evaluation does not lose the lease
_GAP: Final = timedelta(minutes=5)
"""Time without an evaluation from which nothing was observed: none ran, or the clock was stepped."""

_MAX_WAITING: Final = 1000
_MAX_TOGETHER: Final = 100
_MAX_NAMED: Final = 5
_LONGEST_WAIT_S: Final = 300.0
_END_S: Final = 5.0

Connect = Callable[[], AbstractContextManager[Connection]]
"""Begins a transaction; raises `StoreUnavailable`."""


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
        home: HomeAssistant | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        read: Callable[..., Facts] = read_facts,
    ) -> None:
        self._connect = connect
        self._settings = settings
        self._holder = holder or f"{socket.gethostname()}:{os.getpid()}"
        self._now = now
        self._read = read
        self._broker = None if settings.fleet is None else BrokerChannel(settings)
        self._channels: list[AlertChannel] = list(channels)
        if settings.webhook:
            self._channels.append(Webhook(settings.webhook, fleet=settings.fleet, secret=settings.secret()))
        self._home = home
        if self._broker is not None:
            self._channels.append(self._broker)
            if settings.home_assistant and settings.fleet is not None:
                shown = self._home = HomeAssistant(settings.fleet, self._broker.retain)
                self._broker.on_connection(lambda _up: shown.forget())
        # What a channel has accepted, while another one has not.
        self._accepted: set[tuple[AlertChannel, str, str]] = set()
        self._failures = 0
        self._retry_at: datetime | None = None
        # Begins of problems that are no alerts yet, and of the observation, if the log knows of a time before it.
        self._begun: dict[tuple[str, str], datetime] = {}
        self._observed_since: datetime | None = None
        self._other_holds = False
        self._away: AlertView | None = None
        self._away_waiting: list[AlertView] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alert-rules", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        """End, and let another process evaluate at once."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_END_S)
        with suppress(StoreUnavailable), self._connect() as connection:
            table.give_up_lease(connection, holder=self._holder, now=self._now())
        if self._broker is not None:
            self._broker.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.step()
            except FleetError as error:
                _log.warning("The alerts could not be evaluated: %s", error)
            except Exception:  # noqa: BLE001 - logged with its traceback; the next evaluation may succeed
                _log.exception("The alerts could not be evaluated.")
            self._stop.wait(EVERY_S)

    def step(self) -> list[AlertView] | None:
        """Evaluate once and return the changed alerts; None if another process evaluates or the database is away."""
        now = self._now()
        try:
            with self._connect() as connection:
                self._other_holds = not table.take_lease(connection, holder=self._holder, now=now, for_s=_LEASE_S)
            if self._other_holds:
                self._begun.clear()
                return None
            with self._connect() as connection:
                facts = self._read(connection, now=now)
                devices = queries.read_devices(connection, now=now) if self._home is not None else []
                before = table.last_evaluation(connection, now=now).at
            observed = self._away is None and (before is None or abs(now - before) <= _GAP)
            if not observed:
                self._observed_since = now
                self._begun.clear()
            with self._connect() as connection:
                problems = find_problems(facts, self._settings)
                self._begun = {
                    key: self._begun.get(key) or self._begin(problem, now)
                    for key, problem in problems.items()
                    if not problem.near
                }
                hold = timedelta(seconds=self._settings.hold_s)
                changed = table.update_alerts(
                    connection, problems, begun=self._begun, hold=hold, observed=observed, now=now
                )
                waiting = table.undelivered(connection, limit=_MAX_WAITING)
                table.note_evaluation(connection, now=now)
        except StoreUnavailable as error:
            self._note_away(now, error)
            return None
        self._note_back(now)
        for group in grouped(each for each in changed if each.open):
            _log.warning("Alerts opened (%s): %s", group.rule, group.sentence)
        for group in grouped(each for each in changed if not each.open):
            _log.info("Alerts over (%s): %s", group.rule, group.subjects)
        self._send(waiting, now)
        if self._home is not None:
            self._home.show(devices)
        return changed

    def _begin(self, problem: AlertProblem, now: datetime) -> datetime:
        """Return the begin of a problem; times from before a gap say nothing about now."""
        if problem.since is None:
            return now
        return min(now, max(problem.since, self._observed_since or problem.since))

    def _send(self, alerts: Sequence[AlertView], now: datetime) -> None:
        """Deliver what is due; after a failure the rest waits, longer each time, also for the next evaluator."""
        # A wait that is longer than any is left from before the clock was set back.
        if self._retry_at is not None and now < self._retry_at <= now + timedelta(seconds=_LONGEST_WAIT_S):
            return
        groups: dict[tuple[str, bool], list[AlertView]] = {}
        for each in (*self._away_waiting, *alerts):
            groups.setdefault((each.rule, each.open), []).append(each)
        parts = (
            group[place : place + _MAX_TOGETHER]
            for group in groups.values()
            for place in range(0, len(group), _MAX_TOGETHER)
        )
        for part in parts:
            # A slow receiver must not outlast the lease.
            if self._now() - now > timedelta(seconds=EVERY_S):
                return
            if error := self._deliver(part):
                if not self._failures:
                    names = " ".join(each.id for each in part[:_MAX_NAMED])
                    _log.warning("%d alerts (%s) will be sent again: %s", len(part), names, error)
                # Half an interval less, as an evaluation may come a little early.
                wait_s = min(_LONGEST_WAIT_S, EVERY_S * (2.0**self._failures - 0.5))
                self._failures, self._retry_at = min(self._failures + 1, 16), now + timedelta(seconds=wait_s)
                return
            self._failures, self._retry_at = 0, None
            self._away_waiting = [each for each in self._away_waiting if each not in part]
            if stored := [each for each in part if each.rule != DATABASE_AWAY]:
                with suppress(StoreUnavailable), self._connect() as connection:  # else they are sent again
                    table.note_delivered(connection, stored)

    def _deliver(self, alerts: Sequence[AlertView]) -> DeliveryFailed | None:
        """Send alerts of one rule to every channel that has not accepted them; return why one does not."""
        failed: DeliveryFailed | None = None
        for channel in self._channels:
            fresh = [each for each in alerts if (channel, each.id, each.state) not in self._accepted]
            try:
                if fresh:
                    channel.send(fresh)
            except DeliveryFailed as error:
                failed = error
            else:
                self._accepted.update((channel, each.id, each.state) for each in fresh)
        if failed is None:
            self._accepted.clear()
        return failed

    def _note_away(self, now: datetime, error: StoreUnavailable) -> None:
        """Report once that the database is unavailable, after the time that makes a problem an alert."""
        away = self._away
        if away is None or (away.delivered is None and away.since_at > now):  # or the clock was set back
            _log.warning("The alerts cannot be evaluated: %s", error)
            away = self._away = AlertView(
                id=f"{DATABASE_AWAY}-{int(now.timestamp())}",
                rule=DATABASE_AWAY,
                subject="database",
                device=None,
                severity=AlertSeverity.CRITICAL.value,
                sentence="The session log's database cannot be reached; edges keep what they write in their spools.",
                value=None,
                threshold=None,
                since_at=now,
                last_at=now,
                cleared_at=None,
                delivered=None,
            )
        if self._other_holds:  # it reports that: one message is enough
            return
        if away.delivered is None and now - away.since_at >= timedelta(seconds=self._settings.hold_s):
            self._away_waiting.append(away)
            self._away = replace(away, delivered=away.state)
        self._send([], now)

    def _note_back(self, now: datetime) -> None:
        if self._away is not None and self._away.delivered is not None:
            sentence = "The session log's database can be reached again."
            self._away_waiting.append(replace(self._away, cleared_at=now, sentence=sentence))
        self._away = None

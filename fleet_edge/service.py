"""Edge service: assemble the parts, run them, and shut them down in order."""

import logging
import math
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from threading import Event, Lock
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import SQLAlchemyError

from fleet_common.mqtt.errors import LinkError, PublishRejected
from fleet_common.mqtt.link import Link, PublishOutcome, Will
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.mqtt.tls import certificate_end
from fleet_edge.answers.answers import Responder
from fleet_edge.answers.recorder import Recorder
from fleet_edge.assembly import assemble
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.guard import KeptStandings
from fleet_edge.intake import Intake, leave_opens
from fleet_edge.jobs import EdgeJobs, JobSettings
from fleet_edge.observer import EdgeObserver, SelfWatch
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.session_log.alerts.evaluator import RunningAlerts
from fleet_edge.session_log.alerts.settings import load_alert_settings
from fleet_edge.session_log.database import Store, transaction
from fleet_edge.session_log.engine import CLOCKS_DIFFER, database_now
from fleet_edge.session_log.errors import StoreError, StoreRefused, StoreUnavailable
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.queries import read_edges
from fleet_edge.session_log.records import LeaveReason
from fleet_edge.session_log.spool import Spool
from fleet_edge.session_log.views import EdgeView
from fleet_edge.session_log.writer import LogWriter
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import HANDLES, MAX_SESSIONS, SessionTable
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import TargetInfo, Verifier
from schemas.control import ChatFormat, EdgeState, Presence, encode_json
from schemas.names import VERSION
from schemas.reasons import EndReason
from schemas.topics import Topic, build

if TYPE_CHECKING:
    from fleet_common.metrics_server import MetricsServer


@dataclass(slots=True)
class Availability:
    """Distinguishes a short absence of the target model, in which sessions wait, from one in which they migrate."""

    patience_s: float
    clock: Callable[[], float]
    _since: float | None = None
    _reported: bool = False

    def changes(self, reason: str) -> bool:
        """Decide whether to notify devices that the model is away, or back; `reason` is empty if it is there."""
        if not reason:
            self._since = None
        elif self._since is None:
            self._since = self.clock()
        away = self._since is not None and self.clock() - self._since >= self.patience_s
        if away == self._reported or (reason and not away):
            return False
        self._reported = away
        return True


@dataclass(slots=True)
class LifeEvents:
    """Logs lifecycle events: start and end, changes since the last run, loss of broker and database. Thread-safe."""

    recorder: Recorder
    software: str
    target: TargetInfo
    clock: Callable[[], float]
    _lost_at: float | None = None
    _ended: bool = False
    _lock: Lock = field(default_factory=Lock)

    def started(self, before: EdgeView | None) -> None:
        """Log the start, and differences from the last run as known to the log (None if unknown)."""
        if before is not None:
            self._compare(before)
        self._edge("started", f"The edge takes sessions: release {self.software}, target model {self.target.name}.")

    def draining(self, sessions: int) -> None:
        self._edge("draining", f"The edge is draining and takes no new sessions; {sessions} are open.")

    def stopped(self, handed_over: int) -> None:
        self._ended = True
        self._edge("stopped", f"The edge has stopped; {handed_over} sessions continue at other edges.")

    def link(self, *, up: bool, why: str = "") -> None:
        if self._ended:
            return
        with self._lock:
            since = self._lost_at
            self._lost_at = None if up else since or self.clock()
        if not up and since is None:
            sentence = f"The edge has lost the broker; no device can reach it. {why}".rstrip()
            self.note(EventKind.BROKER, "connection-lost", sentence)
        elif up and since is not None:
            sentence = f"The edge has reached the broker again, after {self.clock() - since:.1f} s."
            self.note(EventKind.BROKER, "connection-back", sentence)

    def _compare(self, before: EdgeView) -> None:
        if before.presence not in (None, Presence.OFFLINE.value):
            sentence = (
                "The edge's last run ended unexpectedly: it was killed, or its machine went down. It was last "
                f"heard of at {before.load_at or before.seen_at:%Y-%m-%d %H:%M:%S} UTC."
            )
            self._edge("ended-unexpectedly", sentence)
        if before.software not in (None, self.software):
            sentence = f"The edge runs release {self.software}; before it ran {before.software}."
            self._edge("software-changed", sentence)
        target = self.target.target_id.hex()
        if before.target_id not in (None, target):
            earlier = f"{before.target} ({before.target_id})"
            sentence = f"The edge verifies with {self.target.name} ({target}); before with {earlier}."
            self._edge("target-changed", sentence)

    def _edge(self, code: str, sentence: str) -> None:
        self.note(EventKind.EDGE, code, sentence)

    def note(self, kind: EventKind, code: str, sentence: str) -> None:
        self.recorder.events.note(kind, code, sentence)


def migrate_sessions(sessions: SessionTable, *, answers: Responder, scheduler: Scheduler) -> int:
    """Forget all sessions, log that they migrate, and return their number. Their devices resume elsewhere.

    A finished session does not migrate, even if its Close is still to come: nobody would open it again, and the log
    would report it as lost.
    """
    handed_over = 0
    for session in sessions:
        reason = _known_end(session)
        if reason is None:
            handed_over += 1
            answers.record_leave(session, LeaveReason.HANDED_OVER)
        else:
            answers.record_end(session, reason)
        sessions.remove(session)
        scheduler.forget(session)
    return handed_over


def _known_end(session: EdgeSession) -> EndReason | None:
    if not session.finished:
        return None
    if session.tokens[-1] in session.limits.end_tokens:
        return EndReason.STOP
    return EndReason.LENGTH if session.committed >= session.limits.max_new_tokens else EndReason.FAILED


_log = logging.getLogger(__name__)

# Interval of checking the stop flag when nothing arrives.
_IDLE_S: Final = 0.1
_CLOSE_S: Final = 5.0
_WELCOME_S: Final = 5.0


@dataclass(slots=True)
class EdgeService:
    settings: EdgeSettings
    verifier: Verifier
    make_link: Callable[[LinkSettings], Link] = PahoLink
    draft_verifier: Verifier | None = None
    chat_format: ChatFormat | None = None
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    orchestrator: Orchestrator = field(init=False)
    writer: LogWriter = field(init=False)
    metrics: "MetricsServer | None" = field(default=None, init=False)
    _link: Link = field(init=False)
    _standings: KeptStandings = field(init=False)
    _store: Store = field(init=False)
    _jobs: EdgeJobs = field(init=False)
    _alerts: RunningAlerts = field(init=False)
    _since: datetime = field(init=False)
    _availability: Availability = field(init=False)
    _life: LifeEvents = field(init=False)
    _watch: SelfWatch = field(init=False)
    _presence: Presence = Presence.ONLINE
    _announcing: Lock = field(default_factory=Lock)
    _answered: Event = field(default_factory=Event)  # by the broker, to the first state
    _rejected: PublishRejected | None = None

    def start(self) -> None:
        """Open the database, connect, and announce that this edge is online.

        A database that is away is opened later by the writer; until then records wait in the spool. Raises
        `SettingsError`, `StoreError`, `ConnectFailed`, `MetricsError`, `HttpServerError`, or `PublishRejected` if the
        broker does not let this edge publish in its fleet.
        """
        settings = self.settings
        alerts = load_alert_settings(settings.alerts)
        self._since = self.now()
        self._store = Store(settings.db)
        try:
            try:
                self._store.open()
            except StoreRefused:
                raise
            except StoreUnavailable:
                pass  # the writer reports it with its first record, and opens it later
            spool = Spool(settings.spool)
            before = self._last_run() if spool.empty else None  # otherwise its end may still be in the spool
            self.writer = LogWriter(self._store, spool).start()
        except BaseException:
            self._store.close()
            raise
        target = self.verifier.info
        if not target.batch_invariant:
            _log.warning(
                "Seeded requests may differ from run to run, because the rows of %s (%s) depend on the batch; engines "
                "whose rows do not are in docs/engines.md.",
                target.name,
                target.runs_on,
            )
        will = Will(self._state_topic, encode_json(self._state(Presence.OFFLINE)))
        self._link = self.make_link(settings.broker.link(settings.fleet, settings.edge, will=will))
        self.orchestrator = assemble(
            settings,
            verifier=self.verifier,
            draft_verifier=self.draft_verifier,
            link=self._link,
            sink=self.writer,
            clock=self.clock,
            now=self.now,
            first_handle=secrets.randbelow(HANDLES),
        )
        self._standings = KeptStandings(self.orchestrator.handlers.guard, settings.spool / "standings.json", self.now)
        self._standings.read()
        self._availability = Availability(settings.remote.away_s, self.clock)
        call, handlers = self.orchestrator.inbox.put, self.orchestrator.handlers
        self._jobs = EdgeJobs(
            self._store,
            expire_leases=partial(call, handlers.expire),
            flush_progress=partial(call, handlers.flush),
            flush_log=self._flush_log,
            apply_quarantines=lambda quarantines: call(partial(handlers.apply_quarantines, quarantines)),
            evaluate_alerts=self._evaluate_alerts,
            tell=handlers.recorder.events.note,
            settings=JobSettings(
                lease_every_s=min(2.0, settings.lease_s / 4), sessions_days=settings.keep_sessions_days
            ),
            now=self.now,
        )
        recorder = handlers.recorder
        self._life = LifeEvents(recorder, VERSION, self.verifier.info, self.clock)
        self._watch = SelfWatch(self.observer(), recorder, MAX_SESSIONS, self.clock, self.now)
        self.writer.tell = partial(self._life.note, EventKind.DATABASE)
        self._link.on_connection(self._connection)
        try:
            self._link.start(timeout_s=10.0)
            self._wait_for_welcome()
            self._serve_metrics()
        except BaseException:
            self._link.stop()
            self.writer.close(_CLOSE_S)
            self._store.close()
            raise
        self._alerts = RunningAlerts(
            lambda: transaction(self._store.engine), alerts, holder=settings.edge, now=self.now
        )
        self._jobs.start()
        self._life.started(before)

    def run(
        self,
        stop: Event,
        *,
        drain: Event | None = None,
        whole_drain: Event | None = None,
        on_step: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
        on_drain: Callable[[int], None] = lambda _sessions: None,
    ) -> None:
        """Verify until `stop`, or after `drain` until no session is open or `drain_s` has passed; see `Edge.run`.

        While `whole_drain` is set, there is no limit of time, and `on_end` waits.
        """
        draining, deadline = False, math.inf
        while not stop.is_set():
            self.orchestrator.step(wait_s=_IDLE_S)
            on_step()
            if drain is None or not drain.is_set():
                self._look_for_target()
                continue
            if deadline == math.inf and not (whole_drain is not None and whole_drain.is_set()):
                deadline = self.clock() + self.settings.drain_s
                on_end()
            if not draining:
                draining = True
                self._take_no_opens()
                self._announce(Presence.DRAINING)
                _log.info("Draining: %d open sessions.", len(self.orchestrator.sessions))
                self._life.draining(len(self.orchestrator.sessions))
                on_drain(len(self.orchestrator.sessions))
            if not len(self.orchestrator.sessions) or self.clock() >= deadline:
                break
        if deadline == math.inf:
            on_end()

    def stop(self) -> int:
        """Migrate open sessions, publish the last state, write the log to its end, and release everything.

        Returns the number of sessions that migrate.
        """
        orchestrator = self.orchestrator
        if self.metrics is not None:
            self.metrics.stop()
        self._take_no_opens()
        orchestrator.receive_last(wait_s=_IDLE_S)
        left = migrate_sessions(orchestrator.sessions, answers=orchestrator.answers, scheduler=orchestrator.scheduler)
        if left:
            _log.info("Migrating %d open sessions to other edges.", left)
        self._life.stopped(left)
        try:
            self._announce(Presence.OFFLINE)
        finally:
            self._link.stop()
            orchestrator.handlers.grammars.close()
            self._standings.write()
            orchestrator.handlers.recorder.flush()
            if not self.writer.close(_CLOSE_S):
                _log.error("Some records of the session log could be neither written nor spooled.")
            self._jobs.stop()  # last: a hanging job must not delay the devices or the log
            self._alerts.close()
            self._store.close()
        return left

    def observer(self) -> EdgeObserver:
        """Return an observer for other threads; only once started."""
        return EdgeObserver(
            fleet=self.settings.fleet,
            edge=self.settings.edge,
            orchestrator=self.orchestrator,
            writer=self.writer,
            link=self._link,
        )

    def _serve_metrics(self) -> None:
        settings = self.settings.metrics
        if settings.address is None:
            return
        from fleet_common.metrics_server import MetricsServer  # noqa: PLC0415 - most edges need no HTTP server

        self.metrics = MetricsServer(settings.address, self.observer().pages(), token=settings.token())
        self.metrics.start()
        _log.info("Metrics are at %s/metrics.", self.metrics.address)

    def _look_for_target(self) -> None:
        """Be offline to devices while the target model has been away for long."""
        orchestrator = self.orchestrator
        reason = orchestrator.scheduler.away()
        if not self._availability.changes(reason):
            return
        orchestrator.handlers.away = reason
        recorder = orchestrator.handlers.recorder
        if reason:
            leave_opens(self._link, fleet=self.settings.fleet)
            left = migrate_sessions(
                orchestrator.sessions, answers=orchestrator.answers, scheduler=orchestrator.scheduler
            )
            _log.error("The target model is unavailable; migrating %d open sessions to other edges: %s", left, reason)
            recorder.events.note(EventKind.TARGET, "target-away", reason)
            self._announce(Presence.OFFLINE)
        else:
            _log.warning("The target model is available again.")
            recorder.events.note(EventKind.TARGET, "target-back", "The target model is available again.")
            Intake(orchestrator.inbox, self.clock).take_opens(self._link, fleet=self.settings.fleet)
            self._announce(Presence.ONLINE)

    def _wait_for_welcome(self) -> None:
        """Wait for the broker's answer to our state; without permission to publish, devices cannot use this edge."""
        if self._answered.wait(_WELCOME_S) and self._rejected is not None:  # the answer of a slow one is logged later
            raise self._rejected

    def _take_outcome(self, outcome: PublishOutcome) -> None:
        """Record the broker's answer to our state. Called on the link's thread."""
        self._rejected = None if outcome.accepted else PublishRejected(topic=outcome.topic, reason=outcome.reason)
        if self._rejected is not None and self._answered.is_set():
            _log.error("The devices do not receive this edge's state: %s", self._rejected)
            self._life.note(EventKind.BROKER, "state-rejected", str(self._rejected))
        self._answered.set()

    def _connection(self, up: bool) -> None:
        """Record that the connection is up or lost. Called on the link's thread."""
        self._life.link(up=up, why=str(self._link.failure or ""))
        if up:  # publish again: the broker has published our last will meanwhile
            self._announce()

    def _evaluate_alerts(self) -> None:
        """Evaluate, unless by this machine's clock all others would be silent: another edge does then."""
        with suppress(StoreError, SQLAlchemyError), self._store.engine.connect() as connection:
            at = database_now(connection)
            if at is not None and abs(self.now() - at) > CLOCKS_DIFFER:
                return
        self._alerts.step()

    def _flush_log(self) -> None:
        self.orchestrator.handlers.recorder.flush()
        self._standings.write()
        self._watch.observe()

    def _last_run(self) -> EdgeView | None:
        try:
            with self._store.engine.connect() as connection:
                return next(iter(read_edges(connection, now=self.now(), only=self.settings.edge)), None)
        except (StoreError, SQLAlchemyError):
            return None

    @property
    def _state_topic(self) -> str:
        return build(Topic.EDGE_STATE, fleet=self.settings.fleet, edge=self.settings.edge)

    def _state(self, presence: Presence) -> EdgeState:
        return EdgeState(
            presence=presence,
            software=VERSION,
            edge=self.settings.edge,
            target=self.verifier.info.name,
            target_id=self.verifier.info.target_id.hex(),
            vocabulary=str(self.verifier.info.vocabulary),
            since=self._since,
            certificate_until=certificate_end(self.settings.broker.certificate),
            sessions_per_device=self.settings.max_sessions_per_device,
            chat_format=self.chat_format and self.chat_format.name,
        )

    def _take_no_opens(self) -> None:
        self.orchestrator.handlers.draining = True  # for Opens that have arrived already
        leave_opens(self._link, fleet=self.settings.fleet)

    def _announce(self, presence: Presence | None = None) -> None:
        """Publish the retained state. Called on the link's thread too, after a reconnect."""
        with self._announcing:  # otherwise an older state could be published last
            self._presence = presence or self._presence
            state = self._state(self._presence)
            self.orchestrator.handlers.recorder.sightings.own(state)
            try:
                if self.chat_format is not None and not self._presence.gone:
                    # Before the state, which names it.
                    self._link.publish(
                        build(Topic.EDGE_CHAT, fleet=self.settings.fleet, edge=self.settings.edge),
                        encode_json(self.chat_format),
                        retain=True,
                        content_type="application/json",
                    )
                self._link.publish(
                    self._state_topic,
                    encode_json(state),
                    retain=True,
                    content_type="application/json",
                    on_outcome=self._take_outcome,
                )
            except LinkError as error:
                _log.warning(
                    "This edge's state could not be published; it is published again after the next reconnect: %s",
                    error,
                )

"""Metrics of an edge: what it counts over all sessions, and the catalogue of all names with meaning and labels.

Counting is a few additions per answer and step, on the orchestrator's thread; only replies take a lock, since other
threads send them too. A reader on another thread may see values one answer old.

Names follow those that vLLM and llama.cpp share, with a prefix of our own. No metric has a label for a device or a
session: those are in the session log.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Final

from fleet_common.metrics import PREFIX, Histogram, Metric, MetricKind
from fleet_edge.session_log.views import CONNECTED, MachineState, device_state, is_active
from fleet_edge.sessions.drafts import DraftResult
from fleet_edge.sessions.machine import EdgeSession
from schemas.control import Presence
from schemas.fields import MAX_DRAFT
from schemas.reasons import EndReason, FaultCode, RefusalCode

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SESSIONS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_TOKENS: Final = (1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0)

_MAX_DEVICES: Final = 65_536
"""Bound on devices, so that publishers of states cannot fill the memory."""

_PROBE_EVERY_S: Final = 1.0

DRAFT, EDGE_ONLY = "draft", "edge-only"
"""Plans as an edge can distinguish them: tokens of judged drafts, and of edge-only decoding."""


def _none_of(codes: Iterable[StrEnum]) -> Counter[str]:
    """Start all possible counters at 0: Prometheus sees no increase when a series first appears."""
    return Counter({code.value: 0 for code in codes})


def _seconds() -> Histogram:
    return Histogram(_SECONDS)


@dataclass(slots=True)
class _Progress:
    """Progress of an open session, for token times.

    `since` is the start of the wait for the next token (monotonic seconds), `committed` and `reused` the tokens until
    then. `begun`: it has a token since it was opened here.
    """

    since: float
    committed: int
    reused: int = 0
    begun: bool = False


@dataclass(slots=True)
class Figures:
    """What an edge has counted since it started; counters only rise. `CATALOGUE` describes the metrics.

    `accepted_lengths` has the number of drafts by accepted tokens, `last_sign` when each device was last heard
    (monotonic seconds).
    """

    clock: Callable[[], float]
    drafts: int = 0
    draft_tokens: int = 0
    tested: int = 0
    accepted: int = 0
    accepted_lengths: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFT + 1))
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: Counter[str] = field(default_factory=lambda: Counter({DRAFT: 0, EDGE_ONLY: 0}))
    ended: Counter[str] = field(default_factory=lambda: _none_of(EndReason))
    refusals: Counter[str] = field(default_factory=lambda: _none_of(RefusalCode))
    faults: Counter[str] = field(default_factory=lambda: _none_of(FaultCode))
    uplink_bytes: int = 0
    downlink_bytes: Counter[str] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=_seconds)
    inter_token: Histogram = field(default_factory=_seconds)
    queue_time: Histogram = field(default_factory=_seconds)
    step: Histogram = field(default_factory=_seconds)
    batch_sessions: Histogram = field(default_factory=lambda: Histogram(_SESSIONS))
    batch_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    link_round_trip: Histogram = field(default_factory=_seconds)
    presence: dict[str, Presence] = field(default_factory=dict)
    last_sign: dict[str, float] = field(default_factory=dict)
    _open: dict[int, _Progress] = field(default_factory=dict)  # by handle
    _replies: threading.Lock = field(default_factory=threading.Lock)
    _probe_at: float = 0.0

    # Sessions

    def on_open(self, session: EdgeSession, *, resumed: bool) -> None:
        """Count a session that begins here, or goes on here."""
        self._open[session.handle] = _Progress(self.clock(), session.committed)
        if not resumed:
            self.prompt_tokens += session.prompt_length

    def on_verdict(self, session: EdgeSession, result: DraftResult) -> None:
        drafted = len(result.arrived.draft.tokens)
        if drafted:
            self.drafts += 1
            self.draft_tokens += drafted
            self.tested += result.tested
            self.accepted += result.accepted
            self.accepted_lengths[min(result.accepted, MAX_DRAFT)] += 1
        self.queue_time.observe(result.queue_ms / 1e3)
        self._add_tokens(session, DRAFT)

    def on_decoded(self, session: EdgeSession, result: DraftResult) -> None:
        """Count tokens of edge-only decoding that were sent, or are about to be."""
        self.queue_time.observe(result.queue_ms / 1e3)
        self._add_tokens(session, EDGE_ONLY)

    def on_close(self, session: EdgeSession, reason: str) -> None:
        self.ended[reason] += 1
        self.on_leave(session)

    def on_leave(self, session: EdgeSession) -> None:
        progress = self._open.pop(session.handle, None)
        if progress is not None:  # corrections that came after the last verdict
            self.generation_tokens[DRAFT] += max(0, session.committed - progress.committed)

    def _add_tokens(self, session: EdgeSession, plan: str) -> None:
        """Count the new tokens of a session since the last call, and their time."""
        progress = self._open.get(session.handle)
        if progress is None:
            return
        if (reused := session.counters.reused_tokens) > progress.reused:
            self.cached_tokens += reused - progress.reused
            progress.reused = reused
        new = session.committed - progress.committed
        if new <= 0:
            return
        now = self.clock()
        self.generation_tokens[plan] += new
        if progress.begun:
            self.inter_token.observe((now - progress.since) / new, new)
        else:
            self.first_token.observe(now - progress.since)
        progress.since, progress.committed, progress.begun = now, session.committed, True

    # Steps

    def on_step(self, seconds: float, *, sessions: int, tokens: int, prefilled: int) -> None:
        self.step.observe(seconds)
        self.batch_tokens.observe(tokens)
        self.prefill_tokens += prefilled
        if sessions:
            self.batch_sessions.observe(sessions)

    # Messages

    def on_reply(self, size: int) -> None:
        """Count a reply to a device. From any thread."""
        with self._replies:
            self.downlink_bytes["reply"] += size

    def heard(self, device: str, presence: Presence | None = None) -> None:
        """Record a sign of life from a device, with its presence if the message was its state."""
        if presence is not None and (device in self.presence or len(self.presence) < _MAX_DEVICES):
            self.presence[device] = presence
        if device in self.presence:
            self.last_sign[device] = self.clock()

    def device_states(self, quarantined: Collection[str]) -> Counter[MachineState]:
        """Count the devices that have published their presence, by state. From any thread."""
        return Counter(
            device_state(presence, quarantined=name in quarantined) for name, presence in dict(self.presence).items()
        )

    def active_devices(self, quarantined: Collection[str]) -> int:
        """Count the connected devices that were heard lately. From any thread."""
        now, signs = self.clock(), dict(self.last_sign)
        return sum(
            is_active(timedelta(seconds=now - signs[name]))
            for name, presence in dict(self.presence).items()
            # Another thread may just have added a device that has no sign yet.
            if name in signs and device_state(presence, quarantined=name in quarantined) in CONNECTED
        )

    def probe(self) -> "Callable[[object], None] | None":
        """Return a callback that measures the link's round trip; None more often than once a second."""
        began = self.clock()
        if began < self._probe_at:
            return None
        self._probe_at = began + _PROBE_EVERY_S
        return lambda _outcome: self.link_round_trip.observe(self.clock() - began)


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(PREFIX + name, MetricKind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(PREFIX + name, MetricKind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str) -> Metric:
    return Metric(PREFIX + name, MetricKind.HISTOGRAM, meaning)


# Drafts

NUM_DRAFTS = _counter("spec_decode_num_drafts_total", "Verified drafts with at least one token.")
NUM_DRAFT_TOKENS = _counter("spec_decode_num_draft_tokens_total", "Draft tokens of these drafts.")
NUM_TESTED = _counter("spec_decode_num_tested_tokens_total", "Draft tokens that were accepted or rejected.")
NUM_ACCEPTED = _counter("spec_decode_num_accepted_tokens_total", "Draft tokens that were accepted.")
ACCEPTED_PER_POS = _counter(
    "spec_decode_num_accepted_tokens_per_pos_total", "Accepted draft tokens by position in the draft.", "position"
)

# Sessions

RUNNING = _gauge("num_requests_running", "Open sessions.")
WAITING = _gauge("num_requests_waiting", "Open sessions that wait for a step.")
SUCCESS = _counter("request_success_total", "Ended sessions, by reason.", "reason")
REFUSALS = _counter("refusals_total", "Refused Opens, by code.", "code")
FAULTS = _counter("faults_total", "Messages of devices that could not be served, by code.", "code")
DROPPED = _counter("dropped_messages_total", "Messages dropped because the inbox was full.")
DEVICES = _gauge("devices", "Devices known to this edge, by state of their connection.", "state")
DEVICES_ACTIVE = _gauge("devices_active", "Connected devices that sent a message within five minutes.")

# Tokens

PROMPT_TOKENS = _counter("prompt_tokens_total", "Prompt tokens of new sessions.")
CACHED_TOKENS = _counter("cached_prompt_tokens_total", "Tokens of prompts and resumed sequences reused from the cache.")
PREFILL_TOKENS = _counter("prefill_tokens_total", "Tokens of prompts and resumed sequences computed.")
GENERATION_TOKENS = _counter("generation_tokens_total", "Committed tokens, drafted or edge-only.", "plan")

# Times

FIRST_TOKEN = _histogram("time_to_first_token_seconds", "From the grant of a session to its first verified token.")
INTER_TOKEN = _histogram("inter_token_latency_seconds", "Mean time between tokens of two successive verdicts.")
QUEUE_TIME = _histogram("request_queue_time_seconds", "From a draft's arrival to its step, without prefill.")
STEP = _histogram("step_seconds", "Time of a forward pass and the verification of its drafts.")
BATCH_SESSIONS = _histogram("batch_sessions", "Sessions verified in a forward pass.")
BATCH_TOKENS = _histogram("batch_tokens", "New tokens in a forward pass.")
LINK_ROUND_TRIP = _histogram(
    "link_round_trip_seconds", "From publishing a verdict to the broker's acknowledgement, sampled once a second."
)

# Resources

KV_USAGE = _gauge("kv_cache_usage_ratio", "Share of KV memory used by open sessions.")
KV_RETAINED = _gauge("kv_cache_retained_ratio", "Share of KV memory kept from ended sessions, freed when needed.")
UPLINK_BYTES = _counter("uplink_bytes_total", "Payload bytes received from devices.")
DOWNLINK_BYTES = _counter("downlink_bytes_total", "Payload bytes sent to devices, by content.", "form")
LINK_EVENTS = _counter("link_events_total", "Events of the connection to the broker.", "event")
BROKER_UP = _gauge("broker_connected", "Whether the broker answers (1) or not (0).")
TARGET_UP = _gauge("target_available", "Whether the large model is available (1) or not (0).")
DRAINING = _gauge("draining", "Whether this edge is draining (1).")
STORE_RECORDS = _counter("store_records_total", "Records of the session log, by outcome.", "outcome")
STORE_QUEUE = _gauge("store_queue_records", "Records in memory waiting to be written.")
SPOOL_RECORDS = _gauge("store_spool_records", "Records spooled since the start.")
SPOOL_BYTES = _gauge("store_spool_bytes", "Size of the spool.")
STORE_LAG = _gauge("store_lag_seconds", "Time since the session log was last complete.")
INFO = _gauge("build_info", "Software of this edge; the value is always 1.", "version", "fleet", "edge", "target")

CATALOGUE: Final[tuple[Metric, ...]] = tuple(each for each in list(globals().values()) if isinstance(each, Metric))
"""All metrics, in the order above."""

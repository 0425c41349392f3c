"""Columns of the session log's reports on the command line, the dashboard and in CSV."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fleet_admin.columns import Column, Kind, plain, shown
from fleet_edge.store.views import CONNECTED
from schemas.names import model_name

if TYPE_CHECKING:
    from fleet_admin.diagnosis import Conclusion, PartTime
    from fleet_admin.steering import DeviceSettingsView
    from fleet_admin.steering.rollout import UpdateView
    from fleet_edge.alerts.rules import AlertGroup
    from fleet_edge.store.views import (
        AlertView,
        AuditView,
        CommandView,
        DeviceView,
        EdgeView,
        EventView,
        RoundView,
        SegmentView,
        SessionView,
        Tally,
    )

T = TypeVar("T")

_DAY: Final = timedelta(days=1)


# Devices and edges


def device_columns(now: datetime, *, past: bool = False) -> "list[Column[DeviceView]]":
    """Return the columns of devices; `now` is aware.

    What a device that is away reported last is left out, or marked as `past`.
    """

    def reported(name: str) -> "Callable[[DeviceView], Any]":
        return lambda row: getattr(row, name) if past or row.connected else None

    last = "last " if past else ""
    return [
        Column("device", lambda row: row.device, rank=0),
        Column("state", lambda row: row.state.value, "state", rank=0),
        Column("since", lambda row: row.state_since, "ago", rank=2),
        Column("last active", lambda row: row.last_sign_at, "ago", key="seen", rank=1,
               meaning="Its latest message; an idle device sends none, and stays online."),
        Column("draft model", lambda row: model_name(row.draft_model, row.quantization), key="draft", rank=1),
        Column("tokens today", lambda row: row.tokens_today, "count", rank=1),
        Column("acceptance 24 h", lambda row: row.acceptance_24h, "percent", key="acceptance_24h", rank=1),
        Column(f"{last}round trip", reported("round_trip_ms"), "ms", key="round_trip", rank=1,
               meaning="From a draft to its verdict."),
        Column("edge", lambda row: row.last_edge, rank=2, meaning="The edge of its latest session."),
        Column("release", lambda row: row.software, rank=2, meaning="The version that the device reports."),
        Column("acceptance 1 h", lambda row: row.acceptance_1h, "percent", key="acceptance_1h", rank=2),
        Column(f"{last}draft time per token", reported("draft_ms_per_token"), "ms", key="draft_time", rank=3,
               meaning="Of its draft model."),
        Column(f"{last}plan", reported("plan"), key="plan", rank=2),
        Column("reason of the plan", reported("plan_reason"), "sentence", key="plan_reason", rank=3),
        Column("throttled", reported("throttled"), "sentence", rank=2,
               meaning="Its processor is slowed down, so its draft model rests."),
        Column(f"{last}temperature, °C", reported("temperature_c"), "figure", key="temperature", rank=3,
               meaning="Of its processor."),
        Column(f"{last}joules per token", reported("joules_per_token"), "ratio", key="joules", rank=3,
               meaning="By the device's meter or figures, since it started."),
        Column("sessions", lambda row: row.sessions, "count", rank=2),
        Column("certificate", lambda row: days_left(row.certificate_until, now), "days", rank=2, meaning="Days left."),
        Column("certificate until", lambda row: row.certificate_until, "moment", rank=3),
        Column("labels", lambda row: " ".join(row.labels) or None, rank=2),
        Column("last verdict", lambda row: row.last_verdict_at, "ago", key="verdict", rank=3),
        Column(f"{last}acceptance reported", reported("told_acceptance"), "percent", key="told", rank=3,
               meaning="By the device, since it started."),
        Column("telemetry", lambda row: row.telemetry_at, "ago", rank=3),
        Column("first seen", lambda row: row.first_seen_at, "moment", rank=3),
    ]  # fmt: skip


def edge_columns(now: datetime) -> "list[Column[EdgeView]]":
    """Return the columns of edges; `now` is aware."""

    def loaded(name: str) -> "Callable[[EdgeView], float | None]":
        # The last load of a silent or offline edge is outdated.
        return lambda row: getattr(row, name) if row.state in CONNECTED else None

    def free(row: "EdgeView") -> int | None:
        return 0 if row.state.value == "draining" else row.free_sessions if row.state.value == "online" else None

    return [
        Column("edge", lambda row: row.edge, rank=0),
        Column("state", lambda row: row.state.value, "state", rank=0),
        Column("since", lambda row: row.state_since, "ago", rank=2),
        Column("open sessions", loaded("open_sessions"), "count", key="open", rank=1),
        Column("free sessions", free, "count", key="free", rank=1, meaning="Sessions that the edge can still open."),
        Column("tokens/s", loaded("tokens_per_s"), "figure", key="tokens", rank=1),
        Column("sessions per step", loaded("batch_sessions"), "figure", key="batch", rank=1,
               meaning="Sessions verified in one step, on average."),
        Column("step", loaded("step_ms"), "ms", rank=1),
        Column("queue", loaded("queue_ms"), "ms", rank=1, meaning="Mean wait of a draft for its step."),
        Column("KV use", loaded("kv_usage"), "percent", key="kv", rank=1,
               meaning="Of the memory for keys and values."),
        Column("records waiting", lambda row: row.spooled_records, "count", key="spool", rank=1,
               meaning="Of the session log, on the edge's disk, because the database did not take them."),
        Column("release", lambda row: row.software, rank=2),
        Column("certificate", lambda row: days_left(row.certificate_until, now), "days", rank=2, meaning="Days left."),
        Column("target model", lambda row: row.target, key="target", rank=2),
        Column("target identity", lambda row: row.target_id, key="target_id", rank=2,
               meaning="Of what the model computes: a request is continued only by an edge with the same."),
        Column("last seen", lambda row: row.seen_at, "ago", key="seen", rank=2),
        Column("load reported", lambda row: row.load_at, "ago", key="load", rank=3),
        Column("first seen", lambda row: row.first_seen_at, "moment", rank=3),
    ]  # fmt: skip


def days_left(until: datetime | None, now: datetime) -> int | None:
    """Return the whole days until a certificate expires, as `fleet broker list` does; negative afterwards."""
    return None if until is None else (until - now) // _DAY


# Sessions and events


RUNNING: Final = "running"
"""End of a session that has not ended."""


def _why(session: "SessionView") -> str | None:
    return session.end_sentence and f"{session.end_sentence} ({session.end_code})"


def _prompt_under_way(session: "SessionView") -> str | None:
    """Return how much of the prompt of a running session is computed, until its first token."""
    if session.reason is not None or session.counted.tokens or not session.prompt_tokens:
        return None
    computed = session.counted.prefill_tokens + session.counted.reused_tokens
    return f"{min(computed, session.prompt_tokens):,} of {session.prompt_tokens:,}"


SESSIONS: "Final[list[Column[SessionView]]]" = [
    Column("session", lambda row: row.session, "id", rank=0),
    Column("device", lambda row: row.device, rank=0),
    Column("end", lambda row: row.reason or RUNNING, "state", key="reason", rank=0),
    Column("tokens", lambda row: row.counted.tokens, "count", rank=1),
    Column("prompt", _prompt_under_way, rank=1,
           meaning="Tokens of the prompt of a running session that are computed, until its first token."),
    Column("opened", lambda row: row.opened_at, "moment", rank=1),
    Column("application", lambda row: row.app, key="app", rank=2),
    Column("edge", lambda row: row.edge, rank=2),
    Column("acceptance", lambda row: row.counted.acceptance, "percent", rank=1),
    Column("tokens/s", lambda row: row.counted.tokens_per_s, "figure", key="speed", rank=1),
    Column("unverified", lambda row: row.device_unverified or None, "count", rank=1,
           meaning="Tokens that the device wrote without an edge."),
    Column("first token", lambda row: row.first_token_ms, "ms", rank=2),
    Column("gap p95", lambda row: row.gap_p95_ms, "ms", rank=2,
           meaning="19 of 20 tokens came no later than this after the one before."),
    Column("why", _why, "sentence", rank=0, meaning="It ended so, where that is more than its end says."),
    Column("mode", lambda row: row.mode, rank=2),
    Column("draft model", lambda row: model_name(row.draft_model, row.quantization), key="draft", rank=2),
    Column("prompt tokens", lambda row: row.prompt_tokens, "count", rank=3),
    Column("prefilled", lambda row: row.counted.prefill_tokens, "count", rank=3),
    Column("reused", lambda row: row.counted.reused_tokens, "count", rank=3),
    Column("edge-only", lambda row: row.counted.edge_only, "count", rank=3, meaning="Tokens of edge-only decoding."),
    Column("speculated", lambda row: row.counted.guessed, "count", rank=3,
           meaning="Tokens that the edge proposed in edge-only decoding, by n-grams or its draft model."),
    Column("speculated and accepted", lambda row: row.counted.guessed_right, "count", rank=3),
    Column("forced", lambda row: row.counted.forced, "count", rank=3),
    Column("grammar", lambda row: row.counted.grammar_ms or None, "ms", rank=3,
           meaning="Compiling it, and its masks in steps."),
    Column("rounds", lambda row: row.counted.rounds, "count", rank=3),
    Column("sessions per step", lambda row: row.counted.mean_batch, "figure", rank=3),
    Column("up per token", lambda row: row.counted.uplink_bytes_per_token, "bytes", rank=3),
    Column("down per token", lambda row: row.counted.downlink_bytes_per_token, "bytes", rank=3),
]  # fmt: skip

SESSION_FACTS: "Final[list[Column[SessionView]]]" = [
    *SESSIONS[1:],
    Column("closed", lambda row: row.closed_at, "moment"),
    Column("target model", lambda row: row.target),
    Column("target identity", lambda row: row.target_id),
    Column("temperature", lambda row: row.temperature),
    Column("top-k", lambda row: row.top_k),
    Column("top-p", lambda row: row.top_p),
    Column("seed", lambda row: row.seed),
    Column("maximum new tokens", lambda row: row.max_new_tokens, "count"),
    Column("tokens at the end", lambda row: row.final_tokens, "count", meaning="Of the whole sequence."),
]
"""Columns of one session."""

COMPARED: "Final[list[Column[tuple[str, str, str]]]]" = [
    Column("counted", lambda row: row[0], rank=0),
    Column("by the edge", lambda row: row[1], "number", rank=0),
    Column("by the device", lambda row: row[2], "number", rank=0),
]


def compared(session: "SessionView") -> list[tuple[str, str, str]]:
    """Compare the counters of edge and device for a session, as rows of `COMPARED`."""
    edge = session.counted
    rows: list[tuple[str, object, object, Kind]] = [
        ("tokens", edge.tokens, session.device_tokens, "count"),
        ("rounds", edge.rounds, session.device_rounds, "count"),
        ("drafted tokens", edge.drafted, session.device_drafted, "count"),
        ("verified draft tokens", edge.tested, session.device_tested, "count"),
        ("accepted tokens", edge.accepted, session.device_accepted, "count"),
        ("acceptance", edge.acceptance, session.device_acceptance, "percent"),
        ("uplink", edge.uplink_bytes, session.device_uplink_bytes, "bytes"),
        ("downlink", edge.downlink_bytes, session.device_downlink_bytes, "bytes"),
        ("queue", edge.queue_ms, None, "ms"),
        ("prompt", edge.prefill_ms, None, "ms"),
        ("steps", edge.compute_ms, None, "ms"),
        ("grammar", edge.grammar_ms, None, "ms"),
        ("drafting", None, session.device_draft_ms, "ms"),
        ("waiting", None, session.device_wait_ms, "ms"),
        ("of which for a quota", None, session.device_quota_wait_ms, "ms"),
        ("of which on the network", None, session.network_ms, "ms"),
        ("total", edge.duration_ms, session.device_wall_ms, "ms"),
    ]
    return [(name, shown(one, kind), shown(other, kind)) for name, one, other, kind in rows]


SEGMENTS: "Final[list[Column[SegmentView]]]" = [
    Column("opened", lambda row: row.opened_at, "moment", rank=0),
    Column("edge", lambda row: row.edge, rank=0),
    Column("end", lambda row: row.reason or RUNNING, "state", rank=0),
    Column("tokens", lambda row: row.counted.tokens, "count", rank=0),
    Column("resumed tokens", lambda row: row.resumed_tokens, "count", rank=1),
    Column("acceptance", lambda row: row.counted.acceptance, "percent", rank=1),
    Column("first token", lambda row: row.first_token_ms, "ms", rank=1),
    Column("gap p95", lambda row: row.gap_p95_ms, "ms", rank=1),
    Column("rounds", lambda row: row.counted.rounds, "count", rank=2),
    Column("Open", lambda row: row.open_bytes, "bytes", rank=2, meaning="Its size."),
    Column("prefilled", lambda row: row.counted.prefill_tokens, "count", rank=2),
    Column("reused", lambda row: row.counted.reused_tokens, "count", rank=2),
    Column("target model", lambda row: row.target, rank=3),
    Column("target identity", lambda row: row.target_id, rank=3),
    Column("draft model", lambda row: model_name(row.draft_model, row.quantization), rank=3),
]

ROUNDS: "Final[list[Column[RoundView]]]" = [
    Column("round", lambda row: row.round, "count", rank=0),
    Column("verdict", lambda row: f"{row.at:%H:%M:%S}", rank=0),
    Column("drafted", lambda row: row.drafted, "count", rank=1),
    Column("verified", lambda row: row.tested, "count", rank=1, meaning="Draft tokens that were accepted or rejected."),
    Column("accepted", lambda row: row.accepted, "count", rank=0),
    Column("sessions in its step", lambda row: row.batch, "count", key="batch", rank=2),
    Column("up", lambda row: row.uplink_bytes, "bytes", rank=1),
    Column("down", lambda row: row.downlink_bytes, "bytes", rank=1),
    Column("queue", lambda row: row.queue_ms, "ms", rank=1),
    Column("step", lambda row: row.compute_ms, "ms", rank=1),
    Column("prompt wait", lambda row: row.prefill_ms, "ms", rank=2),
    Column("base", lambda row: row.base, "count", rank=3, meaning="Tokens before it."),
    Column("form", lambda row: row.form, rank=3, meaning="How the verdict sends the next token."),
]

EVENTS: "Final[list[Column[EventView]]]" = [
    Column("at", lambda row: row.at, "moment", rank=0),
    Column("severity", lambda row: row.severity, "state", rank=0),
    Column("device", lambda row: row.device, rank=1),
    Column("code", lambda row: row.code, rank=1),
    Column("times", lambda row: row.count, "count", rank=1),
    Column("edge", lambda row: row.edge, rank=2),
    Column("kind", lambda row: row.kind, rank=2),
    Column("who", lambda row: row.who, rank=2),
    Column("session", lambda row: row.session, "id", rank=3),
    Column("last", lambda row: row.last_at, "moment", rank=3),
    Column("what happened", lambda row: row.sentence, "sentence", key="sentence", rank=0),
]


PART_TIMES: "Final[list[Column[PartTime]]]" = [
    Column("a token's time", lambda row: row.part.value, key="part", rank=0),
    Column("per token", lambda row: row.ms, "ms", rank=0),
    Column("share", lambda row: row.share, "percent", rank=0),
    Column("median of the others", lambda row: row.usual_ms, "ms", key="usual", rank=0,
           meaning="Of the fleet's other devices, or other edges."),
]  # fmt: skip

CONCLUSIONS: "Final[list[Column[Conclusion]]]" = [
    Column("cause", lambda row: row.cause.value, rank=0),
    Column("share", lambda row: row.share, "percent", rank=0, meaning="Of the time."),
    Column("why", lambda row: row.sentence, "sentence", rank=0),
    Column("what to do", lambda row: row.advice, "sentence", key="advice", rank=0),
]

# Totals


def edge_seconds(counted: "Tally") -> float | None:
    """Return the edge's compute time; None without a step."""
    return counted.own_compute_ms / 1e3 or None


def tally_columns(take: "Callable[[T], Tally]") -> list[Column[T]]:
    """Return the columns of a `Tally`, which `take` returns of a row."""
    return [
        Column("tokens", lambda row: take(row).tokens, "count", rank=0),
        Column("sessions", lambda row: take(row).sessions, "count", rank=1),
        Column("tokens/s per session", lambda row: take(row).tokens_per_s, "figure", key="speed", rank=1),
        Column("acceptance", lambda row: take(row).acceptance, "percent", rank=1),
        Column("up", lambda row: take(row).uplink_bytes, "bytes", rank=1),
        Column("down", lambda row: take(row).downlink_bytes, "bytes", rank=1),
        Column("edge time (s)", lambda row: edge_seconds(take(row)), "figure", key="edge_s", rank=2,
               meaning="Time of the steps, each shared equally by its sessions."),
        Column("sessions per step", lambda row: take(row).mean_batch, "figure", rank=2),
        Column("queue per round", lambda row: take(row).queue_ms_per_round, "ms", key="queue", rank=2),
        Column("step per round", lambda row: take(row).compute_ms_per_round, "ms", key="step", rank=2),
        Column("prompt tokens computed", lambda row: take(row).prefill_tokens, "count", key="prompt", rank=2),
        Column("prompt tokens reused", lambda row: take(row).reused_tokens, "count", key="reused", rank=3),
        Column("rounds", lambda row: take(row).rounds, "count", rank=3),
        Column("resumes", lambda row: take(row).segments - take(row).sessions, "count", rank=3),
        Column("edge-only tokens", lambda row: take(row).edge_only, "count", key="edge_only", rank=3,
               meaning="Of edge-only decoding."),
        Column("speculated tokens", lambda row: take(row).guessed, "count", key="speculated", rank=3,
               meaning="Proposed by the edge in edge-only decoding, by n-grams or its draft model."),
        Column("speculated and accepted", lambda row: take(row).guessed_right, "count", rank=3),
        Column("forced tokens", lambda row: take(row).forced, "count", key="forced", rank=3),
        Column("grammar time", lambda row: take(row).grammar_ms, "ms", key="grammar", rank=3,
               meaning="Of compilations, and of masks in steps."),
        Column("drafted tokens", lambda row: take(row).drafted, "count", key="drafted", rank=3),
        Column("verified tokens", lambda row: take(row).tested, "count", key="verified", rank=3,
               meaning="Draft tokens that were accepted or rejected; those after a rejection are discarded."),
        Column("accepted tokens", lambda row: take(row).accepted, "count", key="accepted", rank=3),
        Column("up per token", lambda row: take(row).uplink_bytes_per_token, "bytes", rank=3),
        Column("down per token", lambda row: take(row).downlink_bytes_per_token, "bytes", rank=3),
        Column("prompt wait per round", lambda row: take(row).prefill_ms_per_round, "ms", key="prefill", rank=3),
    ]  # fmt: skip


_START_KINDS: "Final[Mapping[str, Kind]]" = {"hour": "moment", "day": "day", "month": "month"}


def start_column(grain: str, take: "Callable[[T], datetime | None]") -> Column[T]:
    """Return the column of a row's start time."""
    return Column(grain, take, _START_KINDS[grain], key="start", rank=0)


# What administrators did


def alert_state(alert: "AlertView") -> str:
    """Return an alert's severity, or that it is over."""
    return alert.severity if alert.open else "cleared"


def as_assignments(values: Mapping[str, object]) -> str | None:
    """Return settings as they are written on the command line."""
    return ", ".join(f"{name}={setting(value)}" for name, value in values.items()) or None


def setting(value: object) -> str | None:
    return str(value).lower() if isinstance(value, bool) else value if value is None else str(plain(value))


COMMANDS: "Final[list[Column[CommandView]]]" = [
    Column("at", lambda row: row.at, "moment", rank=0),
    Column("who", lambda row: row.who, rank=2),
    Column("command", lambda row: row.command, rank=0),
    Column("device", lambda row: row.device, rank=0),
    Column("outcome", lambda row: row.outcome or "waiting", "state", rank=0),
    Column("message", lambda row: row.sentence, "sentence", rank=1),
    Column("id", lambda row: row.id, "id", rank=3),
]


def setting_columns(view: "DeviceSettingsView") -> list[Column[str]]:
    """Return the columns of a device's settings, whose rows are names."""

    def note(name: str) -> str | None:
        if name in view.refused:
            return f"refused: {view.refused[name]}"
        return "in force after a reload" if name in view.needs_restart else None

    return [
        Column("setting", lambda name: name, rank=0),
        Column("wanted", lambda name: setting(view.wanted.get(name)), rank=0),
        Column("in force", lambda name: setting(view.values.get(name)), rank=0),
        Column("note", note, "sentence", rank=0),
    ]


UPDATES: "Final[list[Column[UpdateView]]]" = [
    Column("device", lambda row: row.device, rank=0),
    Column("release", lambda row: row.release, "count", rank=0),
    Column("stage", lambda row: row.stage, "state", rank=0),
    Column("fetched", lambda row: row.share, "percent", rank=1),
    Column("running", lambda row: row.running or None, rank=0),
    Column("reported", lambda row: row.at, "ago", rank=2),
    Column("message", lambda row: row.sentence or None, "sentence", rank=0),
]


ALERT_GROUPS: "Final[list[Column[AlertGroup]]]" = [
    Column("state", lambda row: row.severity, "state", rank=0),
    Column("alerts", lambda row: len(row.alerts), "count", rank=1),
    Column("condition", lambda row: row.rule, rank=2),
    Column("since", lambda row: row.since_at, "ago", rank=1),
    Column("subjects", lambda row: row.subjects, rank=1),
    Column("what is wrong", lambda row: row.sentence, "sentence", key="sentence", rank=0),
]  # fmt: skip
"""Columns of open alerts by condition."""

ALERTS: "Final[list[Column[AlertView]]]" = [
    Column("alert", lambda row: row.id, "id", key="id", rank=0),
    Column("state", alert_state, "state", rank=0),
    Column("condition", lambda row: row.rule, key="rule", rank=1),
    Column("subject", lambda row: row.subject, key="subject", rank=1),
    Column("since", lambda row: row.since_at, "ago", rank=1),
    Column("last seen", lambda row: row.last_at, "ago", key="last", rank=2),
    Column("value", lambda row: row.value, "figure", rank=3),
    Column("threshold", lambda row: row.threshold, "figure", rank=3),
    Column("cleared", lambda row: row.cleared_at, "moment", key="cleared", rank=2),
    Column("what is wrong", lambda row: row.sentence, "sentence", key="sentence", rank=0),
]

AUDIT: "Final[list[Column[AuditView]]]" = [
    Column("at", lambda row: row.at, "moment", rank=0),
    Column("who", lambda row: row.who, rank=1),
    Column("action", lambda row: row.action, rank=0),
    Column("subject", lambda row: row.subject, key="subject", rank=0),
    Column("before", lambda row: row.before or None, rank=1),
    Column("after", lambda row: row.after or None, rank=1),
    Column("outcome", lambda row: row.outcome or None, rank=1),
    Column("from", lambda row: row.source or None, key="source", rank=2,
           meaning="The machine, or the address of the reader."),
]  # fmt: skip

"""Reports of the session log, and the columns of tables that belong to one device, edge or session."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from fleet_admin.columns import Column, Kind, plain, shown
from fleet_admin.report import Report
from fleet_edge.session_log import (
    AUDIT_FIELDS,
    COMMAND_FIELDS,
    CONNECTED,
    EDGES_ALONE,
    EVENT_FIELDS,
    SESSION_FIELDS,
    Filter,
    MachineState,
    Severity,
)
from schemas.names import model_name
from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from fleet_admin.diagnosis import Conclusion, PartTime
    from fleet_admin.steering import DeviceSettingsView
    from fleet_admin.steering.access import AccessFact
    from fleet_admin.steering.clients import BrokerClient
    from fleet_admin.steering.log import SteeringLog
    from fleet_admin.steering.rollout import UpdateView
    from fleet_edge.session_log import (
        AlertGroup,
        AlertView,
        AuditView,
        CommandView,
        DeviceView,
        EdgeView,
        EventView,
        QuarantineView,
        RoundView,
        SegmentView,
        SessionLog,
        SessionView,
        Tally,
    )

_DAY: Final = timedelta(days=1)
_EDGE_STATES: Final = [
    each.value for each in MachineState if each not in {MachineState.QUARANTINED, MachineState.RETIRED}
]
_DEVICE_STATES: Final = [each.value for each in MachineState if each not in EDGES_ALONE]


# Devices and edges


def device_columns(now: datetime, *, past: bool = False) -> "list[Column[DeviceView]]":
    """Return the columns of devices; `now` is aware.

    What a device that is away reported last is left out, or marked as `past`.
    """

    def reported(name: str) -> "Callable[[DeviceView], Any]":
        return lambda row: getattr(row, name) if past or row.connected else None

    last = "last " if past else ""
    return [
        Column("device", "device", rank=0),
        Column("state", "state.value", "state", rank=0, choices=_DEVICE_STATES),
        Column("since", "state_since", "ago", rank=2),
        Column("last active", "last_sign_at", "ago", key="seen", rank=1,
               meaning="Its latest message; an idle device sends none, and stays online."),
        Column("draft model", lambda row: model_name(row.draft_model, row.quantization), key="draft", rank=1),
        Column("tokens today", "tokens_today", "count", rank=1),
        Column("acceptance 24 h", "acceptance_24h", "percent", key="acceptance_24h", rank=1),
        Column(f"{last}round trip", reported("round_trip_ms"), "ms", key="round_trip", rank=1,
               meaning="From a draft to its verdict."),
        Column("edge", "last_edge", rank=2, meaning="The edge of its latest session."),
        Column("release", "software", rank=2, meaning="The version that the device reports."),
        Column("acceptance 1 h", "acceptance_1h", "percent", key="acceptance_1h", rank=2),
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
        Column("sessions", "sessions", "count", rank=2),
        Column("certificate", lambda row: days_left(row.certificate_until, now), "days", rank=2, meaning="Days left."),
        Column("certificate until", "certificate_until", "moment", rank=3),
        Column("labels", "labels", rank=2),
        Column("last verdict", "last_verdict_at", "ago", key="verdict", rank=3),
        Column(f"{last}acceptance reported", reported("acceptance"), "percent", key="acceptance", rank=3,
               meaning="By the device, since it started."),
        Column("telemetry", "telemetry_at", "ago", rank=3),
        Column("first seen", "first_seen_at", "moment", rank=3),
    ]  # fmt: skip


def edge_columns(now: datetime) -> "list[Column[EdgeView]]":
    """Return the columns of edges; `now` is aware."""

    def loaded(name: str) -> "Callable[[EdgeView], float | None]":
        # The last load of a silent or offline edge is outdated.
        return lambda row: getattr(row, name) if row.state in CONNECTED else None

    def free(row: "EdgeView") -> int | None:
        return 0 if row.state.value == "draining" else row.free_sessions if row.state.value == "online" else None

    return [
        Column("edge", "edge", rank=0),
        Column("state", "state.value", "state", rank=0, choices=_EDGE_STATES),
        Column("since", "state_since", "ago", rank=2),
        Column("loaded", lambda row: (row.loading or 0) / 100 if row.state.value == "loading" else None, "percent",
               rank=1, meaning="Of the target model, by an edge that starts."),
        Column("open sessions", loaded("open_sessions"), "count", key="open", rank=1),
        Column("free sessions", free, "count", key="free", rank=1, meaning="Sessions that the edge can still open."),
        Column("tokens/s", loaded("tokens_per_s"), "figure", key="tokens", rank=1),
        Column("sessions per step", loaded("batch_sessions"), "figure", key="batch", rank=1,
               meaning="Sessions verified in one step, on average."),
        Column("step", loaded("step_ms"), "ms", rank=1),
        Column("queue", loaded("queue_ms"), "ms", rank=1, meaning="Mean wait of a draft for its step."),
        Column("KV use", loaded("kv_usage"), "percent", key="kv", rank=1,
               meaning="Of the memory for keys and values."),
        Column("records waiting", "spooled_records", "count", key="spool", rank=1,
               meaning="Of the session log, on the edge's disk, because the database did not take them."),
        Column("release", "software", rank=2),
        Column("certificate", lambda row: days_left(row.certificate_until, now), "days", rank=2, meaning="Days left."),
        Column("target model", "target", key="target", rank=2),
        Column("target identity", "target_id", key="target_id", rank=2,
               meaning="Of what the model computes: a request is continued only by an edge with the same."),
        Column("last seen", "seen_at", "ago", key="seen", rank=2),
        Column("load reported", "load_at", "ago", key="load", rank=3),
        Column("first seen", "first_seen_at", "moment", rank=3),
    ]  # fmt: skip


def days_left(until: datetime | None, now: datetime) -> int | None:
    """Return the whole days until a certificate expires, as `fleet broker list` does; negative afterwards."""
    return None if until is None else (until - now) // _DAY


# Figures that the log counts

_FIGURES: "Final[list[Column[Any]]]" = [
    Column("tokens", "counted.tokens", "count"),
    Column("acceptance", "counted.acceptance", "percent"),
    Column("tokens/s", "counted.tokens_per_s", "figure", key="speed", meaning="Of one session, on average."),
    Column("rounds", "counted.rounds", "count"),
    Column("sessions per step", "counted.mean_batch", "figure"),
    Column("prefilled", "counted.prefill_tokens", "count", meaning="Tokens of prompts that were computed."),
    Column("reused", "counted.reused_tokens", "count", meaning="Tokens of prompts that were known already."),
    Column("edge-only", "counted.edge_only", "count", key="edge_only", meaning="Tokens of edge-only decoding."),
    Column("speculated", "counted.speculated", "count",
           meaning="Tokens that the edge proposed in edge-only decoding, by n-grams or its draft model."),
    Column("speculated and accepted", "counted.speculated_accepted", "count"),
    Column("forced", "counted.forced", "count", meaning="Tokens forced by a grammar."),
    Column("grammar", lambda row: row.counted.grammar_ms or None, "ms",
           meaning="Compiling grammars, and their masks in steps."),
    Column("up per token", "counted.uplink_bytes_per_token", "bytes"),
    Column("down per token", "counted.downlink_bytes_per_token", "bytes"),
]  # fmt: skip


def _counted(keys: str, rank: int) -> "list[Column[Any]]":
    """Return columns of rows with a `Tally` as `counted`."""
    by_key = {each.key: each for each in _FIGURES}
    return [replace(by_key[key], rank=rank) for key in keys.split()]


# Sessions and events


RUNNING: Final = "running"
"""End of a session that has not ended."""


def _why(session: "SessionView") -> str | None:
    return session.end_sentence and f"{session.end_sentence} ({session.end_code})"


def _prompt_under_way(session: "SessionView") -> str | None:
    """Return how much of the prompt of a running session is computed, and the seconds left at its pace so far."""
    counted = session.counted
    if session.reason is not None or counted.tokens or not session.prompt_tokens:
        return None
    left = max(0, session.prompt_tokens - counted.prefill_tokens - counted.reused_tokens)
    done = f"{session.prompt_tokens - left:,} of {session.prompt_tokens:,}"
    if not left or not counted.prefill_tokens:
        return done
    return f"{done}, {max(1.0, left * counted.duration_ms / counted.prefill_tokens / 1e3):,.0f} s"


SESSIONS: "Final[list[Column[SessionView]]]" = [
    Column("session", "session", "id", rank=0),
    Column("device", "device", rank=0),
    Column("end", "reason", "state", key="reason", rank=0, absent=RUNNING, choices=[*EndReason, RUNNING]),
    *_counted("tokens", 1),
    Column("prompt", _prompt_under_way, rank=1,
           meaning="Tokens of a running session's prompt that are computed, and the time left at its pace so far."),
    Column("opened", "opened_at", "moment", rank=1),
    Column("application", "app", key="app", rank=2),
    Column("edge", "edge", rank=2),
    *_counted("acceptance speed", 1),
    Column("unverified", lambda row: row.device_unverified or None, "count", rank=1,
           meaning="Tokens that the device wrote without an edge."),
    Column("first token", "first_token_ms", "ms", rank=2),
    Column("gap p95", "gap_p95_ms", "ms", rank=2,
           meaning="19 of 20 tokens came no later than this after the one before."),
    Column("why", _why, "sentence", rank=0, meaning="It ended so, where that is more than its end says."),
    Column("mode", "mode", rank=2, choices=list(Mode)),
    Column("draft model", lambda row: model_name(row.draft_model, row.quantization), key="draft", rank=2),
    Column("prompt tokens", "prompt_tokens", "count", rank=3),
    *_counted("prefilled reused edge_only speculated speculated_and_accepted forced grammar rounds", 3),
    *_counted("sessions_per_step up_per_token down_per_token", 3),
]  # fmt: skip

SESSION_FACTS: "Final[list[Column[SessionView]]]" = [
    *SESSIONS[1:],
    Column("closed", "closed_at", "moment"),
    Column("target model", "target"),
    Column("target identity", "target_id"),
    Column("temperature", "temperature"),
    Column("top-k", "top_k"),
    Column("top-p", "top_p"),
    Column("seed", "seed"),
    Column("maximum new tokens", "max_new_tokens", "count"),
    Column("tokens at the end", "final_tokens", "count", meaning="Of the whole sequence."),
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
    Column("opened", "opened_at", "moment", rank=0),
    Column("edge", "edge", rank=0),
    Column("end", "reason", "state", rank=0, absent=RUNNING),
    *_counted("tokens", 0),
    Column("resumed tokens", "resumed_tokens", "count", rank=1),
    *_counted("acceptance", 1),
    Column("first token", "first_token_ms", "ms", rank=1),
    Column("gap p95", "gap_p95_ms", "ms", rank=1),
    *_counted("rounds", 2),
    Column("Open", "open_bytes", "bytes", rank=2, meaning="Its size."),
    *_counted("prefilled reused", 2),
    Column("target model", "target", rank=3),
    Column("target identity", "target_id", rank=3),
    Column("draft model", lambda row: model_name(row.draft_model, row.quantization), rank=3),
]

ROUNDS: "Final[list[Column[RoundView]]]" = [
    Column("round", "round", "count", rank=0),
    Column("verdict", lambda row: f"{row.at:%H:%M:%S}", rank=0),
    Column("drafted", "drafted", "count", rank=1),
    Column("verified", "tested", "count", rank=1, meaning="Draft tokens that were accepted or rejected."),
    Column("accepted", "accepted", "count", rank=0),
    Column("sessions in its step", "batch", "count", key="batch", rank=2),
    Column("up", "uplink_bytes", "bytes", rank=1),
    Column("down", "downlink_bytes", "bytes", rank=1),
    Column("queue", "queue_ms", "ms", rank=1),
    Column("step", "compute_ms", "ms", rank=1),
    Column("prompt wait", "prefill_ms", "ms", rank=2),
    Column("base", "base", "count", rank=3, meaning="Tokens before it."),
    Column("form", "form", rank=3, meaning="How the verdict sends the next token."),
]

EVENTS: "Final[list[Column[EventView]]]" = [
    Column("at", "at", "moment", rank=0),
    Column("severity", "severity", "state", rank=0, choices=list(Severity)),
    Column("device", "device", rank=1),
    Column("code", "code", rank=1),
    Column("times", "count", "count", rank=1),
    Column("edge", "edge", rank=2),
    Column("kind", "kind", rank=2),
    Column("who", "who", rank=2),
    Column("session", "session", "id", rank=3),
    Column("last", "last_at", "moment", rank=3),
    Column("what happened", "sentence", "sentence", key="sentence", rank=0),
]


PART_TIMES: "Final[list[Column[PartTime]]]" = [
    Column("a token's time", "part.value", key="part", rank=0),
    Column("per token", "ms", "ms", rank=0),
    Column("share", "share", "percent", rank=0),
    Column("median of the others", "usual_ms", "ms", key="usual", rank=0,
           meaning="Of the fleet's other devices, or other edges."),
]  # fmt: skip

CONCLUSIONS: "Final[list[Column[Conclusion]]]" = [
    Column("cause", "cause.value", rank=0),
    Column("share", "share", "percent", rank=0, meaning="Of the time."),
    Column("why", "sentence", "sentence", rank=0),
    Column("what to do", "advice", "sentence", key="advice", rank=0),
]

# Totals


def edge_seconds(counted: "Tally") -> float | None:
    """Return the edge's compute time; None without a step."""
    return counted.own_compute_ms / 1e3 or None


TALLY: "Final[list[Column[Any]]]" = [
    *_counted("tokens", 0),
    Column("sessions", "counted.sessions", "count", rank=1),
    *_counted("speed acceptance", 1),
    Column("up", "counted.uplink_bytes", "bytes", rank=1),
    Column("down", "counted.downlink_bytes", "bytes", rank=1),
    Column("edge time (s)", lambda row: edge_seconds(row.counted), "figure", key="edge_s", rank=2,
           meaning="Time of the steps, each shared equally by its sessions."),
    *_counted("sessions_per_step", 2),
    Column("queue per round", "counted.queue_ms_per_round", "ms", key="queue", rank=2),
    Column("step per round", "counted.compute_ms_per_round", "ms", key="step", rank=2),
    *_counted("prefilled", 2),
    *_counted("reused rounds", 3),
    Column("resumes", lambda row: row.counted.segments - row.counted.sessions, "count", rank=3),
    *_counted("edge_only speculated speculated_and_accepted forced grammar", 3),
    Column("drafted", "counted.drafted", "count", rank=3),
    Column("verified", "counted.tested", "count", rank=3,
           meaning="Draft tokens that were accepted or rejected; those after a rejection are discarded."),
    Column("accepted", "counted.accepted", "count", rank=3),
    *_counted("up_per_token down_per_token", 3),
    Column("prompt wait per round", "counted.prefill_ms_per_round", "ms", key="prefill", rank=3),
]  # fmt: skip
"""Columns of rows with a `Tally` as `counted`."""


# What administrators did


def as_assignments(values: Mapping[str, object]) -> str | None:
    """Return settings as they are written on the command line."""
    return ", ".join(f"{name}={setting(value)}" for name, value in values.items()) or None


def setting(value: object) -> str | None:
    return str(value).lower() if isinstance(value, bool) else value if value is None else str(plain(value))


COMMANDS: "Final[list[Column[CommandView]]]" = [
    Column("at", "at", "moment", rank=0),
    Column("who", "who", rank=2),
    Column("command", "command", rank=0),
    Column("device", "device", rank=0),
    Column("outcome", "outcome", "state", rank=0, absent="waiting"),
    Column("message", "sentence", "sentence", rank=1),
    Column("id", "id", "id", rank=3),
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
    Column("device", "device", rank=0),
    Column("release", "release", "count", rank=0),
    Column("stage", "stage", "state", rank=0),
    Column("fetched", "share", "percent", rank=1),
    Column("running", "running", rank=0),
    Column("reported", "at", "ago", rank=2),
    Column("message", "sentence", "sentence", rank=0),
]


ALERT_GROUPS: "Final[list[Column[AlertGroup]]]" = [
    Column("state", "severity", "state", rank=0),
    Column("alerts", lambda row: len(row.alerts), "count", rank=1),
    Column("condition", "rule", rank=2),
    Column("since", "since_at", "ago", rank=1),
    Column("subjects", "subjects", rank=1),
    Column("what is wrong", "sentence", "sentence", key="sentence", rank=0),
]  # fmt: skip
"""Columns of open alerts by condition."""

ALERTS: "Final[list[Column[AlertView]]]" = [
    Column("alert", "id", "id", key="id", rank=0),
    Column("state", "state", "state", rank=0, choices=("warning", "critical", "cleared")),
    Column("condition", "rule", key="rule", rank=1),
    Column("subject", "subject", key="subject", rank=1),
    Column("since", "since_at", "ago", rank=1),
    Column("last seen", "last_at", "ago", key="last", rank=2),
    Column("value", "value", "figure", rank=3),
    Column("threshold", "threshold", "figure", rank=3),
    Column("cleared", "cleared_at", "moment", key="cleared", rank=2),
    Column("what is wrong", "sentence", "sentence", key="sentence", rank=0),
]

AUDIT: "Final[list[Column[AuditView]]]" = [
    Column("at", "at", "moment", rank=0),
    Column("who", "who", rank=1),
    Column("action", "action", rank=0),
    Column("subject", "subject", key="subject", rank=0),
    Column("before", "before", rank=1),
    Column("after", "after", rank=1),
    Column("outcome", "outcome", rank=1),
    Column("from", "source", key="source", rank=2,
           meaning="The machine, or the address of the reader."),
]  # fmt: skip


# Reports


def devices(log: "SessionLog", now: datetime) -> "Report[DeviceView]":
    empty = (
        "No device has been seen: one appears when it first connects to a broker that an edge of this database uses "
        "(`fleet device run`)."
    )
    return Report("devices", device_columns(now), lambda **_: log.devices(), "device", empty=empty, now=now)


def edges(log: "SessionLog", now: datetime) -> "Report[EdgeView]":
    empty = "No edge has written to this database: one appears when it runs with it (`fleet edge run --db URL`)."
    return Report("edges", edge_columns(now), lambda **_: log.edges(), "edge", empty=empty, now=now)


def sessions(log: "SessionLog", now: datetime) -> "Report[SessionView]":
    def stored(each: Filter) -> bool:
        return each.field in SESSION_FIELDS or (each.field == "labels" and each.operator == "=" and bool(each.value))

    return Report(
        "sessions",
        SESSIONS,
        log.sessions,
        order="-opened",
        paged=True,
        stored=stored,
        hidden=[Column("labels", "labels"), Column("model", "draft_model")],
        empty="No sessions yet: a session begins when an application asks a device to generate.",
        now=now,
    )


def events(log: "SessionLog", now: datetime) -> "Report[EventView]":
    return Report(
        "events",
        EVENTS,
        log.events,
        order="-at",
        paged=True,
        stored=lambda each: each.field in EVENT_FIELDS,
        empty="No events.",
        now=now,
    )


def alerts(log: "SessionLog", now: datetime, *, is_open: bool | None = None) -> "Report[AlertView]":
    empty = "No alert is open." if is_open else "There are no alerts."
    return Report("alerts", ALERTS, lambda limit, **_: log.alerts(open=is_open, limit=limit), "", empty=empty, now=now)


def audit(log: "SteeringLog", now: datetime) -> "Report[AuditView]":
    return Report(
        "actions",
        AUDIT,
        log.audit,
        order="-at",
        paged=True,
        stored=lambda each: each.field in AUDIT_FIELDS,
        empty="No actions: what operators do to devices, alerts and accounts is recorded here.",
        now=now,
    )


def commands(log: "SteeringLog", now: datetime) -> "Report[CommandView]":
    return Report(
        "commands",
        COMMANDS,
        log.commands,
        order="-at",
        paged=True,
        stored=lambda each: each.field in COMMAND_FIELDS,
        empty="No command was given.",
        now=now,
    )


@dataclass(frozen=True, slots=True)
class ReleaseCount:
    """Edges and devices that run a release; None: they have not said which."""

    software: str | None
    edges: int
    devices: int
    online: int
    offline: int


def releases(log: "SessionLog", now: datetime) -> Report[ReleaseCount]:
    def count(**_: object) -> list[ReleaseCount]:
        devices, serving = log.devices(counted=False), Counter(edge.software for edge in log.edges())
        every = Counter(device.software for device in devices)
        online, offline = (
            Counter(device.software for device in devices if device.state.value == state)
            for state in ("online", "offline")
        )
        names = sorted({*every, *serving}, key=lambda name: (-every[name], name or ""))
        return [ReleaseCount(name, serving[name], every[name], online[name], offline[name]) for name in names]

    columns: list[Column[ReleaseCount]] = [
        Column("software", "software", rank=0),
        Column("edges", "edges", "count"),
        Column("devices", "devices", "count"),
        Column("of these online", "online", "count", key="online"),
        Column("offline", "offline", "count"),
    ]
    return Report("releases", columns, count, "", empty="No edge and no device has been seen.", now=now)


def quarantines(log: "SessionLog", now: datetime) -> "Report[QuarantineView]":
    columns: list[Column[QuarantineView]] = [
        Column("device", "device", rank=0),
        Column("since", "since_at", "moment", rank=1),
        Column("until", "until_at", rank=0, absent="lifted"),
        Column("by", "by", rank=1),
        Column("reason", "reason", "sentence", rank=0),
        Column("strikes", "strikes", "count", rank=2),
        Column("doubled", "level", "count", rank=2),
    ]
    empty = "No device is quarantined."
    return Report("quarantined devices", columns, lambda **_: log.quarantines(), "device", empty=empty, now=now)


ACCESS: "Final[list[Column[AccessFact]]]" = [
    Column("fact", "fact", rank=0),
    Column("state", "state", "state", rank=0),
    Column("since", "since", "moment", rank=1),
    Column("message", "sentence", "sentence", rank=0),
]


def clients(found: "Sequence[BrokerClient]", now: datetime) -> "Report[BrokerClient]":
    """Return the report of the clients that the broker has named."""
    columns: list[Column[BrokerClient]] = [
        Column("client", "client", rank=0),
        Column("state", "state", "state", rank=0, choices=("connected", "not connected")),
        Column("since", "since", "ago", rank=1, meaning="Empty: from before this program read the broker's log."),
        Column("address", "address", rank=1),
        Column("message", "sentence", "sentence", rank=1),
    ]
    empty = "The broker has named no client."
    return Report("clients", columns, lambda **_: found, "client", empty=empty, now=now)


@dataclass(frozen=True, slots=True)
class LabelUse:
    label: str
    devices: tuple[str, ...]


def labels(log: "SteeringLog", now: datetime) -> Report[LabelUse]:
    def collect(**_: object) -> list[LabelUse]:
        found: dict[str, tuple[str, ...]] = {}
        for device, words in log.labels().items():
            for word in words:
                found[word] = (*found.get(word, ()), device)
        return [LabelUse(word, devices) for word, devices in found.items()]

    columns: list[Column[LabelUse]] = [
        Column("label", "label", rank=0),
        Column("number", lambda row: len(row.devices), "count", rank=0),
        Column("devices", "devices", "sentence", rank=0),
    ]
    empty = "No device has a label: fleet admin label DEVICE --add WORD gives one."
    return Report("labels", columns, collect, "label", empty=empty, now=now)

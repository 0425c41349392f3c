"""Records with everything filled in, of which a test says only what matters to it."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from fleet_edge.session_log.alerts.alerts import update_alerts
from fleet_edge.session_log.alerts.rules import AlertProblem
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.event_codes import Severity
from fleet_edge.session_log.records import (
    LeaveReason,
    Record,
    close_record,
    event_record,
    minute_of,
    open_record,
    quarantine_record,
    report_record,
    segment_number,
)
from fleet_edge.session_log.rules import stored
from fleet_edge.session_log.views import AlertView, DeviceCounters, EdgeView, LoadView, QuarantineView
from schemas.control import Presence
from schemas.policy import Mode
from schemas.reasons import EndReason

START = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)
SESSION = "00112233445566aa"
OTHER = "ff00000000000001"
THIRD = "ff00000000000002"
SEGMENT = segment_number(START)
COUNTERS = DeviceCounters(
    tokens=40,
    rounds=10,
    drafted=50,
    tested=45,
    accepted=30,
    uplink_bytes=480,
    downlink_bytes=320,
    draft_ms=600.0,
    wait_ms=900.0,
    wall_ms=1600.0,
    quota_wait_ms=0.0,
    unverified=0,
)


V = TypeVar("V")


def view(kind: type[V], **given: Any) -> V:
    """Return a view whose other fields are None."""
    return kind(**{**dict.fromkeys(each.name for each in fields(kind)), **given})  # type: ignore[arg-type]


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


# Builders of records: each takes what differs.


def _at_column(table: str, column: str, **row: Any) -> Callable[..., Record]:
    def made(*, at: datetime = START, **given: Any) -> Record:
        return Record(at, {table: {**row, column: at, **given}})

    return made


device_seen = _at_column(
    "devices",
    "state_at",
    device="sensor-1",
    presence=Presence.ONLINE,
    software="0.1.0",
    draft_model="SmolLM2-135M",
    quantization="Q4_0",
)

edge_seen = _at_column(
    "edges",
    "state_at",
    edge="edge-1",
    presence=Presence.ONLINE,
    software="0.1.0",
    target="SmolLM2",
    target_id="7a3f0c9e51d2b846",
    vocabulary="49152",
)

device_told = _at_column(
    "devices",
    "telemetry_at",
    device="sensor-1",
    plan="ahead",
    plan_reason="Drafting ahead 31.0 tokens/s with 5 a draft.",
    round_trip_ms=42.0,
    acceptance=0.7,
    draft_ms_per_token=13.0,
)

_LOAD: dict[str, Any] = {
    "edge": "edge-1",
    "open_sessions": 3,
    "max_sessions": 4096,
    "batch_sessions": 2.5,
    "step_ms": 40.0,
    "queue_ms": 2.0,
    "tokens_per_s": 60.0,
    "kv_usage": 0.25,
    "spooled_records": 0,
    "memory_bytes": 500_000_000,
    "devices_active": 2,
    "devices_connected": 3,
}


def edge_load(*, at: datetime = START, **given: Any) -> Record:
    load = _LOAD | given
    own: dict[str, dict[str, Any]] = {"edges": {"load_at": at}, "edge_loads": {"minute": minute_of(at), "at": at}}
    kept = {"edges": {"edge", *stored(EdgeView)}, "edge_loads": {"edge", *stored(LoadView)}}
    return Record(at, {table: own[table] | {name: load[name] for name in load if name in kept[table]} for table in own})


def _key(session: str = SESSION, segment: int = SEGMENT, device: str = "sensor-1") -> dict[str, Any]:
    return {"session": session, "segment": segment, "device": device}


def _split(given: dict[str, Any]) -> dict[str, Any]:
    """Take the key of a segment out of what is given."""
    return _key(**{name: given.pop(name) for name in ("session", "segment", "device") if name in given})


_OPEN: dict[str, Any] = {
    "edge": "edge-1",
    "app": None,
    "draft_model": "SmolLM2-135M",
    "quantization": "Q4_0",
    "target": "SmolLM2",
    "target_id": "7a3f0c9e51d2b846",
    "mode": Mode.RESIDUAL,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "seed": 2**64 - 1,
    "prompt_tokens": 12,
    "max_new_tokens": 64,
    "resumed_tokens": 0,
    "open_bytes": 150,
}


def opened(*, at: datetime = START, **given: Any) -> Record:
    return open_record(_split(given), at, **_OPEN | given)


_PROGRESS: dict[str, Any] = {
    "tokens": 20,
    "rounds": 5,
    "drafted": 25,
    "tested": 20,
    "accepted": 15,
    "uplink_bytes": 240,
    "downlink_bytes": 160,
    "queue_ms": 10.0,
    "compute_ms": 200.0,
    "batch_sum": 15,
}


def progress(*, at: datetime = START + timedelta(seconds=2), **given: Any) -> Record:
    return Record(at, {"segments": _split(given) | _PROGRESS | given})


_ROUND: dict[str, Any] = {
    "round": 0,
    "base": 0,
    "drafted": 5,
    "tested": 4,
    "accepted": 3,
    "batch": 3,
    "uplink_bytes": 48,
    "downlink_bytes": 32,
    "form": "sparse",
    "queue_ms": 2.0,
    "compute_ms": 40.0,
    "prefill_ms": 0.0,
}


def judged(*, at: datetime = START + timedelta(seconds=1), **given: Any) -> Record:
    return Record(at, {"rounds": {**_split(given), **_ROUND, "at": at, **given}})


def left(*, at: datetime = START + timedelta(seconds=3), **given: Any) -> Record:
    return Record(at, {"segments": _split(given) | {"reason": LeaveReason.HANDED_OVER, "closed_at": at} | given})


def closed(*, at: datetime = START + timedelta(seconds=3), **given: Any) -> Record:
    return close_record(_split(given), at, **{"reason": EndReason.STOP, "tokens": 20, "counters": COUNTERS} | given)


def reported(
    *, session: str = SESSION, device: str = "sensor-1", at: datetime = START + timedelta(seconds=9), **given: Any
) -> Record:
    return report_record(session, device, at, **{"reason": EndReason.STOP, "tokens": 20, "counters": COUNTERS} | given)


_EVENT: dict[str, Any] = {
    "id": "event-1",
    "edge": "edge-1",
    "device": "sensor-1",
    "session": SESSION,
    "kind": "fault",
    "code": "tokens-differ",
    "sentence": "The prefix differs.",
    "severity": Severity.INFO,
}


def event(*, at: datetime = START + timedelta(seconds=1), **given: Any) -> Record:
    return event_record(at, **_EVENT | given)


_QUARANTINE: dict[str, Any] = {
    "device": "sensor-1",
    "by": "edge-1",
    "since_at": START,
    "until_at": START + timedelta(seconds=60),
    "reason": "It sent 2,000 drafts.",
    "strikes": 40,
    "level": 2,
}


def quarantined(**given: Any) -> Record:
    return quarantine_record(QuarantineView(**_QUARANTINE | given))


def two_sessions(at: datetime) -> list[Record]:
    """Return a whole session, and one of another device that is open since `at`."""
    other = {"session": OTHER, "segment": segment_number(at), "device": "sensor-2"}
    return [opened(), progress(), judged(), closed(), event(), opened(**other, mode=Mode.COUPLED, at=at)]


def fleet() -> list[Record]:
    """Return one session served in two segments at two edges, one of another device, and one still open."""
    resumed = {"session": SESSION, "segment": segment_number(after(100))}
    other = {"session": OTHER, "segment": segment_number(after(3600)), "device": "sensor-2"}
    third = {"session": THIRD, "segment": segment_number(after(7200)), "device": "sensor-2"}
    return [
        device_seen(),
        device_seen(device="idle"),
        opened(),
        progress(),
        judged(),
        closed(reason=EndReason.LOST, counters=None),
        opened(**resumed, edge="edge-2", resumed_tokens=20, at=after(100)),
        progress(**resumed, tokens=20, accepted=5, at=after(102)),
        judged(**resumed, round=7, base=20, at=after(101)),
        closed(**resumed, tokens=40, at=after(103)),
        opened(**other, mode=Mode.COUPLED, quantization="Q2_K", at=after(3600)),
        progress(**other, tokens=7, at=after(3601)),
        closed(**other, reason=EndReason.LENGTH, tokens=7, counters=None, at=after(3602)),
        opened(**third, at=after(7200)),
        event(),
    ]


def open_alerts(
    store: Store, problems: Sequence[tuple[str, AlertProblem]], *, since: datetime, now: datetime
) -> list[AlertView]:
    """Open alerts about problems, given with their rules; return those that changed."""
    found = {(rule, problem.subject): problem for rule, problem in problems}
    begun = {key: problem.since or since for key, problem in found.items()}
    with store.engine.begin() as connection:
        return update_alerts(connection, found, begun=begun, hold=timedelta(), observed=True, now=now)

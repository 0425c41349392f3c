"""Records with everything filled in, of which a test says only what matters to it."""

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from fleet_edge.store.event_codes import Severity
from fleet_edge.store.records import (
    CloseReported,
    DeviceCounters,
    DeviceQuarantined,
    DeviceSeen,
    EdgeSeen,
    EventLogged,
    LeaveReason,
    LoadReported,
    Record,
    RoundJudged,
    SegmentLeft,
    SegmentProgress,
    SessionClosed,
    SessionOpened,
    TelemetryReported,
    segment_number,
)
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

device_seen = partial(
    replace,
    DeviceSeen(
        device="sensor-1",
        presence=Presence.ONLINE,
        software="0.1.0",
        draft_model="SmolLM2-135M",
        quantization="Q4_0",
        at=START,
    ),
)

edge_seen = partial(
    replace,
    EdgeSeen(
        edge="edge-1",
        presence=Presence.ONLINE,
        software="0.1.0",
        target="SmolLM2",
        target_id="7a3f0c9e51d2b846",
        vocabulary="49152",
        at=START,
    ),
)

device_told = partial(
    replace,
    TelemetryReported(
        device="sensor-1",
        at=START,
        plan="ahead",
        plan_reason="Drafting ahead 31.0 tokens/s with 5 a draft.",
        round_trip_ms=42.0,
        told_acceptance=0.7,
        draft_ms_per_token=13.0,
    ),
)

edge_load = partial(
    replace,
    LoadReported(
        edge="edge-1",
        at=START,
        open_sessions=3,
        most_sessions=4096,
        batch_sessions=2.5,
        step_ms=40.0,
        queue_ms=2.0,
        tokens_per_s=60.0,
        kv_usage=0.25,
        spooled_records=0,
        memory_bytes=500_000_000,
        devices_active=2,
        devices_connected=3,
    ),
)

opened = partial(
    replace,
    SessionOpened(
        session=SESSION,
        segment=SEGMENT,
        device="sensor-1",
        edge="edge-1",
        draft_model="SmolLM2-135M",
        quantization="Q4_0",
        target="SmolLM2",
        target_id="7a3f0c9e51d2b846",
        mode=Mode.RESIDUAL,
        temperature=0.7,
        top_k=50,
        top_p=0.95,
        seed=2**64 - 1,
        prompt_tokens=12,
        max_new_tokens=64,
        resumed_tokens=0,
        open_bytes=150,
        at=START,
    ),
)

progress = partial(
    replace,
    SegmentProgress(
        session=SESSION,
        segment=SEGMENT,
        tokens=20,
        rounds=5,
        drafted=25,
        tested=20,
        accepted=15,
        uplink_bytes=240,
        downlink_bytes=160,
        queue_ms=10.0,
        compute_ms=200.0,
        batch_sum=15,
        at=after(2),
        device="sensor-1",
    ),
)

judged = partial(
    replace,
    RoundJudged(
        session=SESSION,
        segment=SEGMENT,
        round=0,
        base=0,
        drafted=5,
        tested=4,
        accepted=3,
        batch=3,
        uplink_bytes=48,
        downlink_bytes=32,
        form="sparse",
        queue_ms=2.0,
        compute_ms=40.0,
        prefill_ms=0.0,
        at=after(1),
        device="sensor-1",
    ),
)

left = partial(
    replace,
    SegmentLeft(session=SESSION, segment=SEGMENT, reason=LeaveReason.HANDED_OVER, at=after(3), device="sensor-1"),
)

closed = partial(
    replace,
    SessionClosed(
        session=SESSION,
        segment=SEGMENT,
        reason=EndReason.STOP,
        tokens=20,
        counters=COUNTERS,
        at=after(3),
        device="sensor-1",
    ),
)

reported = partial(
    replace,
    CloseReported(session=SESSION, device="sensor-1", reason=EndReason.STOP, tokens=20, counters=COUNTERS, at=after(9)),
)

event = partial(
    replace,
    EventLogged(
        id="event-1",
        edge="edge-1",
        device="sensor-1",
        session=SESSION,
        kind="fault",
        code="tokens-differ",
        sentence="The prefix differs.",
        at=after(1),
        severity=Severity.INFO,
    ),
)

quarantined = partial(
    replace,
    DeviceQuarantined(
        device="sensor-1",
        by="edge-1",
        since_at=START,
        until_at=after(60),
        reason="It sent 2,000 drafts.",
        strikes=40,
        level=2,
    ),
)


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

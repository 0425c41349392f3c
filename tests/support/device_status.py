"""What a device says of itself at /status."""

from typing import Any


def device_status(**given: Any) -> dict[str, Any]:
    return {
        "status": "ok",
        "reason": None,
        "software": "9.9",
        "fleet": "home",
        "device": "device-1",
        "since": "2026-01-02T00:00:00+00:00",
        "drafter": {"name": "toy", "quantization": "Q4_0", "context": 2048},
        "broker": {"host": "127.0.0.1", "port": 1883, "connected": True},
        "edges": [{"edge": "edge-1", "presence": "online", "target": "toy-target", "software": "9.9"}],
        "sessions": {"writing": 1, "at_once": 2, "waiting": 2, "ended": 3, "tokens": 1234},
        "offline": "fail",
        "unverified": 0,
        "acceptance": 0.815,
        "round_trip_ms": 41.7,
        "mean_draft": 4.25,
        "draft_ms_per_token": 11.3,
        "temperature_c": 51.2,
        "throttled": None,
        "joules_per_token": None,
        "plan": "ahead",
        "plan_reason": "Drafting ahead 31.0 tokens/s with 5 a draft.",
        **given,
    }

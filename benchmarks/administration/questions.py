"""What administrators and pages ask of a session log, and the pages of the dashboard."""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

from benchmarks.administration.filling import name_of
from fleet_edge.session_log import SessionLog

Question = Callable[[SessionLog], object]

PAGES: Final = (
    "/",
    "/?range=1h",
    "/?range=30d",
    "/?range=365d",
    "/devices",
    "/devices/{device}",
    "/edges",
    "/sessions",
    "/sessions?device={device}",
    "/sessions?edge=edge-rare",
    "/sessions?reason=failed",
    "/sessions/{session}",
    "/usage",
    "/usage?range=30d",
    "/usage?range=365d&by=device",
    "/rollouts",
    "/alerts",
    "/audit",
)


def questions(now: datetime, devices: int) -> Mapping[str, Question]:
    """Return the questions by name, to a log that ends now and has devices of these numbers."""
    device, three = name_of(min(7, devices - 1)), [name_of(number) for number in range(min(3, devices))]
    middle, month = now - timedelta(days=20), now - timedelta(days=30)
    return {
        "devices": lambda log: log.devices(),
        "device": lambda log: log.device(device),
        "hours of a device": lambda log: log.hours(device),
        "edges": lambda log: log.edges(),
        "sessions": lambda log: log.sessions(),
        "sessions of a device": lambda log: log.sessions(device=device),
        "sessions of three devices": lambda log: log.sessions(device=three),
        "sessions at an edge": lambda log: log.sessions(edge="edge-1"),
        "sessions at an edge that has served few": lambda log: log.sessions(edge="edge-rare"),
        "sessions at an edge that has served none": lambda log: log.sessions(edge="nowhere"),
        "sessions at an edge in the middle": lambda log: log.sessions(edge="edge-1", until=middle),
        "sessions that failed": lambda log: log.sessions(reason="failed"),
        "sessions that failed at an edge": lambda log: log.sessions(reason="failed", edge="edge-1"),
        "sessions that failed at a rare edge": lambda log: log.sessions(reason="failed", edge="edge-rare"),
        "sessions of a mode": lambda log: log.sessions(mode="coupled"),
        "sessions that are open": lambda log: log.sessions(open=True),
        "sessions of a day in the middle": lambda log: log.sessions(since=middle, until=middle + timedelta(days=1)),
        "one session": lambda log: log.session(log.sessions(limit=1)[0].session[:10]),
        "segments of a session": lambda log: log.segments(log.sessions(limit=1)[0].session),
        "events": lambda log: log.events(),
        "events of a device": lambda log: log.events(device=device),
        "events of a code": lambda log: log.events(code="desync"),
        "events of a day in the middle": lambda log: log.events(since=middle, until=middle + timedelta(days=1)),
        "events counted, of a day": lambda log: log.event_counts(since=now - timedelta(days=1)),
        "events counted, of a week": lambda log: log.event_counts(since=now - timedelta(days=7)),
        "events counted, of all": lambda log: log.event_counts(),
        "stats": lambda log: log.stats(),
        "stats by device": lambda log: log.stats(by="device"),
        "stats by edge": lambda log: log.stats(by="edge"),
        "stats by draft": lambda log: log.stats(by="draft"),
        "stats by app": lambda log: log.stats(by="app"),
        "stats by day": lambda log: log.stats(by="day"),
        "stats by month": lambda log: log.stats(by="month"),
        "stats by hour, two days": lambda log: log.stats(by="hour", since=now - timedelta(days=2)),
        "stats of an hour": lambda log: log.stats(since=now - timedelta(hours=1)),
        "stats of a day": lambda log: log.stats(since=now - timedelta(days=1)),
        "stats of a week by device": lambda log: log.stats(since=now - timedelta(days=7), by="device"),
        "stats of a month by device": lambda log: log.stats(since=month, by="device"),
        "usage by app and day, a month": lambda log: log.usage(since=month, by=("app",), grain="day"),
        "usage of a device by day": lambda log: log.usage(device=device, grain="day"),
        "latencies": lambda log: log.latencies(),
        "latencies of a day": lambda log: log.latencies(since=now - timedelta(days=1)),
        "latest": lambda log: log.latest(),
    }

"""What `fleet admin` shows: one table for each kind of view, units in the headers."""

from typing import TYPE_CHECKING, Final

from fleet_cli.tables import cell, describe, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fleet_edge.store.views import (
        DeviceView,
        EventView,
        HourView,
        RoundView,
        SegmentView,
        SessionView,
        Tally,
    )

__all__ = [
    "show_device",
    "show_devices",
    "show_events",
    "show_rounds",
    "show_session",
    "show_sessions",
    "show_stats",
]

_TALLY_COLUMNS: Final = (
    "sessions",
    "tokens",
    "tokens/s per session",
    "acceptance",
    "rounds",
    "mean batch",
    "up B/token",
    "down B/token",
    "queue ms/round",
    "compute ms/round",
)


def show_devices(found: "Sequence[DeviceView]") -> None:
    """List devices."""
    columns = ("device", "presence", "draft model", "quantization", "software", "sessions")
    print_table(
        f"Devices: {len(found)}",
        (*columns, "last session (UTC)", "last seen (UTC)", "silent since (UTC)"),
        [
            [
                view.device,
                view.presence,
                view.draft_model,
                view.quantization,
                view.software,
                view.sessions,
                view.last_session_at,
                view.seen_at,
                view.silent_since,
            ]
            for view in found
        ],
    )


def show_device(
    found: "DeviceView",
    *,
    hours: "Sequence[HourView]",
    sessions: "Sequence[SessionView]",
    events: "Sequence[EventView]",
) -> None:
    """Show a device with what it did of late."""
    describe(
        f"Device {cell(found.device)}",
        [
            ("presence", found.presence),
            ("silent since (UTC)", found.silent_since),
            ("software", found.software),
            ("draft model", found.draft_model),
            ("quantization", found.quantization),
            ("first seen (UTC)", found.first_seen_at),
            ("last seen (UTC)", found.seen_at),
            ("sessions", found.sessions),
        ],
    )
    if hours:
        rows = [[view.hour, *_tally_row(view.counted)] for view in hours]
        print_table("Latest hours", ("hour (UTC)", *_TALLY_COLUMNS), rows)
    show_sessions("Latest sessions", sessions)
    show_events(events)


def show_sessions(title: str, found: "Sequence[SessionView]") -> None:
    """List sessions."""
    columns = ("session", "device", "edge", "opened (UTC)", "mode", "draft", "prompt tokens", "tokens", "tokens/s")
    print_table(
        title,
        (*columns, "acceptance", "rounds", "mean batch", "up B/token", "down B/token", "ended"),
        [
            [
                view.session,
                view.device,
                view.edge,
                view.opened_at,
                view.mode,
                _model(view.draft_model, view.quantization),
                view.prompt_tokens,
                view.counted.tokens,
                view.counted.tokens_per_s,
                _ratio(view.counted.acceptance),
                view.counted.rounds,
                view.counted.mean_batch,
                view.counted.uplink_bytes_per_token,
                view.counted.downlink_bytes_per_token,
                view.reason or "open",
            ]
            for view in found
        ],
    )


def show_session(found: "SessionView", *, segments: "Sequence[SegmentView]") -> None:
    """Show a session: what the edges counted beside what the device counted."""
    describe(f"Session {found.session}", _facts(found))
    print_table("Counted", ("", "by the edge", "by the device"), _comparison(found))
    columns = ("opened (UTC)", "edge", "target", "draft", "resumed tokens", "tokens", "rounds", "acceptance")
    print_table(
        "Segments",
        (*columns, "open B", "ended"),
        [
            [
                view.opened_at,
                view.edge,
                view.target,
                _model(view.draft_model, view.quantization),
                view.resumed_tokens,
                view.counted.tokens,
                view.counted.rounds,
                _ratio(view.counted.acceptance),
                view.open_bytes,
                view.reason or "open",
            ]
            for view in segments
        ],
    )


def show_rounds(found: "Sequence[RoundView]") -> None:
    """List the rounds of a session."""
    columns = ("judged (UTC)", "round", "base", "drafted", "tested", "accepted", "batch", "up B", "down B", "form")
    print_table(
        f"Rounds: {len(found)}" if found else "No rounds: the session was not traced, or they were purged",
        (*columns, "queue ms", "compute ms"),
        [
            [
                view.at,
                view.round,
                view.base,
                view.drafted,
                view.tested,
                view.accepted,
                view.batch,
                view.uplink_bytes,
                view.downlink_bytes,
                view.form,
                view.queue_ms,
                view.compute_ms,
            ]
            for view in found
        ],
    )


def show_events(found: "Sequence[EventView]") -> None:
    """List events, if there are any."""
    if found:
        rows = [[view.at, view.edge, view.device, view.kind, view.code, view.sentence] for view in found]
        print_table("Latest events", ("at (UTC)", "edge", "device", "kind", "code", "what happened"), rows)


def show_stats(title: str, *, by: str | None, found: "Mapping[str, Tally]") -> None:
    """List tallies by name."""
    print_table(title, (by or "", *_TALLY_COLUMNS), [[name, *_tally_row(tally)] for name, tally in found.items()])


def _tally_row(tally: "Tally") -> list[object]:
    return [
        tally.sessions,
        tally.tokens,
        tally.tokens_per_s,
        _ratio(tally.acceptance),
        tally.rounds,
        tally.mean_batch,
        tally.uplink_bytes_per_token,
        tally.downlink_bytes_per_token,
        tally.queue_ms_per_round,
        tally.compute_ms_per_round,
    ]


def _facts(found: "SessionView") -> list[tuple[str, object]]:
    shaping = f"{found.temperature:g}, {found.top_k}, {found.top_p:g}" if found.temperature is not None else None
    return [
        ("device", found.device),
        ("draft model", _model(found.draft_model, found.quantization)),
        ("target model", found.target),
        ("mode", found.mode),
        ("temperature, top-k, top-p", shaping),
        ("seed", None if found.seed is None else str(found.seed)),
        ("prompt tokens", found.prompt_tokens),
        ("most new tokens", found.max_new_tokens),
        ("opened (UTC)", found.opened_at),
        ("closed (UTC)", found.closed_at),
        ("ended", found.reason or "open"),
        ("tokens at the end", found.final_tokens),
        ("draft model ms (device)", found.device_draft_ms),
        ("waiting ms (device)", found.device_wait_ms),
        ("of that network ms", found.network_ms),
        ("queue ms (edge)", found.counted.queue_ms),
        ("compute ms (edge)", found.counted.compute_ms),
        ("wall ms (device)", found.device_wall_ms),
        ("mean batch (sessions)", found.counted.mean_batch),
    ]


def _comparison(found: "SessionView") -> list[list[object]]:
    edge = found.counted
    return [
        ["tokens", edge.tokens, found.device_tokens],
        ["rounds", edge.rounds, found.device_rounds],
        ["drafted tokens", edge.drafted, found.device_drafted],
        ["tested tokens", edge.tested, found.device_tested],
        ["accepted tokens", edge.accepted, found.device_accepted],
        ["acceptance", _ratio(edge.acceptance), _ratio(found.device_acceptance)],
        ["uplink bytes", edge.uplink_bytes, found.device_uplink_bytes],
        ["downlink bytes", edge.downlink_bytes, found.device_downlink_bytes],
    ]


def _model(name: str | None, quantization: str | None) -> str | None:
    return " ".join(part for part in (name, quantization) if part) or None


def _ratio(value: float | None) -> str:
    return cell(value, digits=3)

"""Reports of `fleet admin` that have several parts: one device, one session."""

from typing import TYPE_CHECKING, Final

from fleet_admin.columns import Kind, shown
from fleet_admin.reports import EVENTS, RUNNING, SESSIONS, model_name, tally_columns
from fleet_cli.tables import Column, cell, describe, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleet_edge.store.views import DeviceView, EventView, HourView, RoundView, SegmentView, SessionView

_HOURS: "Final[list[Column[HourView]]]" = [
    Column("hour", lambda row: row.hour, "moment", rank=0),
    *tally_columns(lambda row: row.counted),
]

_SEGMENTS: "Final[list[Column[SegmentView]]]" = [
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
    Column("target", lambda row: row.target, rank=3),
    Column("draft model", lambda row: model_name(row.draft_model, row.quantization), rank=3),
]

_ROUNDS: "Final[list[Column[RoundView]]]" = [
    Column("judged", lambda row: f"{row.at:%H:%M:%S}", "state", rank=0),
    Column("round", lambda row: row.round, "count", rank=0),
    Column("drafted", lambda row: row.drafted, "count", rank=1),
    Column("tested", lambda row: row.tested, "count", rank=1),
    Column("accepted", lambda row: row.accepted, "count", rank=0),
    Column("batch", lambda row: row.batch, "count", rank=2),
    Column("up", lambda row: row.uplink_bytes, "bytes", rank=1),
    Column("down", lambda row: row.downlink_bytes, "bytes", rank=1),
    Column("queue", lambda row: row.queue_ms, "ms", rank=1),
    Column("step", lambda row: row.compute_ms, "ms", rank=1),
    Column("prompt wait", lambda row: row.prefill_ms, "ms", rank=2),
    Column("base", lambda row: row.base, "count", rank=3),
    Column("form", lambda row: row.form, rank=3),
]

_COMPARED: "Final[list[Column[tuple[str, str, str]]]]" = [
    Column("", lambda row: row[0], rank=0),
    Column("by the edge", lambda row: row[1], "number", rank=0),
    Column("by the device", lambda row: row[2], "number", rank=0),
]


def show_device(
    found: "DeviceView",
    *,
    hours: "Sequence[HourView]",
    sessions: "Sequence[SessionView]",
    events: "Sequence[EventView]",
    wide: bool = False,
) -> None:
    """Show a device with its latest hours, sessions and events."""
    describe(
        f"Device {cell(found.device)}",
        [
            ("state", found.state.value),
            ("since (UTC)", found.state_since),
            ("last sign (UTC)", found.last_sign_at),
            ("labels", " ".join(found.labels) or None),
            ("certificate until (UTC)", found.certificate_until),
            ("plan (device)", found.plan),
            ("round trip (device)", shown(found.round_trip_ms, "ms")),
            ("acceptance since its start (device)", shown(found.told_acceptance, "percent")),
            ("draft time per token (device)", shown(found.draft_ms_per_token, "ms")),
            ("telemetry (UTC)", found.telemetry_at),
            ("software", found.software),
            ("draft model", model_name(found.draft_model, found.quantization)),
            ("first seen (UTC)", found.first_seen_at),
            ("sessions", f"{found.sessions:,}"),
        ],
    )
    print_table("Latest hours", _HOURS, hours, wide=wide, empty="No hours: no edge has served it.\n")
    print_table("Latest sessions", SESSIONS, sessions, wide=wide, empty="No sessions, or they were purged.\n")
    show_events(events, wide=wide)


def show_session(found: "SessionView", *, segments: "Sequence[SegmentView]", wide: bool = False) -> None:
    """Show a session: what the edges counted next to what the device counted."""
    describe(f"Session {found.session}", _facts(found))
    print_table("Counted", _COMPARED, _comparison(found), wide=wide)
    print_table("Segments", _SEGMENTS, segments, wide=wide, empty="No segments: the session was served by no edge.\n")


def show_rounds(found: "Sequence[RoundView]", *, wide: bool = False) -> None:
    """List the rounds of a session."""
    empty = "No rounds: the session was not traced, or they were purged.\n"
    print_table(f"Rounds: {len(found)}", _ROUNDS, found, wide=wide, empty=empty)


def show_events(found: "Sequence[EventView]", *, wide: bool = False) -> None:
    """List the latest events of a device or a session."""
    print_table("Latest events", EVENTS, found, wide=wide, empty="No events.\n")


def _facts(found: "SessionView") -> list[tuple[str, object]]:
    shaping = f"{found.temperature:g}, {found.top_k}, {found.top_p:g}" if found.temperature is not None else None
    counted = found.counted
    facts: list[tuple[str, object, Kind]] = [
        ("device", found.device, "text"),
        ("draft model", model_name(found.draft_model, found.quantization), "text"),
        ("target model", found.target, "text"),
        ("mode", found.mode, "text"),
        ("temperature, top-k, top-p", shaping, "text"),
        ("seed", found.seed, "text"),
        ("prompt tokens", found.prompt_tokens, "count"),
        ("tokens prefilled (edge)", counted.prefill_tokens, "count"),
        ("tokens reused (edge)", counted.reused_tokens, "count"),
        ("most new tokens", found.max_new_tokens, "count"),
        ("opened (UTC)", found.opened_at, "moment"),
        ("closed (UTC)", found.closed_at, "moment"),
        ("ended", found.reason or RUNNING, "text"),
        *((("why", f"{found.end_sentence} ({found.end_code})", "text"),) if found.end_sentence else ()),
        ("first token (edge)", found.first_token_ms, "ms"),
        ("token gap p95 (edge)", found.gap_p95_ms, "ms"),
        ("tokens at the end", found.final_tokens, "count"),
        ("of that unverified (device)", found.device_unverified, "count"),
        ("tokens streamed (edge)", counted.streamed, "count"),
        ("of that guessed right (edge)", counted.guessed_right, "count"),
        ("guesses (edge)", counted.guessed, "count"),
        ("forced by a grammar (edge)", counted.forced, "count"),
        ("draft model time (device)", found.device_draft_ms, "ms"),
        ("waiting (device)", found.device_wait_ms, "ms"),
        ("of that network", found.network_ms, "ms"),
        ("queue (edge)", counted.queue_ms, "ms"),
        ("prompt (edge)", counted.prefill_ms, "ms"),
        ("steps (edge)", counted.compute_ms, "ms"),
        ("wall time (device)", found.device_wall_ms, "ms"),
        ("mean batch (sessions)", counted.mean_batch, "figure"),
    ]
    return [(name, shown(value, kind)) for name, value, kind in facts]


def _comparison(found: "SessionView") -> list[tuple[str, str, str]]:
    edge = found.counted
    rows: list[tuple[str, object, object, Kind]] = [
        ("tokens", edge.tokens, found.device_tokens, "count"),
        ("rounds", edge.rounds, found.device_rounds, "count"),
        ("drafted tokens", edge.drafted, found.device_drafted, "count"),
        ("tested tokens", edge.tested, found.device_tested, "count"),
        ("accepted tokens", edge.accepted, found.device_accepted, "count"),
        ("acceptance", edge.acceptance, found.device_acceptance, "percent"),
        ("uplink", edge.uplink_bytes, found.device_uplink_bytes, "bytes"),
        ("downlink", edge.downlink_bytes, found.device_downlink_bytes, "bytes"),
    ]
    return [(name, shown(one, kind), shown(other, kind)) for name, one, other, kind in rows]

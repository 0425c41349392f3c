"""Tables of `fleet admin`: one for each kind of view, units in the headers."""

from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeVar

from fleet_cli.tables import Column, cell, describe, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fleet_edge.store.views import (
        DeviceView,
        EventView,
        FenceView,
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
    "show_fences",
    "show_rounds",
    "show_session",
    "show_sessions",
    "show_stats",
]

_ACCEPTANCE: Final = "accep-\ntance"
_LEAST_DIGITS: Final = 8  # of a session's id: enough to find it again with `fleet admin session`

T = TypeVar("T")


def show_devices(found: "Sequence[DeviceView]", *, wide: bool = False) -> None:
    """List devices."""
    columns: list[Column[DeviceView]] = [
        Column("device", lambda view: view.device, folds=True),
        Column("presence", lambda view: view.presence, brief=_presence),
        Column("draft model", lambda view: _model(view.draft_model, view.quantization), folds=True),
        Column("software", lambda view: view.software, wide=True),
        Column("sessions", lambda view: view.sessions),
        Column("last session (UTC)", lambda view: view.last_session_at, wide=True),
        Column("last seen (UTC)", lambda view: view.seen_at, brief=lambda view: _minute(view.seen_at)),
        Column("silent since (UTC)", lambda view: view.silent_since, wide=True),
        Column("presence since (UTC)", lambda view: view.presence_since, wide=True),
        Column("plan", lambda view: view.plan, wide=True),
        Column("round trip ms", lambda view: view.round_trip_ms, wide=True),
        Column("acceptance 24 h", lambda view: view.acceptance_24h, wide=True, digits=3),
        Column("tokens today", lambda view: view.tokens_today, wide=True),
        Column("certificate until (UTC)", lambda view: view.certificate_until, wide=True),
    ]
    print_table(f"Devices: {len(found)}", columns, found, wide=wide)


def show_device(
    found: "DeviceView",
    *,
    hours: "Sequence[HourView]",
    sessions: "Sequence[SessionView]",
    events: "Sequence[EventView]",
    wide: bool = False,
) -> None:
    """Show a device with what it did of late."""
    describe(
        f"Device {cell(found.device)}",
        [
            ("presence", found.presence),
            ("presence since (UTC)", found.presence_since),
            ("silent since (UTC)", found.silent_since),
            ("certificate until (UTC)", found.certificate_until),
            ("plan (device)", found.plan),
            ("round trip ms (device)", found.round_trip_ms),
            ("acceptance since its start (device)", _ratio(found.told_acceptance)),
            ("draft ms/token (device)", found.draft_ms_per_token),
            ("told by the device (UTC)", found.telemetry_at),
            ("software", found.software),
            ("draft model", found.draft_model),
            ("quantization", found.quantization),
            ("first seen (UTC)", found.first_seen_at),
            ("last seen (UTC)", found.seen_at),
            ("sessions", found.sessions),
        ],
    )
    if hours:
        hour: Column[HourView] = Column("hour (UTC)", lambda view: view.hour, brief=lambda view: _minute(view.hour))
        print_table("Latest hours", [hour, *_tally_columns(lambda view: view.counted)], hours, wide=wide)
    show_sessions("Latest sessions", sessions, wide=wide)
    show_events(events, wide=wide)


def show_sessions(title: str, found: "Sequence[SessionView]", *, wide: bool = False) -> None:
    """List sessions."""
    digits = _telling_digits([view.session for view in found])
    offline = any(view.device_unverified for view in found)
    columns: list[Column[SessionView]] = [
        Column("session", lambda view: view.session, brief=lambda view: view.session[:digits]),
        Column("device", lambda view: view.device, folds=True),
        Column("edge", lambda view: view.edge, folds=True, wide=True),
        Column("opened (UTC)", lambda view: view.opened_at, brief=lambda view: _minute(view.opened_at)),
        Column("mode", lambda view: view.mode, wide=True),
        Column("draft", lambda view: _model(view.draft_model, view.quantization), folds=True, wide=True),
        Column("prompt tokens", lambda view: view.prompt_tokens, wide=True),
        Column("prefilled", lambda view: view.counted.prefill_tokens, wide=True),
        Column("reused", lambda view: view.counted.reused_tokens, wide=True),
        Column("tokens", lambda view: view.counted.tokens),
        Column("streamed", lambda view: view.counted.streamed, wide=True),
        Column("guessed", lambda view: view.counted.guessed, wide=True),
        Column("guessed right", lambda view: view.counted.guessed_right, wide=True),
        Column("forced", lambda view: view.counted.forced, wide=True),
        Column("tokens/s", lambda view: view.counted.tokens_per_s, narrow="tokens\n/s"),
        Column("acceptance", lambda view: view.counted.acceptance, narrow=_ACCEPTANCE, digits=3),
        Column("unverified", lambda view: view.device_unverified, narrow="unveri-\nfied", wide=not offline),
        Column("rounds", lambda view: view.counted.rounds, wide=True),
        Column("mean batch", lambda view: view.counted.mean_batch, wide=True),
        Column("up B/token", lambda view: view.counted.uplink_bytes_per_token, wide=True),
        Column("down B/token", lambda view: view.counted.downlink_bytes_per_token, wide=True),
        Column("first token ms", lambda view: view.first_token_ms, wide=True),
        Column("token gap p95 ms", lambda view: view.gap_p95_ms, wide=True),
        Column("ended", lambda view: view.reason or "open"),
        Column("why", lambda view: view.end_sentence, folds=True, wide=not any(view.end_sentence for view in found)),
    ]
    print_table(title, columns, found, wide=wide)


def show_session(found: "SessionView", *, segments: "Sequence[SegmentView]", wide: bool = False) -> None:
    """Show a session: what the edges counted beside what the device counted."""
    describe(f"Session {found.session}", _facts(found))
    print_table("Counted", _COMPARED, _comparison(found), wide=wide)
    columns: list[Column[SegmentView]] = [
        Column("opened (UTC)", lambda view: view.opened_at, brief=lambda view: _minute(view.opened_at)),
        Column("edge", lambda view: view.edge, folds=True),
        Column("target", lambda view: view.target, folds=True, wide=True),
        Column("draft", lambda view: _model(view.draft_model, view.quantization), folds=True, wide=True),
        Column("resumed tokens", lambda view: view.resumed_tokens, narrow="resumed\ntokens"),
        Column("prefilled", lambda view: view.counted.prefill_tokens, wide=True),
        Column("reused", lambda view: view.counted.reused_tokens, wide=True),
        Column("tokens", lambda view: view.counted.tokens),
        Column("rounds", lambda view: view.counted.rounds),
        Column("acceptance", lambda view: view.counted.acceptance, narrow=_ACCEPTANCE, digits=3),
        Column("open B", lambda view: view.open_bytes),
        Column("first token ms", lambda view: view.first_token_ms, wide=True),
        Column("token gap p95 ms", lambda view: view.gap_p95_ms, wide=True),
        Column("ended", lambda view: view.reason or "open"),
    ]
    print_table("Segments", columns, segments, wide=wide)


def show_rounds(found: "Sequence[RoundView]", *, wide: bool = False) -> None:
    """List the rounds of a session."""
    columns: list[Column[RoundView]] = [
        Column("judged (UTC)", lambda view: view.at, narrow="judged\n(UTC)", brief=lambda view: f"{view.at:%H:%M:%S}"),
        Column("round", lambda view: view.round),
        Column("base", lambda view: view.base, wide=True),
        Column("drafted", lambda view: view.drafted),
        Column("tested", lambda view: view.tested),
        Column("accepted", lambda view: view.accepted, narrow="accep-\nted"),
        Column("batch", lambda view: view.batch),
        Column("up B", lambda view: view.uplink_bytes),
        Column("down B", lambda view: view.downlink_bytes),
        Column("form", lambda view: view.form, wide=True),
        Column("queue ms", lambda view: view.queue_ms, narrow="queue\nms"),
        Column("prefill ms", lambda view: view.prefill_ms, wide=True),
        Column("compute ms", lambda view: view.compute_ms, narrow="compute\nms"),
    ]
    title = f"Rounds: {len(found)}" if found else "No rounds: the session was not traced, or they were purged"
    print_table(title, columns, found, wide=wide)


def show_events(found: "Sequence[EventView]", *, wide: bool = False) -> None:
    """List events, if there are any."""
    columns: list[Column[EventView]] = [
        Column("at (UTC)", lambda view: view.at, brief=lambda view: _minute(view.at)),
        Column("edge", lambda view: view.edge, folds=True),
        Column("device", lambda view: view.device, folds=True, wide=True),
        Column("kind", lambda view: view.kind, wide=True),
        Column("code", lambda view: view.code),
        Column("times", lambda view: view.count),
        Column("last (UTC)", lambda view: view.last_at, wide=True),
        Column("what happened", lambda view: view.sentence, folds=True),
    ]
    if found:
        print_table("Latest events", columns, found, wide=wide)


def show_fences(found: "Sequence[FenceView]", *, wide: bool = False) -> None:
    """List the devices that are fenced."""
    columns: list[Column[FenceView]] = [
        Column("device", lambda view: view.device, folds=True),
        Column("since (UTC)", lambda view: view.since_at, brief=lambda view: _minute(view.since_at)),
        Column("until (UTC)", lambda view: view.until_at or "lifted", brief=_until),
        Column("by", lambda view: view.by, folds=True),
        Column("strikes", lambda view: view.strikes, wide=True),
        Column("doubled", lambda view: view.level, wide=True),
        Column("reason", lambda view: view.reason, folds=True),
    ]
    print_table(f"Fenced devices: {len(found)}", columns, found, wide=wide)


def show_stats(title: str, *, by: str | None, found: "Mapping[str, Tally]", wide: bool = False) -> None:
    """List tallies by name."""
    name: Column[tuple[str, Tally]] = Column(by or "", lambda row: row[0], folds=True)
    print_table(title, [name, *_tally_columns(lambda row: row[1])], list(found.items()), wide=wide)


def _until(view: "FenceView") -> str:
    return "lifted" if view.until_at is None else _minute(view.until_at)


def _tally_columns(tally: "Callable[[T], Tally]") -> "list[Column[T]]":
    """Return the columns of a tally, which `tally` takes from a row."""
    return [
        Column("sessions", lambda row: tally(row).sessions),
        Column("tokens", lambda row: tally(row).tokens),
        Column("streamed tokens", lambda row: tally(row).streamed, wide=True),
        Column("guessed tokens", lambda row: tally(row).guessed, wide=True),
        Column("guessed right", lambda row: tally(row).guessed_right, wide=True),
        Column("forced tokens", lambda row: tally(row).forced, wide=True),
        Column("tokens/s per session", lambda row: tally(row).tokens_per_s, narrow="tokens/s\nper session"),
        Column("acceptance", lambda row: tally(row).acceptance, narrow=_ACCEPTANCE, digits=3),
        Column("rounds", lambda row: tally(row).rounds, wide=True),
        Column("mean batch", lambda row: tally(row).mean_batch, narrow="mean\nbatch"),
        Column("up B/token", lambda row: tally(row).uplink_bytes_per_token, wide=True),
        Column("down B/token", lambda row: tally(row).downlink_bytes_per_token, wide=True),
        Column("queue ms/round", lambda row: tally(row).queue_ms_per_round, narrow="queue ms\n/round"),
        Column("prefill ms/round", lambda row: tally(row).prefill_ms_per_round, wide=True),
        Column("prefilled tokens", lambda row: tally(row).prefill_tokens, wide=True),
        Column("reused tokens", lambda row: tally(row).reused_tokens, wide=True),
        Column("compute ms/round", lambda row: tally(row).compute_ms_per_round, narrow="compute\nms/round"),
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
        ("tokens prefilled (edge)", found.counted.prefill_tokens),
        ("tokens reused (edge)", found.counted.reused_tokens),
        ("most new tokens", found.max_new_tokens),
        ("opened (UTC)", found.opened_at),
        ("closed (UTC)", found.closed_at),
        ("ended", found.reason or "open"),
        *([("why", f"{found.end_sentence} ({found.end_code})")] if found.end_sentence else []),
        ("first token ms (edge)", found.first_token_ms),
        ("token gap p95 ms (edge)", found.gap_p95_ms),
        ("tokens at the end", found.final_tokens),
        ("of that unverified (device)", found.device_unverified),
        ("tokens streamed (edge)", found.counted.streamed),
        ("of that guessed right (edge)", found.counted.guessed_right),
        ("guesses (edge)", found.counted.guessed),
        ("forced by a grammar (edge)", found.counted.forced),
        ("draft model ms (device)", found.device_draft_ms),
        ("waiting ms (device)", found.device_wait_ms),
        ("of that network ms", found.network_ms),
        ("queue ms (edge)", found.counted.queue_ms),
        ("prefill ms (edge)", found.counted.prefill_ms),
        ("compute ms (edge)", found.counted.compute_ms),
        ("wall ms (device)", found.device_wall_ms),
        ("mean batch (sessions)", found.counted.mean_batch),
    ]


def _comparison(found: "SessionView") -> list[tuple[str, object, object]]:
    edge = found.counted
    return [
        ("tokens", edge.tokens, found.device_tokens),
        ("rounds", edge.rounds, found.device_rounds),
        ("drafted tokens", edge.drafted, found.device_drafted),
        ("tested tokens", edge.tested, found.device_tested),
        ("accepted tokens", edge.accepted, found.device_accepted),
        ("acceptance", _ratio(edge.acceptance), _ratio(found.device_acceptance)),
        ("uplink bytes", edge.uplink_bytes, found.device_uplink_bytes),
        ("downlink bytes", edge.downlink_bytes, found.device_downlink_bytes),
    ]


_COMPARED: Final[list[Column[tuple[str, object, object]]]] = [
    Column("", lambda row: row[0]),
    Column("by the edge", lambda row: row[1]),
    Column("by the device", lambda row: row[2]),
]


def _presence(view: "DeviceView") -> str | None:
    """Return a device's last word, or that nothing has come for long."""
    return view.presence if view.silent_since is None else "silent"


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"


def _telling_digits(sessions: "Sequence[str]") -> int:
    """Return how many digits of the ids tell the sessions apart."""
    whole = max(map(len, sessions), default=_LEAST_DIGITS)
    enough = (
        digits for digits in range(_LEAST_DIGITS, whole) if len({id_[:digits] for id_ in sessions}) == len(sessions)
    )
    return next(enough, whole)


def _model(name: str | None, quantization: str | None) -> str | None:
    return " ".join(part for part in (name, quantization) if part) or None


def _ratio(value: float | None) -> str:
    return cell(value, digits=3)

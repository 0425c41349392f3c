"""Command `fleet admin usage`: sums by dimension and time, and two periods compared."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleet_admin.columns import ABSENT, Kind, shown
from fleet_admin.usage import DIMENSIONS, usage_report
from fleet_cli.admin.listing import Listing, with_listing
from fleet_cli.commands import CommandError
from fleet_cli.options import DEFAULT_DB, Database, open_log
from fleet_cli.tables import Column, cell, print_table
from fleet_common.validation import read_time

if TYPE_CHECKING:
    from fleet_edge.session_log import SessionLog

_DAY: Final = timedelta(days=1)
_MONTH: Final = re.compile(r"(\d{4})-(\d{2})", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_HELP: Final = "today, yesterday, this-week, last-week, this-month, last-month, 2026-11, 2026-11-03, 7d, or FROM..TO"


@dataclass(frozen=True, slots=True)
class UsagePeriod:
    """A period (UTC); `until` is exclusive."""

    name: str
    since: datetime
    until: datetime  # now, if the period has not ended
    goes_on: bool = False  # whether it ends later

    @property
    def hours(self) -> float:
        return (self.until - self.since) / timedelta(hours=1)


def read_period(text: str, *, now: datetime) -> UsagePeriod:
    """Return a period by its name; none ends after `now`.

    The parts of `FROM..TO` are ages or ISO 8601 times; TO may be `now`. Raises `CommandError` if the name is invalid.
    """
    since, end = _limits(text.strip(), now.astimezone(UTC))
    until = min(end, now)
    if since >= until:
        raise CommandError(f"The period {cell(text)!r} is empty or has not begun; take {_HELP}.")
    return UsagePeriod(text.strip(), since, until, goes_on=end > now)


def equal_parts(one: UsagePeriod, other: UsagePeriod) -> tuple[UsagePeriod, UsagePeriod]:
    """Cut a complete period to the length of a running one, so that both can be compared."""
    if one.goes_on and not other.goes_on:
        return one, _cut(other, one.until - one.since)
    if other.goes_on and not one.goes_on:
        return _cut(one, other.until - other.since), other
    return one, other


def _cut(period: UsagePeriod, length: timedelta) -> UsagePeriod:
    return replace(period, until=min(period.until, period.since + length))


def _limits(text: str, now: datetime) -> tuple[datetime, datetime]:
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    week, month = today - today.weekday() * _DAY, today.replace(day=1)
    named = {
        "today": (today, today + _DAY),
        "yesterday": (today - _DAY, today),
        "this-week": (week, week + 7 * _DAY),
        "last-week": (week - 7 * _DAY, week),
        "this-month": (month, (month + 31 * _DAY).replace(day=1)),
        "last-month": ((month - _DAY).replace(day=1), month),
    }
    if text in named:
        return named[text]
    try:
        if found := _MONTH.fullmatch(text):
            begin = datetime(int(found[1]), int(found[2]), 1, tzinfo=UTC)
            return begin, (begin + 31 * _DAY).replace(day=1)
        if _DATE.fullmatch(text):
            begin = datetime.fromisoformat(text).replace(tzinfo=UTC)
            return begin, begin + _DAY
        begin_text, dots, end_text = text.partition("..")
        end = now if not dots or end_text in {"", "now"} else read_time(end_text, now=now)
        return read_time(begin_text, now=now), end
    except (ValueError, OverflowError):
        raise CommandError(f"{cell(text)!r} is no period: take {_HELP}.") from None


_GRAINS: Final = ("hour", "day", "month")


@with_listing()
def usage(
    listing: Listing,
    by: Annotated[
        str | None,
        typer.Option(metavar=",".join(DIMENSIONS), help="Rows for each of these; by default app, or the time."),
    ] = None,
    per: Annotated[str | None, typer.Option(metavar="hour|day|month", help="Rows for each hour, day or month.")] = None,
    between: Annotated[str | None, typer.Option(metavar="PERIOD,PERIOD", help=f"Compare two periods: {_HELP}.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, an ISO 8601 time (UTC), or last-week, 2026-11 …")
    ] = None,
    until: Annotated[str | None, typer.Option(help="End, like --since; of a period its begin.")] = None,
    edge: Annotated[str | None, typer.Option(help="With --between: only this edge.")] = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Add up tokens, latencies, acceptance and bytes by application, device, edge, model, label or time."""
    now = datetime.now(UTC)
    if between is not None:
        if by or per or since or until or listing.filters or listing.sort or listing.as_csv:
            raise CommandError("--between goes with --edge and --json alone: it compares sums of all devices.")
        _compare(between, edge, db, as_json=listing.as_json)
        return
    if edge is not None:
        raise CommandError(f"--edge goes with --between; write the filter edge={cell(edge)} instead.")
    if per not in {None, *_GRAINS}:
        raise CommandError(f"--per takes hour, day or month, not {cell(per)!r}.")
    names = _names("app" if by is None and per is None else by or "")
    begin, end = (None if each is None else _limits(each.strip(), now)[0] for each in (since, until))
    with open_log(db) as log:
        replace(listing, since=begin, until=end).show(usage_report(log, names, per, now=now))


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if unknown := [name for name in names if name not in DIMENSIONS]:
        raise CommandError(f"--by takes {', '.join(DIMENSIONS)}, not {cell(unknown[0])!r}; for times see --per.")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """A figure of two periods; `kind` is its format, as in `fleet_admin.columns`."""

    figure: str
    kind: Kind
    before: float | None
    after: float | None

    @property
    def change_percent(self) -> float | None:
        if self.before is None or self.after is None or not self.before:
            return None
        return 100.0 * (self.after - self.before) / self.before


def _compare(text: str, edge: str | None, db: str, *, as_json: bool) -> None:
    now = datetime.now(UTC)
    words = text.split(",")
    if len(words) != 2:  # noqa: PLR2004
        raise CommandError(f"--between takes two periods with a comma between them, not {cell(text)!r}: {_HELP}.")
    named = read_period(words[0], now=now), read_period(words[1], now=now)
    periods = equal_parts(*named)
    with open_log(db) as log:
        before, after = (_figures(log, period, edge) for period in periods)
    found = [
        _Compared(figure=name, kind=kind, before=value, after=after[name][0]) for name, (value, kind) in before.items()
    ]
    columns: list[Column[_Compared]] = [
        Column("", lambda row: row.figure, rank=0),
        Column(_heading(periods[0]), lambda row: shown(row.before, row.kind), "number", key="before", rank=0),
        Column(_heading(periods[1]), lambda row: shown(row.after, row.kind), "number", key="after", rank=0),
        Column("change", lambda row: _percent(row.change_percent), "number", rank=0),
    ]
    title = "Periods compared"
    if periods != named:
        cut, other = named if periods[0] != named[0] else named[::-1]
        title += f": {cell(cut.name)} cut to the length of {cell(other.name)}"
    print_table(title, columns, found, as_json=as_json)


def _figures(log: "SessionLog", period: UsagePeriod, edge: str | None) -> "Mapping[str, tuple[float | None, Kind]]":
    """Return value and format of each figure, by name."""
    limits: dict[str, Any] = {"since": period.since, "until": period.until}
    [view] = log.usage(**limits, edge=edge)
    counted, latencies = view.counted, log.latencies(**limits, edge=edge)
    first, gap = latencies["first_token"], latencies["gap"]
    figures: dict[str, tuple[float | None, Kind]] = {
        "hours": (period.hours, "figure"),
        "sessions": (counted.sessions, "count"),
        "tokens": (counted.tokens, "count"),
        "tokens per hour": (counted.tokens / period.hours, "count"),
        "tokens/s per session": (counted.tokens_per_s, "figure"),
        "acceptance": (counted.acceptance, "percent"),
        "first token p50": (first.quantile(0.5), "ms"),
        "first token p95": (first.quantile(0.95), "ms"),
        "token gap p95": (gap.quantile(0.95), "ms"),
        "queue per round": (counted.queue_ms_per_round, "ms"),
        "step per round": (counted.compute_ms_per_round, "ms"),
        "up": (counted.uplink_bytes, "bytes"),
        "down": (counted.downlink_bytes, "bytes"),
        "resumes": (counted.segments - counted.sessions, "count"),
    }
    if edge is None:
        figures |= {f"sessions {reason}": (number, "count") for reason, number in log.ends(**limits).items()}
    asked: dict[str, dict[str, Any]] = {"refusals": {"kind": "refused"}, "errors": {"severity": "error"}}
    for name, chosen in asked.items():
        counts = log.event_counts(by=(), **limits, edge=edge, **chosen)
        figures[name] = (sum(count.times for count in counts), "count")
    return figures


def _heading(period: UsagePeriod) -> str:
    return f"{cell(period.name)} {period.since:%m-%d %H:%M} to {period.until:%m-%d %H:%M}"


def _percent(change: float | None) -> str:
    return ABSENT if change is None else f"{change:+,.1f} %"


def register(app: typer.Typer) -> None:
    app.command()(usage)

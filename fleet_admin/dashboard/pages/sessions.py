"""Page of a session with its rounds in time.

An edge knows when a draft arrived and what it did until the verdict. The time between a verdict and the next draft is
the device's drafting and the link both ways; the device's mean time per token says which part was drafting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from starlette.responses import Response

from fleet_admin.columns import Column
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.grid import number_from_one
from fleet_admin.dashboard.visit import Page, Visit
from fleet_admin.reports import COMPARED, ROUNDS, SEGMENTS, SESSION_FACTS, compared
from fleet_edge.session_log import NotFound, RoundView, SegmentView, SessionView, StoreError, StoreUnavailable

_MILLISECOND: Final = timedelta(milliseconds=1)

STRETCHES: Final = (
    ("draft", "drafting, by the device's mean time for a token"),
    ("link", "link, both ways"),
    ("away", "drafting and link"),
    ("queue", "waiting for the step"),
    ("prefill", "prompt"),
    ("compute", "step"),
)
"""Kinds of stretches, and what they are."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a round's time, of a kind of `STRETCHES`; `begin_ms` is since the first instant shown."""

    kind: str
    begin_ms: float
    length_ms: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A round's stretches in order; `begin_ms` is that of the first."""

    round: RoundView
    stretches: tuple[Stretch, ...]

    @property
    def begin_ms(self) -> float:
        return self.stretches[0].begin_ms

    @property
    def end_ms(self) -> float:
        last = self.stretches[-1]
        return last.begin_ms + last.length_ms

    def length_of(self, kind: str) -> float | None:
        """Return the duration of a kind of stretch; None if there was none."""
        found = [each.length_ms for each in self.stretches if each.kind == kind]
        return sum(found) if found else None


def bars(rounds: Sequence[RoundView], *, session: SessionView, before: datetime) -> list[Bar]:
    """Arrange rounds in time; `before` is the time of the preceding verdict or of the session's Open."""
    each_ms = _draft_ms(session)
    found, origin, last = list[Bar](), before, before
    for each in rounds:
        at_edge = [("queue", each.queue_ms), ("prefill", each.prefill_ms), ("compute", each.compute_ms)]
        arrived = each.at - sum(length for _, length in at_edge) * _MILLISECOND
        away_ms = (arrived - last) / _MILLISECOND
        begin = arrived
        stretches = list[tuple[str, float]]()
        # A draft that came before the last verdict was drafted ahead: it caused no wait.
        if away_ms > 0:
            begin = last
            if each_ms is None:
                stretches.append(("away", away_ms))
            else:
                draft_ms = min(each.drafted * each_ms, away_ms)
                stretches += [("draft", draft_ms), ("link", away_ms - draft_ms)]
        found.append(_bar(each, [*stretches, *at_edge], begin_ms=(begin - origin) / _MILLISECOND))
        last = max(last, each.at)
    return found


def scale(shown: Sequence[Bar]) -> tuple[float, float]:
    """Return begin and length of the chart, in milliseconds."""
    begin = min((bar.begin_ms for bar in shown), default=0.0)
    return begin, max(max((bar.end_ms for bar in shown), default=0.0) - begin, 1e-3)


def _draft_ms(session: SessionView) -> float | None:
    """Return the mean draft time per token; None if unknown."""
    if not session.device_drafted or session.device_draft_ms is None:
        return None
    return session.device_draft_ms / session.device_drafted


def _bar(round_: RoundView, lengths: Sequence[tuple[str, float]], *, begin_ms: float) -> Bar:
    stretches, at = list[Stretch](), begin_ms
    for kind, length in lengths:
        if length > 0 or kind == "compute":
            stretches.append(Stretch(kind, at, max(length, 0.0)))
        at += max(length, 0.0)
    return Bar(round_, tuple(stretches))


_ROUNDS: Final = 25
_EVENTS: Final = 50
_MAX_SEGMENTS: Final = 100
_WIDTH: Final = 1_000
"""Width of a bar, in units of its SVG."""

_MIN_WIDTH: Final = 1.5


def _of_round(column: Column[RoundView]) -> Column[Bar]:
    return replace(column, source=lambda bar: column.value(bar.round))  # type: ignore[arg-type, return-value]


_BARS: Final[list[Column[Bar]]] = [
    *map(_of_round, ROUNDS),
    Column("drafting", lambda bar: bar.length_of("draft"), "ms"),
    Column("link", lambda bar: bar.length_of("link") or bar.length_of("away"), "ms", meaning="Both ways."),
]


def show_session(visit: Visit) -> Response:
    session = _find(visit)
    log, device = visit.services.log, session.device
    segments = log.segments(session.session, device=device)
    first = number_from_one(visit.query("first", "1"), "first round")
    # One more on either side: the one before dates the first draft, the one after says whether there are more.
    skip = max(first - 2, 0)
    found = log.rounds(session.session, device=device, skip=skip, limit=_ROUNDS + 2)
    before, shown = found[: first - 1 - skip], found[first - 1 - skip :]
    laid = bars(shown[:_ROUNDS], session=session, before=_begin(before, segments, session))
    begin_ms, length_ms = scale(laid)
    return visit.page(
        "session.html",
        title=f"Session {session.session}",
        session=session,
        facts=SESSION_FACTS,
        counter_columns=COMPARED,
        counters=compared(session),
        segment_columns=SEGMENTS,
        bar_columns=_BARS,
        segments=segments[-_MAX_SEGMENTS:],
        events=log.events(session=session.session, device=device, limit=_EVENTS),
        bars=laid,
        pictures=[
            [
                (each.kind, _place(each.begin_ms - begin_ms, length_ms), _width(each.length_ms, length_ms))
                for each in bar.stretches
            ]
            for bar in laid
        ],
        width=_WIDTH,
        length_ms=length_ms,
        stretches=[(kind, words) for kind, words in STRETCHES if any(bar.length_of(kind) for bar in laid)],
        first=first,
        earlier=max(first - _ROUNDS, 1) if first > 1 else None,
        later=first + _ROUNDS if len(shown) > _ROUNDS else None,
    )


def _find(visit: Visit) -> SessionView:
    name, device = visit.path("session"), visit.query("device") or None
    try:
        return visit.services.log.session(name, device=device)
    except (NotFound, StoreUnavailable):
        raise
    except StoreError as error:
        raise Problem(400, str(error)) from error


def _begin(before: list[RoundView], segments: list[SegmentView], session: SessionView) -> datetime:
    """Return the earliest possible begin of the first round shown."""
    if before:
        return before[-1].at
    return segments[0].opened_at if segments else session.opened_at


def _place(begin_ms: float, whole_ms: float) -> str:
    return f"{_WIDTH * begin_ms / whole_ms:.2f}"


def _width(length_ms: float, whole_ms: float) -> str:
    return f"{max(_WIDTH * length_ms / whole_ms, _MIN_WIDTH):.2f}"


PAGES: Final = (Page("/sessions/{session}", "Session", show_session),)

"""One session: what is known of it, its stays at edges, its rounds in time, its events."""

from datetime import datetime
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.timeline import STRETCHES, bars, scale
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.written_text import WrittenText, written_text
from fleet_edge.store.errors import NotFound, StoreError, StoreUnavailable
from fleet_edge.store.views import RoundView, SegmentView, SessionView

_ROUNDS: Final = 25
_EVENTS: Final = 50
_MOST_SEGMENTS: Final = 100
_WIDTH: Final = 1_000
"""Of a bar, in the units of its picture."""

_LEAST_WIDTH: Final = 1.5


def show(visit: Visit) -> Response:
    session = _find(visit)
    log, device = visit.services.log, session.device
    segments = log.segments(session.session, device=device)
    first = _number(visit.query("first", "1"))
    # One more on either side: that before says when the first draft could begin, that behind whether there are more.
    skip = max(first - 2, 0)
    found = log.rounds(session.session, device=device, skip=skip, limit=_ROUNDS + 2)
    before, shown = found[: first - 1 - skip], found[first - 1 - skip :]
    laid = bars(shown[:_ROUNDS], session=session, before=_begin(before, segments, session))
    begin_ms, length_ms = scale(laid)
    return visit.page(
        "session.html",
        title=f"Session {session.session}",
        session=session,
        segments=segments[-_MOST_SEGMENTS:],
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
        text=_text(visit, session),
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


def _text(visit: Visit, session: SessionView) -> WrittenText | None:
    """Return what is stored of the text; what it says is for operators."""
    stored = visit.services.log.text(session.session, device=session.device)
    return None if stored is None else written_text(stored, readable=visit.may_act)


def _begin(before: list[RoundView], segments: list[SegmentView], session: SessionView) -> datetime:
    """Return when the first round that is shown could begin."""
    if before:
        return before[-1].at
    return segments[0].opened_at if segments else session.opened_at


def _place(begin_ms: float, whole_ms: float) -> str:
    return f"{_WIDTH * begin_ms / whole_ms:.2f}"


def _width(length_ms: float, whole_ms: float) -> str:
    return f"{max(_WIDTH * length_ms / whole_ms, _LEAST_WIDTH):.2f}"


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 7 or int(text) < 1:  # noqa: PLR2004
        raise Problem(400, "The number of a round is 1 or more.")
    return int(text)


PAGES: Final = (Page("/sessions/{session}", "Session", show),)

"""Sessions: the latest first, chosen by who, where and how they ended; older ones page by page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import quote, urlencode

from starlette.responses import Response

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.grid import MOST_SHOWN, Link
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_admin.reports import RUNNING, SESSIONS
from fleet_edge.session_log import SessionLog
from fleet_edge.store.views import SessionView
from schemas.policy import Mode
from schemas.reasons import EndReason

_PATH: Final = "/sessions"
_PAGE: Final = 100
_CSV_PAGE: Final = 500
_MOST_CSV: Final = 200_000
"""Sessions in one CSV; `fleet admin export` gives more, faster."""

_MOST_SKIPPED: Final = 10_000
_INSTANT: Final = timedelta(microseconds=1)
_CHOICES: Final = ("device", "edge", "reason", "mode", "since", "until")


def address_of(session: SessionView) -> str:
    """Return the address of a session's page. With its device: two may have named sessions alike."""
    return f"{_PATH}/{session.session}?{urlencode({'device': session.device})}"


def _device(session: SessionView) -> str:
    return f"/devices/{quote(session.device, safe='')}"


_LINKS: Final[dict[str, Link[SessionView]]] = {"session": address_of, "device": _device}
_SHOWN: Final = [column for column in SESSIONS if column.rank <= MOST_SHOWN]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a page begins: behind `skip` of the sessions that were opened at this instant, and all later ones."""

    opened_at: datetime
    skip: int

    @classmethod
    def read(cls, text: str) -> "_Place | None":
        """Read it from the address.

        Raises:
            Problem: It was not made here.
        """
        if not text:
            return None
        at, _, skip = text.partition("_")
        if not (at.isascii() and at.isdigit() and skip.isascii() and skip.isdigit() and len(text) < 32):  # noqa: PLR2004
            raise Problem(400, "The page's address is damaged; begin with the first page.")
        try:
            opened_at = datetime.fromtimestamp(0, UTC) + int(at) * _INSTANT
        except OverflowError:
            raise Problem(400, "The page's address is damaged; begin with the first page.") from None
        return cls(opened_at, min(int(skip), _MOST_SKIPPED))

    @classmethod
    def after(cls, rows: Sequence[SessionView], before: "_Place | None") -> "_Place":
        """Return where the page behind these rows begins."""
        last = rows[-1].opened_at
        alike = sum(row.opened_at == last for row in rows)
        skipped = before.skip if before is not None and before.opened_at == last else 0
        return cls(last, alike + skipped)

    def text(self) -> str:
        """Return it as the address has it."""
        return f"{(self.opened_at - datetime.fromtimestamp(0, UTC)) // _INSTANT}_{self.skip}"


def show(visit: Visit) -> Response:
    """Show a page of sessions, or give all that are chosen as CSV."""
    chosen = {name: visit.query(name) for name in _CHOICES}
    if visit.query("format") == "csv":
        headings = [column.key for column in SESSIONS]
        return csv_response("sessions", headings, _lines(visit.services.log, chosen))
    place = _Place.read(visit.query("from"))
    found = _sessions(visit.services.log, chosen, place, limit=_PAGE + 1)
    rows = found[:_PAGE]
    return visit.page(
        "sessions.html",
        title="Sessions",
        columns=_SHOWN,
        links=_LINKS,
        rows=rows,
        chosen=chosen,
        reasons=[RUNNING, *EndReason],
        modes=list(Mode),
        older=_Place.after(rows, place).text() if len(found) > _PAGE else "",
        first=place is None,
    )


def _sessions(log: SessionLog, chosen: dict[str, str], place: _Place | None, *, limit: int) -> Sequence[SessionView]:
    asked: dict[str, Any] = {name: value or None for name, value in chosen.items()}
    if asked["reason"] == RUNNING:
        asked |= {"reason": None, "open": True}
    if place is None:
        return log.sessions(limit=limit, **asked)
    # What has the place's instant comes again, and is left out here: nothing is lost where two began at once.
    asked["until"] = place.opened_at + _INSTANT
    return log.sessions(limit=limit + place.skip, **asked)[place.skip :]


def _lines(log: SessionLog, chosen: dict[str, str]) -> Iterator[list[object]]:
    place: _Place | None = None
    for _ in range(_MOST_CSV // _CSV_PAGE):
        rows = _sessions(log, chosen, place, limit=_CSV_PAGE)
        yield from ([column.value(row) for column in SESSIONS] for row in rows)
        if len(rows) < _CSV_PAGE:
            return
        place = _Place.after(rows, place)


PAGES: Final = (Page(_PATH, "Sessions", show, menu=True),)

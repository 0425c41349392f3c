"""Rendering of responses: templates with everything escaped, links, CSV downloads, and static assets."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fleet_admin.columns import Column, moment, shown, write_csv
from fleet_admin.dashboard.errors import Problem
from fleet_admin.reports import CONCLUSIONS, EVENTS, PART_TIMES, SESSIONS
from fleet_edge.session_log import ADMINISTRATOR, AlertView
from schemas.printable import printable

_PACKAGE: Final = "fleet_admin.dashboard"
_TYPES: Final = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


T = TypeVar("T")

CellLink = Callable[[T], str]
"""Returns the address that a cell of a row leads to."""


def address(kind: str, name: str) -> str:
    """Return the address of the page of a device or an edge; `kind` is the first part of its path."""
    return f"/{kind}/{quote(name, safe='')}"


def about(alert: AlertView) -> str:
    """Return the address of the device or the edge that an alert is about; empty if neither."""
    if alert.device is not None:
        return address("devices", alert.device)
    # An edge, or an edge and a code.
    return "" if alert.subject == "database" else address("edges", alert.subject.partition(" ")[0])


LINKS: Final[Mapping[str, CellLink[Any]]] = {
    # With the device, because session ids are unique only per device.
    "session": lambda row: f"/sessions/{row.session}?{urlencode({'device': row.device or ''})}",
    "device": lambda row: address("devices", row.device),
    "edge": lambda row: "" if row.edge == ADMINISTRATOR else address("edges", row.edge),
}
"""Links of the log's rows, by the column's key."""

MAX_SHOWN: Final = 2
"""Highest rank of the columns shown by default."""


@dataclass(frozen=True, slots=True)
class _Asset:
    content: bytes
    kind: str
    digest: str


@cache
def _assets() -> dict[str, _Asset]:
    found = {}
    for folder in (files(_PACKAGE) / "static", files(_PACKAGE) / "static" / "vendor"):
        for each in folder.iterdir():
            kind = _TYPES.get(each.name.rpartition(".")[2])
            if kind is not None:
                content = each.read_bytes()
                found[each.name] = _Asset(content, kind, hashlib.sha256(content).hexdigest()[:16])
    return found


def asset_url(name: str) -> str:
    """Return an asset's URL; it changes with the content, so that browsers may cache it."""
    return f"/static/{name}?v={_assets()[name].digest}"


def asset_route() -> Route:
    async def serve(request: Request) -> Response:
        asset = _assets().get(request.path_params["name"])
        if asset is None:
            raise Problem(404, "There is no such file.")
        lasting = request.query_params.get("v") == asset.digest
        headers = {"cache-control": "public, max-age=31536000, immutable" if lasting else "no-cache"}
        return Response(asset.content, media_type=asset.kind, headers=headers)

    return Route("/static/{name}", serve)


_ROWS_AT_ONCE: Final = 500


def csv_response(name: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Response:
    """Return a CSV file to download; rows are read on a thread, as fast as the client reads."""
    headers = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return StreamingResponse(_lines(headings, iter(rows)), media_type="text/csv; charset=utf-8", headers=headers)


def _lines(headings: Sequence[str], rows: Iterator[Sequence[object]]) -> Iterator[str]:
    more = True
    while more:
        buffer = io.StringIO()
        more = write_csv(buffer, headings, islice(rows, _ROWS_AT_ONCE)) == _ROWS_AT_ONCE
        headings = ()
        yield buffer.getvalue()


def render(template: str, values: Mapping[str, Any]) -> str:
    """Render a page; every value is escaped and stripped of control characters."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fleet_admin.dashboard", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "moment": moment, "prose": _prose, "filled": filled}
    environment.globals |= {"asset": asset_url, "address": address, "row_links": LINKS}
    columns: dict[str, list[Column[Any]]] = {
        "session_columns": SESSIONS,
        "event_columns": EVENTS,
        "conclusion_columns": CONCLUSIONS,
        "part_columns": PART_TIMES,
    }
    environment.globals |= {name: [each for each in of if each.rank <= MAX_SHOWN] for name, of in columns.items()}
    return environment


def filled(columns: Sequence[Column[Any]], rows: Sequence[Any]) -> list[Column[Any]]:
    """Return the columns of a table without those for sentences that none of its rows has."""
    return [each for each in columns if each.kind != "sentence" or any(map(each.value, rows))]


def _prose(text: str) -> Markup:
    """Return a sentence with its commands and settings, which are between backticks, as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text)))))  # noqa: S704 - escaped


def _readable(value: object) -> object:
    """Replace control characters and marks of writing direction."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

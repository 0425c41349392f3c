"""Status page: plain HTML that works without a network and without scripts; whatever it shows is escaped.

The browser is told to load nothing, to run nothing and to send nothing, and to let no other page frame this one, so
that a name or a text which got through the escaping could do nothing either.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fleet_common.terminal import printable
from fleet_device.offline import OfflinePolicy

REFRESH_S: Final = 5
"""Seconds after which a browser asks for the page again."""

_OFFLINE: Final[Mapping[str, str]] = {
    OfflinePolicy.FAIL: "texts fail",
    OfflinePolicy.WAIT: "texts wait",
    OfflinePolicy.LOCAL: "the draft model goes on alone, unverified",
}

_TO_THE_MINUTE: Final = 16  # characters

_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def status_routes(status: Callable[[], Mapping[str, Any]]) -> list[Route]:
    """Return the routes of the page and of its JSON.

    Args:
        status: Returns how the device is, as JSON values; does not block.
    """

    async def page(_request: Request) -> Response:
        policy = {"Content-Security-Policy": _policy()}
        return HTMLResponse(render_status(status()), headers={**_HEADERS, **policy})

    async def json(_request: Request) -> Response:
        return JSONResponse(dict(status()), headers=_HEADERS)

    return [Route("/", page), Route("/status", json)]


def render_status(status: Mapping[str, Any]) -> str:
    readable = _readable(status)
    return _template().render(
        status=readable,
        offline=_OFFLINE.get(readable["offline"], readable["offline"]),
        style=Markup(_style()),  # noqa: S704 - ours
        refresh_s=REFRESH_S,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "moment": _moment, "number": _number}
    return environment.from_string(_file("page.html"))


@cache
def _style() -> str:
    return _file("page.css")


@cache
def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _figure(value: float | None, digits: int, unit: str) -> str:
    """Return a number with its unit, or that there is none yet."""
    return "not measured yet" if value is None else f"{value:,.{digits}f} {unit}"


def _number(value: int, what: str) -> str:
    return f"{value:,} {what}{'s' * (value != 1)}"


def _moment(time: str) -> str:
    """Return an ISO 8601 time to the minute, as people write it."""
    return time[:_TO_THE_MINUTE].replace("T", " ")


def _readable(value: Any) -> Any:  # noqa: ANN401 - JSON values
    """Replace what would make a text read otherwise than it is: control characters, and marks of writing direction."""
    match value:
        case str():
            return printable(value)
        case Mapping():
            return {key: _readable(each) for key, each in value.items()}
        case list() | tuple():
            return [_readable(each) for each in value]
        case _:
            return value

"""Status page at `/`, and its JSON.

The page is plain HTML without scripts that works without a network; all that it shows is escaped. Its policy lets the
browser load, run and send nothing, and no other page frame this one, so that a name or a text that got through the
escaping could do nothing either.
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

from fleet_device.settings import OfflinePolicy
from schemas.printable import printable

REFRESH_S: Final = 5
"""Seconds after which a browser reloads the page."""

_OFFLINE: Final[Mapping[str, str]] = {
    OfflinePolicy.FAIL: "texts fail",
    OfflinePolicy.WAIT: "texts wait",
    OfflinePolicy.LOCAL: "the draft model goes on alone, unverified",
}

_TO_THE_MINUTE: Final = 16  # characters

_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def status_routes(status: Callable[[], Mapping[str, Any]]) -> list[Route]:
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
        style=Markup(_file("status.css")),  # noqa: S704 - ours
        refresh_s=REFRESH_S,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "moment": _moment, "number": _number}
    return environment.from_string(_file("status.html"))


@cache
def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_file("status.css").encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _figure(value: float | None, digits: int, unit: str) -> str:
    return "not measured yet" if value is None else f"{value:,.{digits}f} {unit}"


def _number(value: int, what: str) -> str:
    return f"{value:,} {what}{'s' * (value != 1)}"


def _moment(time: str) -> str:
    return time[:_TO_THE_MINUTE].replace("T", " ")


def _readable(value: Any) -> Any:  # noqa: ANN401 - JSON values
    """Replace characters that could make a text look different: control characters and writing direction marks."""
    match value:
        case str():
            return printable(value)
        case Mapping():
            return {key: _readable(each) for key, each in value.items()}
        case list() | tuple():
            return [_readable(each) for each in value]
        case _:
            return value

"""Assets: style sheets, scripts and pictures, all of them known when the program starts: no path is ever opened."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fleet_admin.dashboard.errors import Problem

_PACKAGE: Final = "fleet_admin.dashboard"
_TYPES: Final = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


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
    """Return where an asset is; another content has another URL, so that browsers may keep it."""
    return f"/static/{name}?v={_assets()[name].digest}"


def asset_route() -> Route:
    """Return the route of all assets."""

    async def serve(request: Request) -> Response:
        asset = _assets().get(request.path_params["name"])
        if asset is None:
            raise Problem(404, "There is no such file.")
        lasting = request.query_params.get("v") == asset.digest
        headers = {"cache-control": "public, max-age=31536000, immutable" if lasting else "no-cache"}
        return Response(asset.content, media_type=asset.kind, headers=headers)

    return Route("/static/{name}", serve)

"""Bodies of requests: bounded forms, read before anybody looks at them."""

from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from fleet_admin.dashboard.errors import Problem

_MOST_BYTES: Final = 256 * 1024
_MOST_FIELDS: Final = 4_000  # a box ticked for each of some thousand devices
_MOST_QUERY: Final = 8_000

Values = Mapping[str, tuple[str, ...]]
"""Fields of a form or of a query, each with all of its values."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """Return a request's body.

    Raises:
        Problem: It is too large, or the client went away.
    """
    length = Headers(scope=scope).get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length) > _MOST_BYTES:
        raise Problem(413, f"The body has more than {_MOST_BYTES:,} bytes; send less at once.")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "The connection was closed before the whole body had come.")
        body += message.get("body", b"")
        if len(body) > _MOST_BYTES:
            raise Problem(413, f"The body has more than {_MOST_BYTES:,} bytes; send less at once.")
        if not message.get("more_body", False):
            return bytes(body)


def parse_values(encoded: bytes, *, what: str) -> Values:
    """Return the fields of an urlencoded form or query.

    Raises:
        Problem: It cannot be read, or has too many fields.
    """
    if what == "query" and len(encoded) > _MOST_QUERY:
        raise Problem(414, f"The query has more than {_MOST_QUERY:,} characters; choose by fewer things at once.")
    try:
        pairs = parse_qsl(encoded.decode("ascii"), keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict")
    except ValueError:
        raise Problem(400, f"The {what} cannot be read; send it as a browser's form does.") from None
    if any("\0" in name or "\0" in value for name, value in pairs):
        raise Problem(400, f"The {what} holds a NUL character, which no name has.")
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {name: tuple(each) for name, each in values.items()}

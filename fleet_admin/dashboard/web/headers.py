"""Security headers of every answer: nothing from elsewhere is loaded, run, framed or sniffed."""

from collections.abc import Mapping
from typing import Final

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""No script and no style within a page, so that a name or a text which got through the escaping could do nothing."""

_ALWAYS: Final[Mapping[str, str]] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not `no-referrer`: with it browsers send forms with the origin `null`, which is then not to be told from others'.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}

_OVER_TLS: Final[Mapping[str, str]] = {"strict-transport-security": "max-age=31536000"}


def security_headers(*, secure: bool) -> list[tuple[bytes, bytes]]:
    """Return the headers, as ASGI has them.

    Args:
        secure: Whether the client spoke TLS, so that it may be told to do so always.
    """
    headers = {**_ALWAYS, **(_OVER_TLS if secure else {})}
    return [(name.encode(), value.encode()) for name, value in headers.items()]

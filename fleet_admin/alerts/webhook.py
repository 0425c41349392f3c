"""Webhook: posts alerts as JSON to a URL, signed, so that whoever gets them knows that they are ours.

The signature is an HMAC-SHA256 of `<time>.<body>` with the secret, in hexadecimal; the time, in Unix seconds, stands in
a header of its own, so that an old message can be told from a new one. No redirect is followed: an alert, and its
signature, go where the administrator has said, or nowhere. A server that answers slowly, or without end, is left.
"""

import contextlib
import hashlib
import hmac
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import SplitResult, urlsplit

from fleet_admin.alerts.errors import DeliveryFailed
from schemas.control import Alert, encode_json

__all__ = ["Webhook", "check_url"]

_TIMEOUT_S: Final = 10.0
_LONGEST_S: Final = 20.0
_MOST_ANSWER_BYTES: Final = 4096
_ACCEPTED: Final = range(200, 300)


def check_url(url: str) -> SplitResult:
    """Take a webhook's URL apart.

    Raises:
        ValueError: It is none that can be posted to. The text is a sentence's end.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("it must be a URL such as https://hooks.example/fleet") from None
    if not host or parts.scheme not in {"http", "https"} or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it must be a URL such as https://hooks.example/fleet")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a user or a password has no place in it: what is posted is signed with `webhook_secret_file`")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("beyond this machine it must begin with https://")
    return parts


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Webhook:
    """Where alerts are posted to.

    Args:
        url: As `check_url` takes it.
        secret: What is signed with; None signs nothing.
        clock: Unix seconds.
        context: Whom to trust; by default the machine's authorities.
        longest_s: After which an exchange is ended, whatever the server does.

    Raises:
        ValueError: The URL is none.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: bytes | None = None,
        clock: Callable[[], float] = time.time,
        context: ssl.SSLContext | None = None,
        longest_s: float = _LONGEST_S,
    ) -> None:
        self._parts = check_url(url)
        self._secret = secret
        self._clock = clock
        self._context = context
        self._longest_s = longest_s

    @property
    def name(self) -> str:
        """For the log; without the path, which may be a secret."""
        return f"the webhook at {self._parts.hostname}"

    def send(self, alert: Alert) -> None:
        """Post an alert.

        Raises:
            DeliveryFailed: It was not accepted.
        """
        body = encode_json(alert)
        connection = self._connect()
        ending = threading.Timer(self._longest_s, _cut, [connection])
        ending.daemon = True
        ending.start()
        try:
            connection.request("POST", self._target(), body=body, headers=self._headers(body, alert))
            answer = connection.getresponse()
            answer.read(_MOST_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise DeliveryFailed(f"{self.name.capitalize()} cannot be reached: {why}.") from error
        finally:
            ending.cancel()
            connection.close()
        if answer.status not in _ACCEPTED:
            redirected = ", and redirects are not followed" if answer.status in range(300, 400) else ""
            raise DeliveryFailed(f"{self.name.capitalize()} answers with {answer.status}{redirected}.")

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        context = self._context or ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)

    def _target(self) -> str:
        path = self._parts.path or "/"
        return f"{path}?{self._parts.query}" if self._parts.query else path

    def _headers(self, body: bytes, alert: Alert) -> dict[str, str]:
        at = str(int(self._clock()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "dssd-fleet",
            "X-Fleet-Delivery": f"{alert.id}-{alert.state}",
            "X-Fleet-Timestamp": at,
        }
        if self._secret is not None:
            signature = hmac.new(self._secret, at.encode() + b"." + body, hashlib.sha256).hexdigest()
            headers["X-Fleet-Signature"] = f"sha256={signature}"
        return headers


def _cut(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):  # it has ended meanwhile, or not begun
        connection.sock.shutdown(socket.SHUT_RDWR)

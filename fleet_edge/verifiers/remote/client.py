"""HTTP client of the inference servers: pooled connections, bounded answers, errors in plain sentences."""

import asyncio
import concurrent.futures
import json
import ssl
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import httpx

from fleet_edge.verifiers.remote.dialect import EndpointBusy, EndpointFailed, HttpCall, QueryRefused
from fleet_edge.verifiers.remote.loading import key_headers
from schemas.printable import printable_line

_CONNECT_S: Final = 2.0
_MOST_SAID: Final = 300
_LONGEST_RETRY_S: Final = 60.0
# Both kinds of server close connections after 5 s of idleness; no request may race with that.
_KEEP_ALIVE_S: Final = 4.0
_ERROR_BYTES: Final = 1 << 14
_PAGE: Final = "a web page"

SESSION_HEADER: Final = "X-Session-Id"
"""Header with the session's key, for routers that send a session to one server."""


class InferenceClient:
    """HTTP client for one event loop, with the API key in a file, if any; raises `VerifierError` as `key_headers`."""

    def __init__(self, key_file: Path | None, *, connections: int) -> None:
        self._key_file = key_file
        self._key = key_headers(key_file)
        limits = httpx.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_ALIVE_S
        )
        # No proxies or passwords from the environment: the key must not leak.
        self._http = httpx.AsyncClient(
            limits=limits, verify=_context(), trust_env=False, follow_redirects=False, http2=False
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, endpoint: str, path: str, *, timeout_s: float) -> object:
        """Return the JSON at a path, None if the body is empty; raises `EndpointFailed`."""
        return await self._send("GET", endpoint, HttpCall(path, {}, _ERROR_BYTES * 64), timeout_s=timeout_s)

    async def post(self, endpoint: str, call: HttpCall, *, timeout_s: float, session: str = "") -> object:
        """Return the JSON answer to a call; raises `EndpointFailed`, or `QueryRefused` if the server rejects it."""
        return await self._send("POST", endpoint, call, timeout_s=timeout_s, session=session)

    async def _send(self, method: str, endpoint: str, call: HttpCall, *, timeout_s: float, session: str = "") -> object:
        content = None if method == "GET" else json.dumps(call.body, separators=(",", ":")).encode()
        # A small compressed answer may expand to a large one.
        headers = self._key | {"Accept-Encoding": "identity"}
        if content:
            headers["Content-Type"] = "application/json"
        if session:
            headers[SESSION_HEADER] = session
        timeout = httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s))
        try:
            # httpx bounds the wait for each chunk only.
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream(
                    method, endpoint + call.path, content=content, headers=headers, timeout=timeout
                ) as response,
            ):
                body = await _read(response, call.answer_bytes, endpoint)
        except (TimeoutError, httpx.TimeoutException) as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise EndpointFailed(f"No inference server answers at {endpoint}; check its address.") from error
            raise EndpointFailed(
                f"The inference server at {endpoint} did not answer within {timeout_s:g} s.",
                suspect=not isinstance(error, httpx.PoolTimeout),
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as error:
            raise EndpointFailed(_unreachable(endpoint, error)) from error
        status = response.status_code
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            self._refuse_key(endpoint)
        if status != httpx.codes.OK:
            _raise_status(endpoint, call.path, response, body)
        try:
            return json.loads(body) if body.strip() else None
        except (ValueError, RecursionError) as error:
            what = _PAGE if _is_page(body) else "what is no JSON"
            raise EndpointFailed(
                f"The inference server at {endpoint} sends {what} at {call.path}; check the address, the port and the "
                "setting 'remote.api'.",
                suspect=True,
            ) from error

    def _refuse_key(self, endpoint: str) -> NoReturn:
        if self._key_file is not None:
            raise EndpointFailed(
                f"The inference server at {endpoint} refuses the key in {self._key_file}; put the right one there, and "
                "restart the edge."
            )
        raise EndpointFailed(
            f"The inference server at {endpoint} requires a key; put it into a file and set 'remote.api_key_file'."
        )


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def _read(response: httpx.Response, most: int, endpoint: str) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise EndpointFailed(
            f"The inference server at {endpoint} sends compressed responses without being asked; turn "
            "that off there, or at the "
            "proxy before it."
        )
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > most:
            raise EndpointFailed(
                f"The inference server at {endpoint} sends a longer response than possible ({most} bytes).",
                suspect=True,
            )
    return bytes(body)


def _unreachable(endpoint: str, error: Exception) -> str:
    if isinstance(error, httpx.ConnectError):
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return (
                f"The certificate of the inference server at {endpoint} is signed by no trusted authority; "
                "set the environment variable SSL_CERT_FILE to a file with its authority."
            )
        if "SSL" in text.upper():
            return f"The inference server at {endpoint} does not speak TLS; check whether it is http:// or https://."
        return f"No inference server answers at {endpoint}; check the address and the port, and that it is running."
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return f"{endpoint!r} is not an address of an inference server; give one such as http://10.0.0.5:8000."
    return _broken(endpoint, error)


def _broken(endpoint: str, error: Exception) -> str:
    """Explain an answer that ends too early, or is not HTTP."""
    text = str(error) if isinstance(error, httpx.RemoteProtocolError) else ""
    if "illegal" in text:
        return (
            f"The server at {endpoint} does not speak HTTP; check the address and the port, and "
            "whether it is http:// or "
            "https://."
        )
    if "without sending a response" in text:
        return (
            f"The server at {endpoint} closes the connection without an answer; check that the server is well, and "
            "whether it is http:// or https://."
        )
    return (
        f"The inference server at {endpoint} closed the connection early ({type(error).__name__}); "
        "its own log may say why."
    )


def _raise_status(endpoint: str, path: str, response: httpx.Response, body: bytes) -> NoReturn:
    status, said = response.status_code, _said(body)
    where = f"The inference server at {endpoint}"
    if status in (httpx.codes.BAD_REQUEST, httpx.codes.REQUEST_ENTITY_TOO_LARGE, httpx.codes.UNPROCESSABLE_ENTITY):
        raise QueryRefused(f"{where} refuses a request: {said}")
    if status == httpx.codes.TOO_MANY_REQUESTS:
        word = response.headers.get("retry-after", "")
        retry_s = min(float(word), _LONGEST_RETRY_S) if word.isdecimal() else 0.25
        raise EndpointBusy(f"{where} is overloaded.", retry_s=retry_s)
    if response.is_redirect:
        raise EndpointFailed(f"{where} redirects (status {status}); give the address itself in 'remote.endpoint'.")
    if status == httpx.codes.NOT_FOUND:
        raise EndpointFailed(
            f"{where} has no {path} ({said.rstrip('.')}); check the address and the setting 'remote.api'."
        )
    if status == httpx.codes.SERVICE_UNAVAILABLE:
        raise EndpointFailed(f"{where} takes no requests now (503): {said}")
    suspect = status >= httpx.codes.INTERNAL_SERVER_ERROR
    raise EndpointFailed(f"{where} answers with status {status}: {said}", suspect=suspect)


def _said(body: bytes) -> str:
    """Return a server's error message, as one printable line that ends with a period."""
    if _is_page(body):
        return f"it sends {_PAGE}."
    text = body[:_ERROR_BYTES].decode("utf-8", "replace")
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and name in said:
            said = said[name]
    line = printable_line(" ".join(str(said).split()))
    if len(line) > _MOST_SAID:
        return line[:_MOST_SAID] + "…."
    return f"{line.rstrip('.')}." if line else "it says nothing more."


def _is_page(body: bytes) -> bool:
    return body.lstrip()[:1] == b"<"


T = TypeVar("T")


class LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
        """Run a coroutine in the loop; after `timeout_s` cancel it and raise TimeoutError."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

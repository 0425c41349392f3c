"""The inference server: bounded HTTP calls, and the trial that identifies its model.

Errors are `ServerFailed`, after which another attempt may succeed, and `QueryRefused`, after which none will.
"""

import json
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import httpx
import numpy as np
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.remote.local import key_headers, readings
from fleet_edge.verifiers.remote.vllm import (
    SPARE,
    BadAnswer,
    HttpCall,
    LogprobsQuery,
    TopRows,
    as_text,
    completion,
    detokenize,
    read_completion,
    read_models,
)
from schemas.printable import printable_line

SESSION_HEADER: Final = "X-Session-Id"
"""Header with the session's key, for routers that send a session to one server."""

_CONNECT_S: Final = 2.0
_MAX_QUOTED: Final = 300
_MAX_RETRY_S: Final = 60.0
# vLLM closes connections after 5 s of idleness; no request may race with that.
_KEEP_ALIVE_S: Final = 4.0
_ERROR_BYTES: Final = 1 << 14
_PAGE: Final = "a web page"
# A server may come back with another number format; other weights differ much more.
_MAX_VARIATION: Final = 0.3
_TRIAL_TOKENS: Final = 8


class ServerFailed(VerifierError):  # noqa: N818 - reads as what it says
    """The server failed, or is overloaded until `retry_s` from now; `suspect` if the query may be the cause."""

    def __init__(self, sentence: str, *, suspect: bool = False, retry_s: float | None = None) -> None:
        super().__init__(sentence)
        self.suspect = suspect
        self.retry_s = retry_s


class QueryRefused(VerifierError):  # noqa: N818 - reads as what it says
    """The server rejects a query, as any other would."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Report of a server: model, usable context, version (may be empty), and its rows in the trial."""

    model: str
    context: int
    version: str
    rows: TopRows


@dataclass(frozen=True, slots=True)
class Expected:
    """Requirements on a server: model name (empty for any), token strings, ids to compare, entries per row."""

    model: str
    strings: Sequence[str]
    samples: Sequence[int]
    top: int


class VllmServer:
    """vLLM at an address, or a router in front of several. Callable from any thread.

    Raises `VerifierError` as `key_headers`.
    """

    def __init__(self, url: str, key_file: Path | None, *, connections: int) -> None:
        self.url = url
        self.model = ""
        self._key_file = key_file
        # A small compressed answer may expand to a large one.
        headers = key_headers(key_file) | {"Accept-Encoding": "identity"}
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        limits = httpx.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_ALIVE_S
        )
        # No proxies or passwords from the environment: the key must not leak.
        self._http = httpx.Client(headers=headers, limits=limits, verify=context, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def check_health(self, *, timeout_s: float) -> None:
        self._get("/health", timeout_s=timeout_s)

    def compute(self, question: LogprobsQuery, *, vocabulary: int, timeout_s: float) -> TopRows:
        """Return the rows of a query."""
        call = completion(question, model=self.model)
        answer = self._post(call, timeout_s=timeout_s, session=question.session)
        try:
            return read_completion(answer, question, vocabulary=vocabulary)
        except BadAnswer as error:
            raise self._unlike_vllm(error) from error

    def identify(self, expected: Expected, *, timeout_s: float) -> Identity:
        """Identify the server by what it reports and computes; raises `VerifierError` if it is not the one expected."""
        try:
            version = as_text(self._get("/version", timeout_s=timeout_s), "version")
            models = read_models(self._get("/v1/models", timeout_s=timeout_s))
            self.model, context = self._choose(models, expected)
            self._compare_tokens(expected, timeout_s=timeout_s)
        except BadAnswer as error:
            raise self._unlike_vllm(error) from error
        rows = self._try(expected, timeout_s=timeout_s)
        return Identity(self.model, context, printable_line(version)[:40], rows)

    def check_same(self, now: Identity, before: Identity) -> None:
        """Check that a server that is back computes what it did; raises `ServerFailed`."""
        apart = max(
            _variation(row, now.rows.logprobs[at], before.rows.ids[at], before.rows.logprobs[at])
            for at, row in enumerate(now.rows.ids)
        )
        if apart > _MAX_VARIATION:
            raise ServerFailed(
                f"The inference server at {self.url} does not serve the same model as before: what it computes differs "
                f"by {apart:.2f} in total variation."
            )
        if now.context < before.context:
            raise ServerFailed(
                f"The inference server at {self.url} came back with a context of {now.context} tokens, fewer than open "
                "sessions may have; start it with the context that it had, or restart this edge."
            )

    # The trial

    def _choose(self, models: dict[str, object], expected: Expected) -> tuple[str, int]:
        names = ", ".join(printable_line(name) for name in models) or "no model"
        if expected.model and expected.model not in models:
            raise ServerFailed(
                f"The inference server at {self.url} serves {names}, and not {expected.model}; correct "
                "'remote.served_model' or the address."
            )
        if not expected.model and len(models) != 1:
            raise ServerFailed(
                f"The inference server at {self.url} serves {names}; say by 'remote.served_model' which one is the "
                "target model."
            )
        model = expected.model or next(iter(models))
        context = models[model]
        if type(context) is not int or context <= SPARE + _TRIAL_TOKENS:
            raise BadAnswer("a usable `max_model_len` is missing")
        return model, context - SPARE

    def _compare_tokens(self, expected: Expected, *, timeout_s: float) -> None:
        for token in expected.samples:
            try:
                text = as_text(self._post(detokenize(token, model=self.model), timeout_s=timeout_s), "prompt")
            except QueryRefused as error:
                raise ServerFailed(
                    f"The model at {self.url} has no token {token}, and the target's tokenizer has: they are not of "
                    "one family; check the settings 'target' and 'remote.endpoint'."
                ) from error
            if text not in readings(expected.strings[token]):
                raise ServerFailed(
                    f"Token {token} is {text!r} at {self.url} and {expected.strings[token]!r} in the target's "
                    "tokenizer; give the tokenizer of the served model by the setting 'target'."
                )

    def _try(self, expected: Expected, *, timeout_s: float) -> TopRows:
        """Compute the same short sequence as ever: its rows are the fingerprint of the served weights."""
        tokens = [expected.samples[at % len(expected.samples)] for at in range(_TRIAL_TOKENS)]
        question = LogprobsQuery(tokens, rows=3, top=expected.top)
        try:
            return self.compute(question, vocabulary=len(expected.strings), timeout_s=timeout_s)
        except QueryRefused as error:
            raise VerifierError(
                f"{error} Where that is about log-probabilities: start vLLM with --max-logprobs {expected.top}, or set "
                "'remote.top_logprobs' to what it allows."
            ) from error

    def _unlike_vllm(self, error: BadAnswer) -> ServerFailed:
        return ServerFailed(
            f"The answer of the inference server at {self.url} is not what vLLM sends: {error}; check the address.",
            suspect=True,
        )

    # HTTP

    def _get(self, path: str, *, timeout_s: float) -> object:
        return self._request("GET", HttpCall(path, {}, _ERROR_BYTES * 64), timeout_s=timeout_s)

    def _post(self, call: HttpCall, *, timeout_s: float, session: str = "") -> object:
        return self._request("POST", call, timeout_s=timeout_s, session=session)

    def _request(self, method: str, call: HttpCall, *, timeout_s: float, session: str = "") -> object:
        """Return the JSON of the answer, None if it is empty."""
        if self._http.is_closed:
            raise ServerFailed(f"The edge is stopping and asks {self.url} nothing more.")
        content = None if method == "GET" else json.dumps(call.body, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json"} if content else {}
        if session:
            headers[SESSION_HEADER] = session
        timeout = httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s))
        ends = time.monotonic() + timeout_s
        try:
            with self._http.stream(
                method, self.url + call.path, content=content, headers=headers, timeout=timeout
            ) as response:
                body = self._read(response, call.answer_bytes, ends=ends)
        except httpx.ConnectTimeout as error:
            raise ServerFailed(f"No inference server answers at {self.url}; check its address.") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise ServerFailed(
                f"The inference server at {self.url} did not answer within {timeout_s:g} s.", suspect=True
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError) as error:
            raise ServerFailed(_unreachable(self.url, error)) from error
        self._check_status(call.path, response, body)
        try:
            return json.loads(body) if body.strip() else None
        except (ValueError, RecursionError) as error:
            what = _PAGE if _is_page(body) else "what is no JSON"
            raise ServerFailed(
                f"The inference server at {self.url} sends {what} at {call.path}; check the address and the port.",
                suspect=True,
            ) from error

    def _read(self, response: httpx.Response, most: int, *, ends: float) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ServerFailed(
                f"The inference server at {self.url} sends compressed responses without being asked; turn that off "
                "there, or at the proxy before it."
            )
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > most:
                raise ServerFailed(
                    f"The inference server at {self.url} sends a longer response than possible ({most} bytes).",
                    suspect=True,
                )
            if time.monotonic() > ends:  # httpx bounds the wait for each piece only
                raise TimeoutError
        return bytes(body)

    def _check_status(self, path: str, response: httpx.Response, body: bytes) -> None:
        status, where = response.status_code, f"The inference server at {self.url}"
        said = _quoted(body)
        match status:
            case httpx.codes.OK:
                return
            case httpx.codes.UNAUTHORIZED | httpx.codes.FORBIDDEN:
                self._refuse_key(where)
            case httpx.codes.BAD_REQUEST | httpx.codes.REQUEST_ENTITY_TOO_LARGE | httpx.codes.UNPROCESSABLE_ENTITY:
                raise QueryRefused(f"{where} refuses a request: {said}")
            case httpx.codes.TOO_MANY_REQUESTS:
                word = response.headers.get("retry-after", "")
                retry_s = min(float(word), _MAX_RETRY_S) if word.isdecimal() else 0.25
                raise ServerFailed(f"{where} is overloaded.", retry_s=retry_s)
            case httpx.codes.NOT_FOUND:
                raise ServerFailed(f"{where} has no {path} ({said.rstrip('.')}); check that it is vLLM's address.")
            case httpx.codes.SERVICE_UNAVAILABLE:
                raise ServerFailed(f"{where} takes no requests now (503): {said}")
        if response.is_redirect:
            raise ServerFailed(f"{where} redirects (status {status}); give the address itself in 'remote.endpoint'.")
        suspect = status >= httpx.codes.INTERNAL_SERVER_ERROR
        raise ServerFailed(f"{where} answers with status {status}: {said}", suspect=suspect)

    def _refuse_key(self, where: str) -> NoReturn:
        if self._key_file is None:
            raise ServerFailed(f"{where} requires a key; put it into a file and set 'remote.api_key_file'.")
        raise ServerFailed(
            f"{where} refuses the key in {self._key_file}; put the right one there, and restart the edge."
        )


_NO_ADDRESS: Final = "'{url}' is not an address of an inference server; give one such as http://10.0.0.5:8000."

_REASONS: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (
        httpx.ConnectError,
        "CERTIFICATE_VERIFY_FAILED",
        (
            "The certificate of the inference server at {url} is signed by no trusted authority; set the environment "
            "variable SSL_CERT_FILE to a file with its authority."
        ),
    ),
    (
        httpx.ConnectError,
        "SSL",
        "The inference server at {url} does not speak TLS; check whether it is http:// or https://.",
    ),
    (
        httpx.ConnectError,
        "",
        "No inference server answers at {url}; check the address and the port, and that it is running.",
    ),
    (httpx.InvalidURL, "", _NO_ADDRESS),
    (httpx.UnsupportedProtocol, "", _NO_ADDRESS),
    (
        httpx.RemoteProtocolError,
        "illegal",
        (
            "The server at {url} does not speak HTTP; check the address and the port, and whether it is http:// or "
            "https://."
        ),
    ),
    (
        httpx.RemoteProtocolError,
        "without sending a response",
        (
            "The server at {url} closes the connection without an answer; check that the server is well, and "
            "whether it is http:// or https://."
        ),
    ),
    (
        Exception,
        "",
        "The inference server at {url} closed the connection early ({kind}); its own log may say why.",
    ),
)
"""Kind of an error, a part of its text, and the message for it; the first that fits."""


def _unreachable(url: str, error: Exception) -> str:
    return next(
        message.format(url=url, kind=type(error).__name__)
        for kind, part, message in _REASONS
        if isinstance(error, kind) and part in str(error)
    )


def _quoted(body: bytes) -> str:
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
    if len(line) > _MAX_QUOTED:
        return line[:_MAX_QUOTED] + "…."
    return f"{line.rstrip('.')}." if line else "it says nothing more."


def _is_page(body: bytes) -> bool:
    return body.lstrip()[:1] == b"<"


def _variation(
    ids: NDArray[np.int64], logs: NDArray[np.float32], other_ids: NDArray[np.int64], other_logs: NDArray[np.float32]
) -> float:
    """Return the total variation distance of two rows, as far as they are known."""
    mine = dict(zip(ids.tolist(), np.exp(logs.astype(np.float64)).tolist(), strict=True))
    theirs = dict(zip(other_ids.tolist(), np.exp(other_logs.astype(np.float64)).tolist(), strict=True))
    return 0.5 * sum(
        abs(float(mine.get(token, 0)) - float(theirs.get(token, 0))) for token in mine.keys() | theirs.keys()
    )

"""Local HTTP API: a request as an ASGI server hands it over, path, headers and body as hostile as they come.

Behind it stands a text queue that writes at once. Every answer has a documented status, and every error OpenAI's shape.
"""

import asyncio
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from fleet_common.grammar.bounds import bounded_text
from fleet_common.grammar.errors import GrammarError
from fleet_device.api.app import create_app
from fleet_device.api.ollama import MEDIA_TYPE
from fleet_device.api.problems import OLLAMA
from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import DeviceError, EdgeUnavailable, SessionRefused
from fleet_device.requests.generate import Cancellation, GenerateRequest, RequestContext, generate_text
from fleet_device.requests.queue import Failed, Listener, Ticket
from fleet_device.settings import DeviceSettings
from schemas.policy import Grammar
from schemas.reasons import RefusalCode
from tests.fuzz.frames import Frame, pack, unpack
from tests.fuzz.harness import Finding
from tests.fuzz.targets.framed import FramedTarget
from tests.support.keys_file import keys_file
from tests.support.memory_device import ScriptedAgent, ScriptedBackend, TalkingCodec
from tests.support.memory_fleet import DRAFT, END, FLEET

PATH, HEADER, BODY, QUERY, LEAVE = range(5)
REDIRECT: Final = 307  # of a path with a slash too many
_HERE: Final = re.compile(rb"http://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]*)?/.*", re.IGNORECASE | re.DOTALL)
TOKEN_ASKED, NO_EDGE, NO_TEMPLATE = 8, 16, 32  # bits of an input's first byte; the lowest three are the method
_METHODS: Final = ("POST", "GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "X")
_STATUS: Final = frozenset({200, REDIRECT, 400, 401, 404, 405, 413, 415, 421, 429, 502, 503})
_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)
_CHAT, _COMPLETION = b"/v1/chat/completions", b"/v1/completions"
_TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_BODIES: Final[tuple[tuple[bytes, Any], ...]] = (
    (_CHAT, {"messages": [{"role": "user", "content": "t1 t2"}]}),
    (_CHAT, {"messages": [{"role": "system", "content": "t1"}, {"role": "user", "content": "<|im_end|>"}]}),
    (_CHAT, {"messages": [{"role": "user", "content": "t1 t2"}], "stream": True}),
    (_CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "t1"}]}], "max_completion_tokens": 5}),
    (_CHAT, {"messages": [{"role": "user", "content": "t3"}], "stop": ["t1 ", "x"], "temperature": 0.5, "top_p": 0.9}),
    (_COMPLETION, {"prompt": "t1 t2", "max_tokens": 7, "seed": 5, "mode": "coupled", "top_k": 3}),
    (_COMPLETION, {"prompt": [1, 2, 3], "stream": True, "stream_options": {"include_usage": True}}),
    (_COMPLETION, {"prompt": ["t1"], "n": 1, "echo": False, "logprobs": None, "user": "u", "best_of": 1}),
    (_COMPLETION, {"prompt": ["t1", [1, 2]], "echo": True, "logprobs": 1, "max_tokens": 0}),
    (_CHAT, {"messages": [{"role": "user", "content": "t1"}], "tools": [_TOOL], "parallel_tool_calls": True}),
    (b"/api/chat", {"messages": [{"role": "user", "content": "t1"}], "tools": [_TOOL], "options": {"seed": 1}}),
    (b"/api/generate", {"prompt": "t1", "raw": True, "format": "json", "stream": False}),
    (_CHAT, {"messages": [], "tools": [], "response_format": {"type": "text"}, "logit_bias": {}, "n": 2}),
)  # fmt: skip


class _Codec(TalkingCodec):
    def __init__(self, *, template: bool) -> None:
        super().__init__(DRAFT.words, (END,))
        self._template = _TEMPLATE if template else None

    @property
    def chat_template(self) -> str | None:
        return self._template

    @property
    def control_texts(self) -> tuple[str, ...]:
        return ("<|im_start|>", "<|im_end|>")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        text.encode()  # as a tokenizer does
        return super().encode(text, special=special)


class _Backend(ScriptedBackend):
    """Writes at once, without a queue."""

    def __init__(self) -> None:
        self.since = datetime(2026, 1, 2, tzinfo=UTC)
        self.missing = None
        self.template = True

    def submit(self, prepare: Callable[[Any], GenerateRequest], listener: Listener, *, target: str = "") -> Ticket:  # noqa: ARG002 - as the device has it
        codec = _Codec(template=self.template)
        ticket = Ticket(lambda: prepare(codec), listener, cancellation=Cancellation())
        drafter = ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,))
        drafter.codec = codec
        try:
            text = generate_text(
                ScriptedAgent(),
                drafter,
                ticket.prepare(),
                RequestContext(on_piece=ticket.tell, cancellation=ticket.cancellation),
            )
        except (DeviceError, DrafterError) as error:
            ticket.tell(Failed(error))
        else:
            ticket.tell(text)
        return ticket

    def check_grammar(self, grammar: Grammar) -> None:
        try:
            bounded_text(grammar)
        except GrammarError as error:
            raise SessionRefused(RefusalCode.GRAMMAR, str(error)) from None

    def cancel(self, ticket: Ticket) -> None:
        ticket.cancellation.cancel()

    @property
    def draft_model(self) -> str:
        return "toy"

    @property
    def codec(self) -> _Codec:
        return _Codec(template=self.template)

    @property
    def context(self) -> int:
        return 4096


class ApiTarget(FramedTarget):
    max_bytes = 1 << 14
    json = frozenset({BODY})

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._backend = _Backend()
        settings = {"fleet": FLEET, "device": "device-1", "seed": 5}
        self._apps = tuple(
            create_app(self._backend, DeviceSettings.model_validate(settings | keys), wall_clock=lambda: 1e9)
            for keys in ({}, {"applications": keys_file(Path(tempfile.mkdtemp()), "secret-token-0123456789")})
        )

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        first, frames = data[0], unpack(data[1:])
        self._backend.missing = str(EdgeUnavailable("No edge is up.")) if first & NO_EDGE else None
        self._backend.template = not first & NO_TEMPLATE
        scope = _scope(first, frames)
        sent = self._loop.run_until_complete(self._exchange(scope, frames, first))
        _check(sent, first, ollama=scope["path"].startswith(OLLAMA))

    def close(self) -> None:
        self._loop.close()

    @staticmethod
    def kind(op: int) -> int:
        return op % 5

    def seeds(self) -> Iterator[bytes]:
        host, kind = Frame(HEADER, b"host\x00127.0.0.1:8321"), Frame(HEADER, b"content-type\x00application/json")
        for path, body in _BODIES:
            named = {"model": "m", **body}
            yield b"\x00" + pack([Frame(PATH, path), host, kind, Frame(BODY, json.dumps(named).encode())])
        for path in (b"/v1/models", b"/v1/models/toy-target", b"/v1/models/a/b%2Fc", b"/healthz", b"/", b"/status"):
            yield b"\x01" + pack([Frame(PATH, path), host])
        token = Frame(HEADER, b"authorization\x00Bearer secret-token-0123456789")
        yield bytes([TOKEN_ASKED | 1]) + pack([Frame(PATH, b"/v1/models"), host, token])
        yield bytes([TOKEN_ASKED | 1]) + pack([Frame(PATH, b"/v1/models"), host])
        password = Frame(HEADER, b"authorization\x00Basic YTpzZWNyZXQtdG9rZW4tMDEyMzQ1Njc4OQ==")
        for path in (b"/", b"/status", b"/v1/models"):
            yield bytes([TOKEN_ASKED | 1]) + pack([Frame(PATH, path), host, password])
        yield bytes([NO_EDGE]) + pack([Frame(PATH, _COMPLETION), host, kind, Frame(BODY, b'{"prompt":"t1"}')])
        yield bytes([NO_TEMPLATE]) + pack(
            [Frame(PATH, _CHAT), host, kind, Frame(BODY, b'{"model":"m","messages":[{"role":"user","content":"t1"}]}')]
        )
        yield b"\x00" + pack([Frame(PATH, _CHAT), host, kind, Frame(BODY, b'{"mess'), Frame(LEAVE, b"")])

    async def _exchange(self, scope: dict[str, Any], frames: list[Frame], first: int) -> list[dict[str, Any]]:
        parts = [frame.payload for frame in frames if frame.op % 5 == BODY]
        leaves = any(frame.op % 5 == LEAVE for frame in frames)
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts) or leaves}
            if leaves or scope["told"]:
                return {"type": "http.disconnect"}
            scope["told"] = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope["told"] = bool(parts)
        await self._apps[bool(first & TOKEN_ASKED)](scope, receive, send)
        return sent


def _scope(first: int, frames: list[Frame]) -> dict[str, Any]:
    """Return the ASGI scope of a request line and headers; servers accept no control characters in them."""
    raw, query, headers = b"/", b"", []
    for frame in frames:
        match frame.op % 5:
            case 0:
                raw = bytes(byte for byte in frame.payload if 0x20 < byte < 0x7F and byte not in b"?#")
            case 1:
                name, _, value = frame.payload.partition(b"\x00")
                value = bytes(byte for byte in value if byte >= 0x20 and byte != 0x7F)
                headers.append((bytes(byte for byte in name.lower() if 0x20 < byte < 0x7F), value.strip()))
            case 3:
                query = bytes(byte for byte in frame.payload if 0x20 < byte < 0x7F)
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": _METHODS[first & 7],
        "scheme": "http",
        "path": unquote(raw.decode("ascii")),
        "raw_path": raw,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8321),
    }


def _check(sent: list[dict[str, Any]], first: int, *, ollama: bool) -> None:
    """Check the answer against the API's promises; a client that has disconnected gets none."""
    if not sent:
        return
    start, body = sent[0], b"".join(message.get("body", b"") for message in sent[1:])
    status, headers = start["status"], dict(start["headers"])
    if status not in _STATUS:
        raise Finding(f"status {status}: {body[:300]!r}")
    if status == REDIRECT and not _HERE.fullmatch(headers[b"location"]):
        raise Finding(f"sent away to {headers[b'location']!r}")
    if status == REDIRECT or first & 7 == _METHODS.index("HEAD"):
        return
    if headers[b"content-type"].startswith(b"text/event-stream"):
        _check_events(body)
        return
    if headers[b"content-type"].startswith(b"text/html"):
        _check_page(status, headers)
        return
    if headers[b"content-type"].startswith(MEDIA_TYPE.encode()):
        for line in body.decode().splitlines():
            json.loads(line)
        return
    _check_json(status, body, ollama=ollama)


def _check_json(status: int, body: bytes, *, ollama: bool) -> None:
    value = json.loads(body.decode())
    health = status == 503 and set(value) == {"status", "reason"}
    if status >= 400 and not health and not _is_error(value["error"], ollama=ollama):
        raise Finding(f"an error of another shape: {body[:300]!r}")
    if len(body) > 1 << 16:
        raise Finding(f"an answer of {len(body)} bytes")


def _is_error(error: object, *, ollama: bool) -> bool:
    if ollama:
        return isinstance(error, str)
    return isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}


def _check_events(body: bytes) -> None:
    for line in body.decode().split("\n\n")[:-1]:
        if line != "data: [DONE]":
            json.loads(line.removeprefix("data: "))


def _check_page(status: int, headers: dict[bytes, bytes]) -> None:
    if status != 200 or b"content-security-policy" not in headers:
        raise Finding(f"a page of status {status} with the headers {sorted(headers)}")

"""Local HTTP API: its routes."""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fleet_common.http_server import LOOPBACK
from fleet_device.api.guard import HEALTH_PATHS, AccessGuard, ApplicationQuotas
from fleet_device.api.logprobs import TokenSpelling
from fleet_device.api.ollama import (
    MEDIA_TYPE,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaReply,
    OllamaShowRequest,
    stream_lines,
)
from fleet_device.api.problems import OLLAMA, ApiProblem, problem_of
from fleet_device.api.records import RecordHeader, Records, Rendering, StreamRecord
from fleet_device.api.replies import (
    VERIFIED_HEADER,
    WAITED_HEADER,
    ChoiceEvents,
    Events,
    EventsResponse,
    Happened,
    Pause,
    Reply,
    ReplyRendering,
)
from fleet_device.api.requests import ChatRequest, CompletionRequest, TextRequest, TokenizeRequest, read_request
from fleet_device.api.responses import ResponseReply, ResponsesRequest, stream_response
from fleet_device.applications import Application, ApplicationsFile
from fleet_device.drafters.contract import DrafterError, TextCodec
from fleet_device.errors import DeviceError, EdgeUnavailable, SessionRefused
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Piece
from fleet_device.requests.queue import Delayed, Failed, Listener, Ticket
from fleet_device.requests.structured import unusable
from fleet_device.requests.thinking import marks_of
from fleet_device.settings import DeviceSettings, OfflinePolicy
from schemas.names import VERSION
from schemas.policy import Grammar

MAX_BODY_BYTES: Final = 1 << 20
"""Largest request body."""

ANY_MODEL: Final = "fleet"
"""Name of whatever model an edge has, for clients that look a model up before they use it."""


class Backend(Protocol):
    """Interface of the device for the API. Its methods do not block."""

    @property
    def since(self) -> datetime: ...

    def submit(
        self, prepare: Callable[[TextCodec], GenerateRequest], listener: Listener, *, target: str = ""
    ) -> Ticket:
        """Queue a request, which fails if edges have several targets, and none this name."""

    def cancel(self, ticket: Ticket) -> None: ...

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar; may take seconds and is called on its own thread. Raise SessionRefused."""

    @property
    def codec(self) -> TextCodec: ...

    @property
    def draft_model(self) -> str: ...

    @property
    def context(self) -> int:
        """Number of tokens of prompt and output together."""

    def targets(self, *, online: bool = True) -> tuple[str, ...]: ...

    def absence(self, *, for_s: float = 0.0) -> EdgeUnavailable | None: ...

    def await_edge(self) -> None:
        """Wait for an edge, as long as an outage may last; called on one of the queue's threads."""

    def health(self) -> dict[str, Any]: ...

    def status(self) -> dict[str, Any]: ...


_RESPONSES: Final = "/v1/responses"
_RECORDED: Final[dict[str, type[ChatRequest | CompletionRequest | ResponsesRequest]]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    _RESPONSES: ResponsesRequest,
}
"""Paths of the requests that can run in the background."""


def _call_later(seconds: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()


def create_app(
    backend: Backend,
    settings: DeviceSettings,
    *,
    wall_clock: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
    pause: Pause = asyncio.sleep,
    schedule: Callable[[float, Callable[[], None]], None] = _call_later,
) -> Starlette:
    """Return the API as an ASGI application; `wall_clock` returns Unix seconds.

    Requests in the background that an earlier process has left go on.
    """
    records = Records(settings.state_file(".streams"), clock, schedule)
    api = _Api(backend, settings, wall_clock, pause, ApplicationQuotas(clock), TokenSpelling(backend.codec), records)
    api.go_on()
    named = settings.applications
    applications = None if named is None else ApplicationsFile(named.expanduser())
    pages = tuple(_PAGE) if settings.api_page else ()
    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route(_RESPONSES, api.response, methods=["POST"]),
            *(Route(f"{path}/{{record}}", api.retrieve) for path in _RECORDED),
            *(Route(f"{path}/{{record}}", api.delete, methods=["DELETE"]) for path in _RECORDED),
            *(Route(f"{path}/{{record}}", _missing, methods=["POST"]) for path in _RECORDED),
            Route(f"{_RESPONSES}/{{record}}/cancel", api.cancel_response, methods=["POST"]),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            *(Route(path, api.health) for path in HEALTH_PATHS),
            Route("/version", api.version),
            Route("/api/chat", api.ollama_chat, methods=["POST"]),
            Route("/api/generate", api.ollama_generate, methods=["POST"]),
            Route("/api/tags", api.tags),
            Route("/api/ps", api.tags),
            Route("/api/show", api.show, methods=["POST"]),
            Route("/api/version", api.version),
            Route("/status", api.status),
            *(Route(path, _page) for path in pages),
        ],
        middleware=[
            Middleware(AccessGuard, applications=applications, names=_names(settings), public=(*HEALTH_PATHS, *pages))
        ],
        exception_handlers={
            ApiProblem: _answer_problem,
            HTTPException: _answer_http,
            DeviceError: _answer_problem,
            Exception: _answer_problem,  # in the API's shape too, and logged by the server
        },
    )


_PAGE: Final = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
_PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def _page(request: Request) -> Response:
    """Serve a file of the chat page, which uses the API as any application does."""
    return FileResponse(Path(__file__).with_name("page") / _PAGE[request.scope["path"]], headers=_PAGE_HEADERS)


async def _missing(_request: Request) -> Response:
    """Answer requests that OpenAI has and a device has not, such as `/v1/responses/compact`: no 405 of a record."""
    raise HTTPException(404)


def _names(settings: DeviceSettings) -> frozenset[str] | None:
    """Return the hosts that a URL may name; None for any, over a Unix socket, which no web page reaches."""
    if isinstance(settings.api_address, Path):
        return None
    return LOOPBACK.union(filter(None, (name.strip().lower() for name in settings.api_hosts.split(","))))


async def _answer_problem(request: Request, error: Exception) -> Response:
    return problem_of(error).response(request.scope["path"])


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = f"{error.detail}: {request.method} {request.url.path[:200]}."
    code = error.detail.lower().replace(" ", "_")
    return ApiProblem(error.status_code, sentence, code=code, headers=error.headers).response(request.scope["path"])


_ABLE: Final = frozenset({"ok", "local"})


@dataclass(frozen=True, slots=True)
class _Api:
    backend: Backend
    settings: DeviceSettings
    wall_clock: Callable[[], float]
    pause: Pause
    quotas: ApplicationQuotas
    spelling: TokenSpelling
    records: Records

    async def chat(self, request: Request) -> Response:
        body = await _body(request)
        return await self._text(request, read_request(ChatRequest, body), body)

    async def completion(self, request: Request) -> Response:
        body = await _body(request)
        return await self._text(request, read_request(CompletionRequest, body), body)

    async def response(self, request: Request) -> Response:
        body = await _body(request)
        asked = read_request(ResponsesRequest, body)
        chat = asked.chat()
        if asked.background:
            return await self._in_background(request, asked, body)
        reply = self._response(asked, secrets.token_hex(12), int(self.wall_clock()), self._model_name(chat))
        return await self._answer(
            request,
            chat,
            whole=lambda texts: reply.whole(texts[0]),
            stream=lambda text, first: stream_response(reply, text, first),
        )

    async def ollama_chat(self, request: Request) -> Response:
        return await self._ollama(request, read_request(OllamaChatRequest, await _body(request)))

    async def ollama_generate(self, request: Request) -> Response:
        return await self._ollama(request, read_request(OllamaGenerateRequest, await _body(request)))

    async def _ollama(self, request: Request, asked: OllamaChatRequest | OllamaGenerateRequest) -> Response:
        if asked.think and not self._thinks():
            raise ApiProblem(400, "The model does not think; leave the parameter 'think' out.", param="think")
        openai = asked.openai()
        reply = OllamaReply(
            chat=isinstance(asked, OllamaChatRequest),
            model=asked.model,
            created_at=datetime.fromtimestamp(self.wall_clock(), UTC).isoformat(),
            tools=None if openai is None else openai.tool_calls(),
        )
        if openai is None:
            return JSONResponse(reply.loaded())
        return await self._answer(
            request,
            openai,
            whole=lambda texts: reply.whole(texts[0]),
            stream=lambda text, first: stream_lines(reply, text, first),
            media_type=MEDIA_TYPE,
        )

    async def tags(self, _request: Request) -> Response:
        """List the models that there are, and those that are loaded: they are the same."""
        facts = self._ollama_facts() | {"size": 0, "size_vram": 0, "digest": ""}
        return JSONResponse({"models": [{"name": name, "model": name, **facts} for name in self.backend.targets()]})

    async def show(self, request: Request) -> Response:
        asked = read_request(OllamaShowRequest, await _body(request))
        self._check_model((asked.model or asked.name).removesuffix(":latest"))
        thinks = await run_in_threadpool(self._thinks)  # it may wait for a template
        capabilities = ["completion", "tools", *(["thinking"] if thinks else [])]
        info = {"general.architecture": ANY_MODEL, f"{ANY_MODEL}.context_length": self.backend.context}
        return JSONResponse({**self._ollama_facts(), "capabilities": capabilities, "model_info": info})

    async def tokenize(self, request: Request) -> Response:
        asked, codec = read_request(TokenizeRequest, await _body(request)), self.backend.codec
        try:
            tokens = await run_in_threadpool(asked.tokens, codec)
        except (DeviceError, DrafterError) as error:
            raise problem_of(error) from None
        strings = list(map(self.spelling.name, tokens)) if asked.return_token_strs else None
        body = {"count": len(tokens), "max_model_len": self.backend.context, "tokens": tokens, "token_strs": strings}
        return JSONResponse(body)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.backend.targets()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._model(name))

    async def health(self, request: Request) -> Response:
        health = self.backend.health()
        status = 200 if health["status"] in _ABLE else 503
        client, server = request.client, request.scope.get("server")
        if client is not None and server is not None and client.host != server[0]:
            health = {"status": health["status"], "reason": None}  # another machine, which has shown no key
        return JSONResponse(health, status)

    async def status(self, _request: Request) -> Response:
        return JSONResponse(self.backend.status(), headers={"Cache-Control": "no-store"})

    async def version(self, _request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    def _check_model(self, name: str) -> None:
        if name != ANY_MODEL and name not in self.backend.targets():
            raise ApiProblem(404, f"There is no model {name[:100]!r} now.", code="model_not_found", param="model")

    def _thinks(self) -> bool:
        try:
            template = self.backend.codec.chat_template
        except EdgeUnavailable:
            return False
        return template is not None and marks_of(template) is not None

    def _ollama_facts(self) -> dict[str, Any]:
        details = {"format": "", "family": "", "parameter_size": ""}
        return {"modified_at": self.backend.since.isoformat(), "details": details}

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(self.backend.since.timestamp()), "owned_by": "fleet"}

    async def _text(self, request: Request, asked: ChatRequest | CompletionRequest, body: bytes) -> Response:
        if asked.background:
            return await self._in_background(request, asked, body)
        reply = self._reply(asked, secrets.token_hex(12), int(self.wall_clock()), self._model_name(asked))
        silent = asked.max_tokens == 0
        return await self._answer(
            request,
            asked,
            whole=lambda texts: reply.whole([text.without_output() for text in texts] if silent else texts),
            stream=lambda text, first: text.stream(reply, first),
        )

    async def _answer(
        self,
        request: Request,
        asked: TextRequest,
        *,
        whole: Callable[[list[GeneratedText]], dict[str, Any]],
        stream: Callable[[ChoiceEvents, Happened], AsyncIterator[bytes]],
        media_type: str = "text/event-stream",
    ) -> Response:
        await self._check(asked)
        events = Events()
        tickets = self._submit(asked, events, getattr(request.state, "application", None))
        text = ChoiceEvents(events, tickets, self.pause)
        try:
            async with self._until_disconnect(request, tickets):
                if not asked.stream:
                    texts = await text.end()
                    verified = all(each.verified for each in texts)
                    headers = {VERIFIED_HEADER: str(verified).lower(), **_waited(tickets)}
                    return JSONResponse(whole(texts), headers=headers)
                first = await text.first()
        except BaseException:
            self._cancel(tickets)
            raise
        return EventsResponse(
            stream(text, first), headers=_waited(tickets), at_end=lambda: self._cancel(tickets), media_type=media_type
        )

    async def _check(self, asked: TextRequest) -> None:
        """Raise what a request fails with before it is queued: an unusable grammar, or no edge."""
        if (grammar := asked.text_grammar()) is not None:
            try:
                await run_in_threadpool(self.backend.check_grammar, grammar)
            except SessionRefused as error:
                raise _problem(error, asked) from None
        outages = replace(self.settings.outages(), policy=asked.offline or self.settings.offline)
        if outages.policy is OfflinePolicy.FAIL:
            missing = self.backend.absence(for_s=outages.absence_s)
            if missing is not None:
                raise missing

    # In the background

    async def _in_background(
        self, request: Request, asked: ChatRequest | CompletionRequest | ResponsesRequest, body: bytes
    ) -> Response:
        text = _as_text(asked)
        if not asked.stream and not isinstance(asked, ResponsesRequest):
            raise unusable("background", "it needs stream to be true; only responses can be fetched as a whole")
        if (text.n or 1) > 1:
            raise unusable("background", "it goes with one choice")
        await self._check(text)
        application = getattr(request.state, "application", None)
        seed = self.settings.policy().seed if asked.seed is None else asked.seed
        prefix = {ChatRequest: "chatcmpl-", CompletionRequest: "cmpl-"}.get(type(asked), "resp_")
        header = RecordHeader(
            name=f"{prefix}{secrets.token_hex(12)}",
            path=request.scope["path"],
            application=None if application is None else application.name,
            created=int(self.wall_clock()),
            model=self._model_name(text),
            body=json.dumps(json.loads(body) | {"seed": seed}),
        )
        record = self.records.begin(header, self._rendering(header))
        try:
            self.quotas.begin(application, requests=1)
            try:
                self._run(record, application)
            except BaseException:
                self.quotas.end(application)
                raise
        except BaseException:
            self.records.erase(record)
            raise
        place = {"Content-Location": f"{header.path}/{header.name}"}
        if asked.stream:
            return self._events(record, -1, place)
        return JSONResponse(self._whole(record), headers=place)

    def go_on(self) -> None:
        """Continue what an earlier process has left."""
        for record in self.records.load(self._rendering):
            try:
                self._run(record, None)
            except Exception as error:  # noqa: BLE001 - the others go on
                record.fail(error)

    def _run(self, record: StreamRecord, application: Application | None) -> None:
        header = record.header
        text = _as_text(read_request(_RECORDED[header.path], header.body.encode()))
        record.explain = partial(_problem, asked=text)

        def prepare(codec: TextCodec) -> GenerateRequest:
            if record.starts:
                self.backend.await_edge()  # its chat template is that of the request
            return record.prepare(partial(_prepare, text, self.settings, header.application), codec)

        def listen(each: Piece | Delayed | GeneratedText | Failed) -> None:
            self.quotas.note(application, each)
            if _is_sent(each, text):
                record.note(each)

        record.ticket = self.backend.submit(prepare, listen, target=self._target(text.model))

    def _rendering(self, header: RecordHeader) -> Rendering:
        asked = read_request(_RECORDED[header.path], header.body.encode())
        *_, name = header.name.replace("_", "-").rpartition("-")
        if isinstance(asked, ResponsesRequest):
            return self._response(asked, name, header.created, header.model)
        return ReplyRendering(self._reply(asked, name, header.created, header.model))

    async def retrieve(self, request: Request) -> Response:
        """Send the events behind the last one that the client has, or a response as it is."""
        record, query = self._record(request), request.query_params
        last = request.headers.get("last-event-id") or query.get("starting_after")
        if record.header.path == _RESPONSES and last is None and query.get("stream") != "true":
            return JSONResponse(self._whole(record), headers={"Cache-Control": "no-store"})
        try:
            after = -1 if last is None else int(last)
        except ValueError:
            raise unusable("starting_after", "it is the number of the last event that has arrived") from None
        if record.ended_at is not None and after >= len(record.events) - 1:
            return Response(status_code=204)  # which keeps a browser's EventSource from connecting again
        return self._events(record, max(-1, after), {})

    async def cancel_response(self, request: Request) -> Response:
        record = self._record(request)
        self._cancel_record(record)
        return JSONResponse(self._whole(record))

    async def delete(self, request: Request) -> Response:
        record = self._record(request)
        self._cancel_record(record)
        self.records.erase(record)
        kind = "response" if record.header.path == _RESPONSES else "chat.completion.deleted"
        return JSONResponse({"id": record.header.name, "object": kind, "deleted": True})

    def _record(self, request: Request) -> StreamRecord:
        name = request.path_params["record"]
        path = request.scope["path"].removesuffix("/cancel").removesuffix(f"/{name}")
        application = getattr(request.state, "application", None)
        return self.records.find(name, path, None if application is None else application.name)

    def _cancel_record(self, record: StreamRecord) -> None:
        if record.ended_at is None and record.ticket is not None:
            record.cancelled = True
            self.backend.cancel(record.ticket)

    def _events(self, record: StreamRecord, after: int, headers: dict[str, str]) -> Response:
        return EventsResponse(record.read(after, self.pause), headers=headers, at_end=lambda: None)

    def _whole(self, record: StreamRecord) -> dict[str, Any]:
        reply = record.rendering
        assert isinstance(reply, ResponseReply)
        if record.ended_at is not None:
            return reply.ended_as(record.events[-1])
        begun = record.ticket is not None and record.ticket.begun
        return reply.unfinished("cancelled" if record.cancelled else "in_progress" if begun else "queued")

    def _submit(self, asked: TextRequest, events: Events, application: Application | None) -> list[Ticket]:
        """Submit all choices, or none: if the queue has no room for one, those before it are cancelled."""
        loop, most = asyncio.get_running_loop(), self.settings.requests_at_once + self.settings.api_waiting
        choices = asked.choices(self.settings)
        if (count := len(choices)) > most:
            raise ApiProblem(
                400,
                f"The device accepts at most {most} requests at a time; {count} were requested.",
                param="n" if asked.n == count else asked.prompt_field,
            )

        def listen(number: int, each: Piece | Delayed | GeneratedText | Failed) -> None:
            self.quotas.note(application, each)
            if isinstance(each, Failed):
                each = replace(each, error=_problem(each.error, asked))
            if _is_sent(each, asked):
                loop.call_soon_threadsafe(events.put_nowait, (number, each))

        tickets: list[Ticket] = []
        self.quotas.begin(application, requests=count)
        try:
            for number, choice in enumerate(choices):
                prepare = partial(_prepare, choice, self.settings, None if application is None else application.name)
                listener = partial(listen, number)
                tickets.append(self.backend.submit(prepare, listener, target=self._target(asked.model)))
        except BaseException:
            self.quotas.end(application, requests=count - len(tickets))
            self._cancel(tickets)
            raise
        return tickets

    def _cancel(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.backend.cancel(ticket)

    @asynccontextmanager
    async def _until_disconnect(self, request: Request, tickets: Sequence[Ticket]) -> AsyncIterator[None]:
        """Cancel the requests if the client disconnects before they end."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._cancel(tickets)

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()

    def _response(self, asked: ResponsesRequest, name: str, created: int, model: str) -> ResponseReply:
        chat = asked.chat()
        tools, spelling = chat.tool_calls(name), self._spelling(chat)
        return ResponseReply(name, created, model, asked, self.settings, self.wall_clock, tools, spelling)

    def _reply(self, asked: ChatRequest | CompletionRequest, name: str, created: int, model: str) -> Reply:
        chat = isinstance(asked, ChatRequest)
        return Reply(
            chat=chat,
            name=f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            created=created,
            model=model,
            include_usage=asked.include_usage,
            continuous_usage=asked.continuous_usage,
            include_origins=asked.include_origins,
            spelling=self._spelling(asked),
            tools=asked.tool_calls(name),
            echo=self.spelling if isinstance(asked, CompletionRequest) and asked.echo else None,
            prompts=len(asked.prompt) if isinstance(asked, CompletionRequest) else 1,
        )

    def _target(self, model: str | None) -> str:
        """Return the target that a request names; the setting's for `fleet`, and for none."""
        name = (model or "").removesuffix(":latest")
        return self.settings.target if name in ("", ANY_MODEL) else name

    def _model_name(self, asked: TextRequest) -> str:
        """Return the requested target, else that of an edge, or without an edge the draft model."""
        if (name := self._target(asked.model)) in self.backend.targets(online=False):
            return name
        return next(iter(self.backend.targets()), self.backend.draft_model)

    def _spelling(self, asked: TextRequest) -> TokenSpelling | None:
        return None if asked.max_logprobs is None else self.spelling


def _problem(error: Exception, asked: TextRequest) -> ApiProblem:
    return problem_of(error, prompt=asked.prompt_field, grammar=asked.grammar_field)


def _is_sent(event: Piece | Delayed | GeneratedText | Failed, asked: TextRequest) -> bool:
    """A piece without text is sent only for what else it has."""
    silent = isinstance(event, Piece) and not event.text and not event.reasoning
    return not silent or asked.max_logprobs is not None or asked.continuous_usage


def _as_text(asked: ChatRequest | CompletionRequest | ResponsesRequest) -> TextRequest:
    return asked.chat() if isinstance(asked, ResponsesRequest) else asked


def _waited(tickets: Sequence[Ticket]) -> dict[str, str]:
    waits = [ticket.waited_s for ticket in tickets if ticket.begun]
    return {WAITED_HEADER: f"{min(waits, default=0.0) * 1e3:.0f}"}


def _prepare(asked: TextRequest, defaults: DeviceSettings, app: str | None, codec: TextCodec) -> GenerateRequest:
    return replace(asked.generate_request(codec, defaults), app=app)


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # This also keeps web pages out: a browser lets them send this type only if the server agrees. Ollama's clients do
    # not declare it, and are no pages: a browser names the page's origin with every POST.
    if kind != "application/json" and (not request.scope["path"].startswith(OLLAMA) or "origin" in request.headers):
        raise ApiProblem(415, "The body must be JSON: send it with Content-Type: application/json.")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise ApiProblem(413, f"The body has more than {MAX_BODY_BYTES} bytes.", code="body_too_large")
    except ClientDisconnect:
        # Nobody reads this, but without it the server would log a traceback.
        raise ApiProblem(400, "The connection was closed before the whole body had arrived.") from None
    return bytes(body)

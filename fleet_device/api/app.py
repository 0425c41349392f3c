"""Local HTTP API: its routes."""

import asyncio
import secrets
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
from fleet_device.api.replies import (
    VERIFIED_HEADER,
    WAITED_HEADER,
    ChoiceEvents,
    Events,
    EventsResponse,
    Happened,
    Pause,
    Reply,
)
from fleet_device.api.requests import ChatRequest, CompletionRequest, TextRequest, TokenizeRequest, read_request
from fleet_device.api.responses import ResponseReply, ResponsesRequest, stream_response
from fleet_device.applications import Application, ApplicationsFile
from fleet_device.drafters.contract import DrafterError, TextCodec
from fleet_device.errors import DeviceError, EdgeUnavailable, SessionRefused
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Piece
from fleet_device.requests.queue import Delayed, Failed, Listener, Ticket
from fleet_device.requests.thinking import marks_of
from fleet_device.settings import DeviceSettings, OfflinePolicy
from schemas.names import VERSION
from schemas.policy import Grammar

MAX_BODY_BYTES: Final = 1 << 20
"""Largest request body."""

ANY_MODEL: Final = "fleet"
"""Name of whatever model an edge has, for clients that look a model up before they use it."""


class Backend(Protocol):
    """What the API needs of the device. Its methods do not block."""

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

    def health(self) -> dict[str, Any]: ...

    def status(self) -> dict[str, Any]: ...


def create_app(
    backend: Backend,
    settings: DeviceSettings,
    *,
    wall_clock: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
    pause: Pause = asyncio.sleep,
) -> Starlette:
    """Return the API as an ASGI application; `wall_clock` returns Unix seconds."""
    api = _Api(backend, settings, wall_clock, pause, ApplicationQuotas(clock), TokenSpelling(backend.codec))
    named = settings.applications
    applications = None if named is None else ApplicationsFile(named.expanduser())
    pages = tuple(_PAGE) if settings.api_page else ()
    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/responses", api.response, methods=["POST"]),
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

    async def chat(self, request: Request) -> Response:
        return await self._text(request, read_request(ChatRequest, await _body(request)))

    async def completion(self, request: Request) -> Response:
        return await self._text(request, read_request(CompletionRequest, await _body(request)))

    async def response(self, request: Request) -> Response:
        asked = read_request(ResponsesRequest, await _body(request))
        chat, name, created = asked.chat(), secrets.token_hex(12), int(self.wall_clock())
        reply = ResponseReply(
            name,
            created,
            self._model_name(chat),
            asked,
            self.settings,
            self.wall_clock,
            chat.tool_calls(),
            self._spelling(chat),
        )
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

    async def _text(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        reply, silent = self._reply(asked), asked.max_tokens == 0
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

    def _submit(self, asked: TextRequest, events: Events, application: Application | None) -> list[Ticket]:
        """Submit all choices, or none: if the queue has no room for one, those before it are cancelled."""
        loop, most = asyncio.get_running_loop(), self.settings.texts_at_once + self.settings.api_waiting
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
            silent = isinstance(each, Piece) and not each.text and not each.reasoning
            if silent and asked.max_logprobs is None and not asked.continuous_usage:
                return  # there is nothing to send
            loop.call_soon_threadsafe(events.put_nowait, (number, each))

        tickets: list[Ticket] = []
        self.quotas.begin(application, texts=count)
        try:
            for number, choice in enumerate(choices):
                prepare = partial(_prepare, choice, self.settings, None if application is None else application.name)
                listener = partial(listen, number)
                tickets.append(self.backend.submit(prepare, listener, target=self._target(asked.model)))
        except BaseException:
            self.quotas.end(application, texts=count - len(tickets))
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

    def _reply(self, asked: ChatRequest | CompletionRequest) -> Reply:
        chat = isinstance(asked, ChatRequest)
        return Reply(
            chat=chat,
            name=f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            created=int(self.wall_clock()),
            model=self._model_name(asked),
            include_usage=asked.include_usage,
            continuous_usage=asked.continuous_usage,
            include_origins=asked.include_origins,
            spelling=self._spelling(asked),
            tools=asked.tool_calls(),
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

"""Stand-in for vLLM: answers as it documents, from any verifier, with configurable faults.

Over a scripted verifier its distribution is known in closed form; over a packed one it serves a real model. It caches
nothing.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fleet_edge.verifiers.contract import Item, Verifier
from tests.support.waiting import PATIENCE_S

Answer = dict[str, Any]
_GLANCE_S: Final = 0.005
_MAX_QUESTIONS: Final = 10_000


@dataclass(slots=True)
class Fault:
    status: int | None = None
    hangs: bool = False
    change: Callable[[Answer], object] | None = None
    unwell: bool = False


class _MortalServer(uvicorn.Server):
    """Ends at once, without a word to its clients."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(_GLANCE_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listening in sockets or ():
            listening.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for task in self.server_state.tasks:
            task.cancel()


@dataclass
class InferenceServer:
    """A server on its own thread; a context manager that may be entered again."""

    verifier: Verifier
    words: Sequence[str]
    model: str = "served/model"
    max_logprobs: int = 64
    max_model_len: int = 0
    key: str = ""
    port: int = 0
    fault: Fault = field(default_factory=Fault)
    questions: list[Answer] = field(default_factory=list)
    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None
    _computing: threading.Lock = field(default_factory=threading.Lock)
    _sequence: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        listening.listen(256)
        self._server = _MortalServer(uvicorn.Config(self._app(), log_config=None, lifespan="off"))
        self._thread = threading.Thread(target=self._serve, args=(self._server, listening), name="inference-server")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Vanish as a killed process does: open requests get no answer."""
        server, thread = self._server, self._thread
        if server is None or thread is None:
            return
        server.should_exit = True
        thread.join(PATIENCE_S)
        self._server = self._thread = None

    kill = __exit__

    # Within

    @staticmethod
    def _serve(server: uvicorn.Server, listening: socket.socket) -> None:
        async def serve() -> None:
            await server.serve(sockets=[listening])

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(serve())
        listening.close()

    def _app(self) -> Starlette:
        routes = [
            self._route("/health", self._health, "GET"),
            self._route("/v1/models", self._models, "GET"),
            self._route("/detokenize", self._detokenize, "POST"),
            self._route("/version", self._version, "GET"),
            self._route("/v1/completions", self._completions, "POST"),
        ]
        return Starlette(routes=routes)

    def _route(self, path: str, answer: Callable[[Answer], Awaitable[object]], method: str) -> Route:
        async def handle(request: Request) -> Response:
            if self.key and path != "/health" and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, status_code=401)
            body = await request.json() if method == "POST" else {}
            body |= {"session": request.headers.get("x-session-id", "")}
            try:
                found = await answer(body)
            except HTTPException as error:
                said = {"error": {"message": error.detail, "type": "BadRequestError", "code": error.status_code}}
                return JSONResponse(said, status_code=error.status_code)
            return found if isinstance(found, Response) else JSONResponse(found)

        return Route(path, handle, methods=[method])

    async def _health(self, _body: Answer) -> object:
        return PlainTextResponse("", status_code=503 if self.fault.unwell else 200)

    async def _version(self, _body: Answer) -> object:
        return {"version": "0.0.stand-in"}

    async def _models(self, _body: Answer) -> object:
        length = self.max_model_len or self.verifier.info.context
        return {"object": "list", "data": [{"id": self.model, "object": "model", "max_model_len": length}]}

    async def _detokenize(self, body: Answer) -> object:
        if any(not 0 <= token < len(self.words) for token in body["tokens"]):
            raise HTTPException(400, "Token id is out of vocabulary")
        return {"prompt": "".join(self.words[token] for token in body["tokens"])}

    async def _completions(self, body: Answer) -> object:
        """Serve vLLM's `/v1/completions` for token-id prompts; more than one token is decoded greedily."""
        self._check_model(body)
        top = body.get("logprobs")
        if top is not None and top > self.max_logprobs:
            raise HTTPException(
                400, f"Requested sample logprobs of {top}, which is greater than max allowed: {self.max_logprobs}"
            )
        prompts = body["prompt"]
        if body["max_tokens"] > 1:
            written = await self._write(prompts[0], body["max_tokens"])
            named = {"tokens": [f"token_id:{token}" for token in written]}
            return {"choices": [{"index": 0, "text": "", "logprobs": named if top is not None else None}]}
        rows = await self._compute(prompts, [1] * len(prompts), most=self.max_model_len - 1)
        choices = []
        for index, logprobs in enumerate(rows):
            best = _best(logprobs[0], top or 1)
            entries = {f"token_id:{token}": value for value, token in best}
            said = {"top_logprobs": [entries], "tokens": [next(iter(entries))], "token_logprobs": [best[0][0]]}
            text = self.words[best[0][1]]
            choices.append({"index": index, "text": text, "logprobs": said if top is not None else None})
        return await self._faulty(body, {"object": "text_completion", "model": self.model, "choices": choices[::-1]})

    async def _write(self, prompt: Sequence[int], length: int) -> list[int]:
        text = list(prompt)
        for _ in range(length):
            row = (await self._compute([text], [1], most=self.max_model_len - 1))[0][0]
            text.append(_best(row, 1)[0][1])
        return text[len(prompt) :]

    def _check_model(self, body: Answer) -> None:
        if body.get("model") != self.model:
            raise HTTPException(404, f"The model `{body.get('model')}` does not exist.")

    async def _faulty(self, body: Answer, answer: Answer) -> object:
        if len(self.questions) < _MAX_QUESTIONS:
            self.questions.append(body)
        while self.fault.hangs:  # noqa: ASYNC110 - set from another thread; until the client disconnects or the fault ends
            await asyncio.sleep(0.01)
        if self.fault.status is not None:
            raise HTTPException(self.fault.status, "as it was told to")
        return answer if self.fault.change is None else self.fault.change(answer)

    async def _compute(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], *, most: int) -> list[Any]:
        for prompt in prompts:
            if 0 < most < len(prompt):
                raise HTTPException(400, f"This model's maximum context length is {self.max_model_len} tokens.")
            if not all(0 <= token < self.verifier.info.vocabulary.size for token in prompt):
                raise HTTPException(400, "Token id is out of vocabulary")
        return await asyncio.to_thread(self._compute_now, prompts, rows)

    def _compute_now(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[Any]:
        with self._computing:
            longest = max(prompts, key=len)
            if rows == [1] * len(prompts) and all(list(each) == list(longest[: len(each)]) for each in prompts):
                shortest = min(map(len, prompts))  # prefixes of one another: one pass gives all
                found = self._score(longest, len(longest) - shortest + 1)
                return [found[len(each) - shortest :][:1] for each in prompts]
            return [self._score(each, number) for each, number in zip(prompts, rows, strict=True)]

    def _score(self, tokens: Sequence[int], rows: int) -> Any:
        self._sequence += 1
        self.verifier.open(self._sequence)
        try:
            logits = np.asarray(self.verifier.score([Item(self._sequence, tuple(tokens), rows)]), dtype=np.float64)
        finally:
            self.verifier.close(self._sequence)
        logits -= logits.max(axis=1, keepdims=True)
        return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def _best(row: Any, top: int) -> list[tuple[float, int]]:
    order = np.argsort(-row, kind="stable")[:top]
    return [(float(row[token]), int(token)) for token in order]

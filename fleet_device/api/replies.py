"""API answers in OpenAI's shapes, whole or as server-sent events, with usage.

While nothing comes, a stream sends comments: clients ignore them, and proxies see that the connection is alive.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fleet_device.api.logprobs import (
    Offsets,
    TokenSpelling,
    TokenWithLogprobs,
    chat_logprobs,
    completion_logprobs,
    prompt_tokens,
    spelled_tokens,
)
from fleet_device.api.problems import problem_of
from fleet_device.client.decision import REPORT_AFTER_S
from fleet_device.requests.generate import GeneratedText, Piece
from fleet_device.requests.queue import Delayed, Failed, Ticket
from fleet_device.requests.structured import ToolCalls
from fleet_device.session.sequence import TokenOrigin
from schemas.reasons import EndReason


def usage_of(texts: Sequence[GeneratedText], *, prompts: int = 1) -> dict[str, Any]:
    """Return the tokens of one answer, all its choices together; a common prompt of several counts once.

    `fleet` counts what OpenAI's shape has no place for:

    - `drafted`: tokens that the device proposed.
    - `accepted`: of these, accepted by the large model. They are in the text.
    - `edge_only`: tokens of edge-only decoding.
    - `forced`: tokens that a grammar left no choice for.
    - `unverified`: tokens that do not follow the large model's distribution, since some were generated without an edge,
      or with another large model than the text began with.
    - `suffix_drafted`, `suffix_accepted`: of those drafted and accepted, the ones from the suffix index.
    - `cached`: tokens of the prompt that the edge had computed before, for each choice.
    - `joules`: energy of the device, if it is known.
    """
    first_of_each = texts[:: len(texts) // prompts]
    prompt, written = sum(len(text.request.prompt) for text in first_of_each), sum(len(text.tokens) for text in texts)
    counters = [text.generation.counters for text in texts]
    accepted, tested = sum(each.accepted for each in counters), sum(each.tested for each in counters)
    cached = [_cached(text) for text in texts]
    joules = [text.generation.joules for text in texts if text.generation.joules is not None]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(map(_cached, first_of_each)), "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": tested - accepted,
            "reasoning_tokens": sum(text.reasoning_tokens for text in texts),
            "audio_tokens": 0,
        },
        "fleet": {
            "cached": sum(cached),
            "drafted": sum(each.drafted for each in counters),
            "accepted": accepted,
            "edge_only": sum(each.edge_only for each in counters),
            "forced": sum(text.origins.count(TokenOrigin.FORCED) for text in texts),
            "unverified": sum(text.unverified for text in texts),
            "suffix_drafted": sum(each.suffix_drafted for each in counters),
            "suffix_accepted": sum(each.suffix_accepted for each in counters),
            **({"joules": round(sum(joules), 3)} if joules else {}),
        },
    }


def session_summary(text: GeneratedText) -> dict[str, Any]:
    counters, policy, choice = text.generation.counters, text.request.policy, text.generation.choice
    return {
        "session": text.generation.session.hex(),
        "verified": text.verified,
        "unverified_tokens": text.unverified,
        "target_id": text.generation.target_id and text.generation.target_id.hex(),
        "seed": policy.seed,
        "mode": policy.mode.value,
        "plan": choice and choice.plan,
        "plan_reason": choice and choice.reason,
        "plan_settled": choice and choice.settled,
        "edge_only_tokens": counters.edge_only,
        "acceptance": counters.acceptance,
        "rounds": counters.rounds,
        "uplink_bytes": counters.uplink_bytes,
        "downlink_bytes": counters.downlink_bytes,
        "round_trip_ms": text.generation.round_trips.mean_ms,
        "resumes": text.generation.resumes,
        "quota_wait_ms": round(counters.quota_wait_ms),
    }


def _cached(text: GeneratedText) -> int:
    closed = text.generation.closed
    return 0 if closed is None else min(closed.reused or 0, len(text.request.prompt))


VERIFIED_HEADER: Final = "X-Fleet-Verified"
"""Header of a whole answer: `true` if all of its text follows the large model's distribution, else `false`."""

WAITED_HEADER: Final = "X-Fleet-Queue-Ms"
"""Header: how long the request waited in the device's queue (milliseconds)."""

DONE: Final = b"data: [DONE]\n\n"

_FINISH: Final = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """The shapes of one answer, to a chat or to a prompt.

    `spelling` is None if no log-probabilities were requested; `tools` turns generated output into tool calls, if the
    request allows that. `echo`, to put prompts in front of their answers, spells them.
    """

    chat: bool
    name: str
    created: int
    model: str
    include_usage: bool = False
    spelling: TokenSpelling | None = None
    tools: ToolCalls | None = None
    continuous_usage: bool = False
    include_origins: bool = False
    echo: TokenSpelling | None = None
    prompts: int = 1
    _offsets: dict[int, Offsets] = field(default_factory=dict)  # of each choice
    _tokens: dict[int, int] = field(default_factory=dict)  # tokens of each choice so far

    def whole(self, texts: Sequence[GeneratedText]) -> dict[str, Any]:
        choices = []
        for number, text in enumerate(texts):
            said: dict[str, Any] = {"content": text.text}
            if self.tools is not None:
                said = self.tools.message(text.text, text.request.native_calls)
            if text.reasoning:
                said["reasoning_content"] = text.reasoning
            content = (
                {"message": {"role": "assistant", **said, "refusal": None, "annotations": []}}
                if self.chat
                else {"text": self._prompt(text) + text.text}
            )
            logprobs = None
            if self.spelling is not None:
                tokens = spelled_tokens(text)
                if self.echo is not None:
                    tokens = prompt_tokens(text) + tokens
                logprobs = self._logprobs(tokens, self.spelling, Offsets())
            finish = _finish(text, calls="tool_calls" in said)
            choices.append({"index": number, **content, "logprobs": logprobs, "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        own = [session_summary(text) for text in texts]
        fleet = own[0] if len(own) == 1 else {**own[0], "choices": own}
        return {
            **self._head(kind),
            "choices": choices,
            "usage": usage_of(texts, prompts=self.prompts),
            "fleet": fleet,
        }

    def first(self, number: int = 0) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""}, number)] if self.chat else []

    def pieces(self, piece: Piece, number: int = 0) -> list[dict[str, Any]]:
        """Return the chunks of a piece; those that do not follow the large model's distribution are marked."""
        logprobs = None
        if self.spelling is not None and piece.parts:
            tokens = [(part.token, part.logprobs) for part in piece.parts]
            logprobs = self._logprobs(tokens, self.spelling, self._offsets.setdefault(number, Offsets()))
        deltas: list[dict[str, Any] | str] = [{"reasoning_content": piece.reasoning}] if piece.reasoning else []
        if self.tools is not None:
            deltas += self.tools.pieces(number, piece.text, piece.native_calls)
        elif piece.text or not deltas:
            deltas.append({"content": piece.text} if self.chat else piece.text)
        if (
            logprobs or self.include_origins
        ) and not deltas:  # they come with the first chunk of a piece, even if a tool call has no delta yet
            deltas.append({})
        chunks = [self._chunk(delta, number) for delta in deltas]
        if logprobs is not None:
            chunks[0]["choices"][0]["logprobs"] = logprobs
        self._tokens[number] = self._tokens.get(number, 0) + piece.tokens
        self._add_usage(chunks, piece.prompt, number)
        if not piece.verified:
            chunks = [{**chunk, "fleet": {"verified": False}} for chunk in chunks]
        if self.include_origins:
            chunks[0] = {**chunks[0], "fleet": {**chunks[0].get("fleet", {}), "tokens": _origins(piece)}}
        return chunks

    def last(self, text: GeneratedText, number: int = 0) -> list[dict[str, Any]]:
        tools, chunks, calls = self.tools, list[dict[str, Any]](), False
        if tools is not None:
            chunks = [self._chunk(each, number) for each in tools.last(number)]
            calls = tools.called(number)
        last = self._chunk({} if self.chat else "", number, _finish(text, calls=calls))
        chunks.append({**last, "fleet": session_summary(text)})
        self._tokens[number] = len(text.tokens)
        self._add_usage(chunks, len(text.request.prompt), number)
        return chunks

    def end(self, texts: Sequence[GeneratedText]) -> list[dict[str, Any]]:
        if not self.include_usage:
            return []
        return [{**self._chunk("", 0), "choices": [], "usage": usage_of(texts)}]

    def _add_usage(self, chunks: Sequence[dict[str, Any]], prompt: int, number: int) -> None:
        if self.continuous_usage:
            written = self._tokens[number]
            usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
            for chunk in chunks:
                chunk["usage"] = usage

    def _logprobs(
        self, tokens: Sequence[TokenWithLogprobs], spelling: TokenSpelling, offsets: Offsets
    ) -> dict[str, Any]:
        if self.chat:
            return chat_logprobs(tokens, spelling)
        return completion_logprobs(tokens, spelling, offsets, control=self.echo is not None)

    def _prompt(self, text: GeneratedText) -> str:
        return "" if self.echo is None else b"".join(map(self.echo.raw, text.request.prompt)).decode(errors="replace")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, content: dict[str, Any] | str, number: int, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta" if self.chat else "text": content, "logprobs": None, "finish_reason": finish}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = {**self._head(kind), "choices": [choice]}
        if self.include_usage:
            chunk["usage"] = None
        return chunk


@dataclass(frozen=True, slots=True)
class ReplyRendering:
    """The events of a stream of one choice."""

    reply: Reply

    def first(self) -> list[bytes]:
        return list(map(event, self.reply.first()))

    def piece(self, piece: Piece) -> list[bytes]:
        return list(map(event, self.reply.pieces(piece)))

    def last(self, text: GeneratedText) -> list[bytes]:
        return [*map(event, [*self.reply.last(text), *self.reply.end([text])]), DONE]

    def failed(self, error: Exception) -> bytes:
        return event(problem_of(error).body())


def _origins(piece: Piece) -> list[dict[str, str]]:
    """Return text and origin of each token; none for text that was held back until the end."""
    return [
        {"text": part.text, "origin": part.origin.value, **({"reasoning": part.reasoning} if part.reasoning else {})}
        for part in piece.parts
    ]


def _finish(text: GeneratedText, *, calls: bool = False) -> str:
    # Any other end is a failure, and answered as one.
    return "tool_calls" if calls and text.reason is EndReason.STOP else _FINISH[text.reason]


_log = logging.getLogger(__name__)

Event = Piece | Delayed | GeneratedText | Failed
Events = asyncio.Queue[tuple[int, Event]]
"""Events of the choices of an answer, each with its number."""

Happened = tuple[int, Event | None]
Pause = Callable[[float], Awaitable[None]]

HEARTBEAT_S: Final = 5.0
"""Seconds without anything to send after which a stream sends a comment."""

ALIVE: Final = b": waiting\n\n"
_QUEUED: Final = "Other requests run first; this one waits for its turn."


class EventsResponse(StreamingResponse):
    """A stream, of server-sent events by default; `at_end` is called at the end, also if the client disconnects."""

    def __init__(
        self,
        content: AsyncIterator[bytes],
        *,
        headers: dict[str, str],
        at_end: Callable[[], None],
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store", **headers})
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


@dataclass(slots=True)
class ChoiceEvents:
    events: Events
    tickets: Sequence[Ticket]
    pause: Pause = asyncio.sleep
    _silent_s: float = 0.0

    async def end(self) -> list[GeneratedText]:
        """Wait for all choices; raise ApiProblem if one failed."""
        ended: dict[int, GeneratedText] = {}
        while len(ended) < len(self.tickets):
            number, current = await self.events.get()
            if isinstance(current, Failed):
                raise problem_of(current.error)
            if isinstance(current, GeneratedText):
                ended[number] = current
        return [ended[number] for number in range(len(self.tickets))]

    async def first(self) -> Happened:
        """Wait briefly for the first event, None if there is none; a failure can still set the HTTP status."""
        number, current = await self.next()
        if isinstance(current, Failed):
            raise problem_of(current.error)
        return number, current

    async def stream(self, reply: Reply, first: Happened) -> AsyncIterator[bytes]:
        """Stream the choices. Failures are sent as events, because the status has been sent already."""
        try:
            for number in range(len(self.tickets)):
                for chunk in reply.first(number):
                    yield event(chunk)
            ended: list[GeneratedText] = []
            number, current = first
            while True:
                if isinstance(current, Failed):
                    # OpenAI's clients raise an error in the stream.
                    yield event(problem_of(current.error).body())
                    return
                for sent in self._sent(reply, number, current):
                    yield sent
                if isinstance(current, GeneratedText):
                    ended.append(current)
                    if len(ended) == len(self.tickets):
                        break
                number, current = await self.next()
            for chunk in reply.end(ended):
                yield event(chunk)
            yield DONE
        except Exception as error:  # noqa: BLE001 - a connection is not to be cut without a word
            _log.exception("A stream failed for a reason that should not be possible.")
            yield event(problem_of(error).body())

    def comment_or(self, current: Piece | Delayed | None, piece: Callable[[Piece], list[bytes]]) -> list[bytes]:
        """Encode an event for the stream; `piece` formats a piece."""
        match current:
            case Piece():
                return piece(current)
            case Delayed():
                return [comment(current.reason)]
        return [self._alive()]

    def _sent(self, reply: Reply, number: int, current: Piece | Delayed | GeneratedText | None) -> list[bytes]:
        if isinstance(current, GeneratedText):
            return [event(chunk) for chunk in reply.last(current, number)]
        return self.comment_or(current, lambda piece: [event(chunk) for chunk in reply.pieces(piece, number)])

    def _alive(self) -> bytes:
        # Other reasons come from the session.
        waits = not any(ticket.begun for ticket in self.tickets)
        says_why = waits and self._silent_s - HEARTBEAT_S < REPORT_AFTER_S <= self._silent_s
        return comment(_QUEUED) if says_why else ALIVE

    async def next(self) -> Happened:
        """Wait for the next event; None if there is none for `HEARTBEAT_S`."""
        coming = asyncio.ensure_future(self.events.get())
        beat = asyncio.ensure_future(self.pause(HEARTBEAT_S))
        try:
            await asyncio.wait({coming, beat}, return_when=asyncio.FIRST_COMPLETED)
            number, current = coming.result() if coming.done() else (0, None)
        finally:
            beat.cancel()
            coming.cancel()
        self._silent_s = 0.0 if current is not None else self._silent_s + HEARTBEAT_S
        return number, current


def comment(sentence: str) -> bytes:
    return b": " + " ".join(sentence.split()).encode() + b"\n\n"

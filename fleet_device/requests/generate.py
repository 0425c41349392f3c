"""Requests and their results: what to generate, who receives it, and its output."""

import codecs
import hashlib
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Final, Protocol

from fleet_device.drafters.contract import Drafter, TextCodec
from fleet_device.pacing.contract import Choice, RoundTrips
from fleet_device.requests.call_formats import CallFormat
from fleet_device.requests.structured import ToolCall, ToolOffer
from fleet_device.requests.thinking import Thinking, ThinkingSplitter, overlap
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.session.states import SessionCounters
from fleet_device.settings import Outages
from schemas.fields import TokenLogprobs
from schemas.messages import Closed
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """End of a thinking that becomes too long.

    Attributes:
        tokens: Most tokens of the thinking.
        closing: Tokens of the closing mark, which then follow.
        policy: Of the answer behind them. Its seed is another, since positions are counted from there: with the same
            one the answer would not be independent of the thinking.
    """

    tokens: int
    closing: tuple[int, ...]
    policy: SamplingPolicy


@dataclass(frozen=True, slots=True)
class Journal:
    """Committed tokens of a request that another process can continue.

    Attributes:
        session: Name of its session at the edge.
        note: Keeps further tokens; on return another process would find them.
        attempt: Number of its next Open, above those of earlier processes.
        committed: What earlier processes have committed, in the batches in which it came.
    """

    session: bytes
    note: Callable[[CommittedTokens], None]
    attempt: int = 0
    committed: tuple[CommittedTokens, ...] = ()

    @property
    def end(self) -> EndReason | None:
        return self.committed[-1].end if self.committed else None

    def behind(self, tokens: int) -> "Journal":
        """Return the journal of a second session behind a number of tokens, which end a batch."""
        session = hashlib.blake2s(self.session, digest_size=len(self.session)).digest()
        ends = accumulate(map(len, self.committed))
        later = tuple(batch for batch, end in zip(self.committed, ends, strict=True) if end > tokens)
        return replace(self, session=session, committed=later)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A generation as the service runs it: tokens of the prompt, policy and limits.

    Attributes:
        logprobs: Number of alternatives whose log-probabilities are returned with those of each token; None for none.
        outages: What happens when no edge answers.
        edge_only: Use edge-only decoding; otherwise the device may draft.
        offer: Functions whose calls `GeneratedText.tool_calls` has.
        echo: Whether the log-probabilities of the prompt are returned too; needs `logprobs` and `edge_only`.
        thinking: The thinking with which the output may begin; None if all of it is the answer.
        budget: Bound of the thinking; None for none.
        target_id: Identity of the only target that may serve it, because its prompt is rendered for that; None if any.
        control: Texts of control tokens that its output shows, by id: they are in the format of its tool calls.
        end_tokens: Ids that end a generation without an edge; None for the draft model's.
        journal: Where its tokens are kept for another process; None if nowhere.
    """

    prompt: tuple[int, ...]
    policy: SamplingPolicy
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    outages: Outages = field(default_factory=Outages)
    app: str | None = None
    edge_only: bool = False
    offer: ToolOffer | None = field(default=None, compare=False, repr=False)
    echo: bool = False
    thinking: Thinking | None = field(default=None, compare=False)
    budget: ThinkingBudget | None = field(default=None, compare=False)
    target_id: bytes | None = None
    control: Mapping[int, bytes] = field(default_factory=dict, compare=False)
    end_tokens: tuple[int, ...] | None = field(default=None, compare=False)
    journal: Journal | None = field(default=None, compare=False, repr=False)

    @property
    def native_calls(self) -> CallFormat | None:
        """Format of the tool calls in the output; None for our own, or none."""
        return None if self.offer is None else self.offer.native


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of a piece, with its log-probabilities if they were requested.

    `text` is empty if the token ends inside a character, or in a possible beginning of a stop string: the token that
    decides on that adds the rest. It is also empty for tokens of the thinking, whose text is `reasoning`.
    """

    token: int
    origin: TokenOrigin
    text: str
    logprobs: TokenLogprobs | None = None
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the output, with empty `text` if the tokens complete none yet; `reasoning` is more of the thinking.

    `parts` are the tokens, none where text that was held back is given out at the end. `verified` pieces follow the
    large model's distribution. `prompt` is the number of tokens of the prompt, and `native_calls` the format of tool
    calls in the text.
    """

    text: str
    tokens: int
    parts: tuple[TokenText, ...] = field(default=(), compare=False)
    verified: bool = True
    prompt: int = field(default=0, compare=False)
    reasoning: str = ""
    native_calls: CallFormat | None = field(default=None, compare=False)


class Cancellation:
    """End a request early. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._wake: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def cancel(self) -> None:
        self._requested.set()
        wake = self._wake
        if wake is not None:
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` when the request is cancelled meanwhile, or at once if it is cancelled already."""
        self._wake = wake
        if self.requested:
            wake()
        try:
            yield
        finally:
            self._wake = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """Callbacks and cancellation of a request, all the way from the application to the session.

    The callbacks run on the thread that runs the request.

    Attributes:
        on_tokens: Receives committed tokens; returns True to end the generation, at a stop string for example.
        on_wait: Receives a sentence that says why no tokens come, once for each long wait.
        deadline: When the application stops waiting (monotonic seconds); None for never.
        on_turn: Receives how long the request waited for the draft model (seconds), once, before anything else.
    """

    on_piece: Callable[[Piece], None] = lambda _piece: None
    on_tokens: Callable[[CommittedTokens], bool | None] = lambda _tokens: None
    on_wait: Callable[[str], None] = lambda _reason: None
    on_turn: Callable[[float], None] = lambda _waited_s: None
    cancellation: Cancellation = field(default_factory=Cancellation)
    deadline: float | None = None


_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished session.

    Attributes:
        closed: What the edge counted, if its confirmation arrived.
        wall_ms: From Open to the end.
        first_ms: From Open to the first committed token; None if there was none.
        edge: The edge that verified the end of it.
        choice: The last plan, and why.
        unverified: Number of tokens at the end that do not follow the target distribution, because some were generated
            without an edge or with another target model.
        target_id: Identity of the target model that the request began with; None if no edge has granted it.
        prompt_logprobs: Of the prompt's tokens after the first, if they were requested.
        joules: Energy of the device, if it has figures; see `fleet_device.power.EnergyMeter`.
    """

    session: bytes
    tokens: tuple[int, ...]
    reason: EndReason
    counters: SessionCounters
    closed: Closed | None
    wall_ms: float
    first_ms: float | None
    resumes: int
    drafts: int
    edge: str | None = None
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    choice: Choice | None = None
    unverified: int = 0
    target_id: bytes | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    joules: float | None = None

    @property
    def mean_draft(self) -> float | None:
        return self.counters.drafted / self.drafts if self.drafts else None


class TextGenerator(Protocol):
    def generate(self, request: GenerateRequest, context: RequestContext) -> Generation: ...


@dataclass(frozen=True, slots=True, repr=False)
class GeneratedText:
    """The text of a finished request.

    Attributes:
        text: The answer, without the stop string that ended it, and without the thinking before it.
        stopped: Whether a stop string ended it.
        generation: The session.
        origins: Origin of each token.
        logprobs: The large model's log-probabilities of each token and of the likeliest alternatives, before any
            shaping; None if they were not asked for.
        tool_calls: Calls of functions, their arguments as JSON; cut off if `reason` is `length`.
        reasoning: The thinking before the answer, and `reasoning_tokens` their number, marks included.
        shown_tokens: Number of tokens up to the end of the text: without those of the stop string.
    """

    request: GenerateRequest
    text: str
    stopped: bool
    generation: Generation
    origins: tuple[TokenOrigin, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    reasoning_tokens: int = 0
    shown_tokens: int = 0

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[: _SHOWN - 1]}…"
        return (
            f"<GeneratedText {text!r}: {len(self.tokens)} tokens, reason {self.reason.value!r}, "
            f"session {self.session!r}{'' if self.verified else f', {self.unverified} tokens unverified'}>"
        )

    def without_output(self) -> "GeneratedText":
        """Return this as if no token had been requested."""
        generation = replace(self.generation, tokens=(), reason=EndReason.LENGTH)
        return GeneratedText(self.request, "", stopped=False, generation=generation)

    @property
    def reason(self) -> EndReason:
        """Why the generation ended; `stop` also for a stop string."""
        return EndReason.STOP if self.stopped else self.generation.reason

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids, up to the one that completes a stop string."""
        return self.generation.tokens

    @property
    def unverified(self) -> int:
        """Number of tokens at the end that do not follow the large model's distribution."""
        return self.generation.unverified

    @property
    def verified(self) -> bool:
        """All tokens follow the large model's distribution."""
        return not self.unverified

    @property
    def session(self) -> str:
        """The session's id in the session log: 16 hexadecimal characters."""
        return self.generation.session.hex()

    @property
    def seed(self) -> int:
        """In mode `coupled` it gives the same text again."""
        return self.request.policy.seed

    @property
    def acceptance(self) -> float | None:
        """Accepted share of the tested draft tokens; None if none was tested."""
        return self.generation.counters.acceptance

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second from Open to the end; 0 if that took no time."""
        return len(self.tokens) / (self.generation.wall_ms / 1e3) if self.generation.wall_ms else 0.0


def generate_text(
    agent: TextGenerator, drafter: Drafter, request: GenerateRequest, context: RequestContext | None = None
) -> GeneratedText:
    """Run a request and return its result.

    A thinking that exceeds its budget is cut, and a second session continues behind the closing mark: what follows has
    the target's distribution given all tokens before it. Tokens of an earlier process come first, in the same pieces.
    """
    context = context or RequestContext()
    text, journal = _GrowingText(drafter.codec, request), request.journal

    def on_tokens(tokens: CommittedTokens) -> bool:
        piece = text.feed(tokens)
        if journal is not None:
            journal.note(tokens.first(piece.tokens))
        context.on_piece(piece)
        return text.stops.found or text.exceeds_budget

    generation = _generate(agent, request, text, replace(context, on_tokens=on_tokens))
    reasoning, rest = text.finish()
    if reasoning or rest:
        context.on_piece(replace(text.piece, text=rest, reasoning=reasoning, verified=text.verified))
    if text.stops.found:
        generation = replace(generation, tokens=generation.tokens[: len(text.origins)])
    logprobs = None if request.logprobs is None else tuple(text.logprobs)
    whole = "".join(text.pieces)
    calls = () if request.offer is None else request.offer.read(whole)
    return GeneratedText(
        request,
        whole,
        text.stops.found,
        generation,
        tuple(text.origins),
        logprobs,
        calls,
        "".join(text.reasoning),
        text.reasoning_tokens,
        text.shown_tokens(len(whole)),
    )


def _generate(
    agent: TextGenerator, request: GenerateRequest, text: "_GrowingText", context: RequestContext
) -> Generation:
    """Run the sessions of a request, behind what an earlier process has committed."""
    journal = request.journal
    for tokens in () if journal is None else journal.committed:
        if text.exceeds_budget:
            text.cut_at = len(text.tokens) + len(tokens)
        context.on_piece(text.feed(tokens))
    goes_on = text.exceeds_budget and text.room_for_closing and not text.ended
    if journal is not None and journal.committed and text.is_complete(journal.end) and not goes_on:
        generation = _ended(journal, text)
    elif text.cut or goes_on:  # all that comes before the closing mark is here
        before = tuple(text.tokens if text.cut_at is None else text.tokens[: text.cut_at - len(text.closing)])
        generation = _answer(agent, request, text, context)
        generation = replace(generation, tokens=(*before, *generation.tokens))
    else:
        generation = agent.generate(request, context)
        if text.exceeds_budget and not context.cancellation.requested and not text.ended:
            generation = replace(generation, tokens=generation.tokens[: len(text.tokens)], reason=EndReason.LENGTH)
            if text.room_for_closing:
                generation = _joined(generation, _answer(agent, request, text, context))
    return generation


def _answer(
    agent: TextGenerator, request: GenerateRequest, text: "_GrowingText", context: RequestContext
) -> Generation:
    """Put the closing mark behind the thinking, and generate what follows."""
    budget, journal = request.budget, request.journal
    assert budget is not None
    if text.cut_at is None:
        text.cut_at = len(text.tokens) + len(budget.closing)
        origin = TokenOrigin.FORCED if text.verified else TokenOrigin.UNVERIFIED
        context.on_tokens(CommittedTokens(budget.closing, (origin,) * len(budget.closing)))
    rest = replace(
        request,
        prompt=(*request.prompt, *text.tokens[: text.cut_at]),
        policy=budget.policy,
        max_new_tokens=request.max_new_tokens - text.cut_at,
        journal=journal and journal.behind(text.cut_at),
    )
    generation = agent.generate(rest, replace(context, on_turn=lambda _waited_s: None))
    return replace(generation, tokens=(*budget.closing, *generation.tokens))


def _ended(journal: Journal, text: "_GrowingText") -> Generation:
    """Return the generation that an earlier process has completed; its counts are lost."""
    return Generation(
        session=journal.session,
        tokens=tuple(text.tokens),
        reason=journal.end or EndReason.LENGTH,
        counters=SessionCounters(),
        closed=None,
        wall_ms=0.0,
        first_ms=None,
        resumes=0,
        drafts=0,
        unverified=sum(not origin.verified for origin in text.origins),
        target_id=journal.committed[-1].target_id,
    )


def _joined(first: Generation, second: Generation) -> Generation:
    """Join the generations of two sessions of one request."""
    counters = {
        each.name: getattr(first.counters, each.name) + getattr(second.counters, each.name)
        for each in fields(SessionCounters)
    }
    return replace(
        second,
        tokens=(*first.tokens, *second.tokens),
        counters=SessionCounters(**counters),
        wall_ms=first.wall_ms + second.wall_ms,
        first_ms=first.first_ms,
        resumes=first.resumes + second.resumes,
        drafts=first.drafts + second.drafts,
        round_trips=RoundTrips(
            first.round_trips.count + second.round_trips.count, first.round_trips.total_ms + second.round_trips.total_ms
        ),
        # What follows unverified tokens is not of the target's distribution either.
        unverified=first.unverified + len(second.tokens) if first.unverified else second.unverified,
    )


class Detokenizer:
    """Incremental decoder.

    Bytes that cannot become valid UTF-8 come out as U+FFFD, so that the text always goes on. The bytes of an incomplete
    character are kept for the next tokens, and dropped at the end. `control` are control tokens with a text.
    """

    def __init__(self, codec: TextCodec, control: Mapping[int, bytes] = MappingProxyType({})) -> None:
        self._codec, self._control = codec, control
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Iterable[int]) -> str:
        pieces = (self._control.get(token) or self._codec.piece(token) for token in tokens)
        return self._decoder.decode(b"".join(pieces))


class StopStrings:
    """Find stop strings in a growing text; after the first one, all text is dropped."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that can be emitted: a possible beginning of a stop string is held back."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        keep = len(text) - held
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class _GrowingText:
    def __init__(self, codec: TextCodec, request: GenerateRequest) -> None:
        self._stream = Detokenizer(codec, {**request.control, **(request.thinking.control if request.thinking else {})})
        self.piece = Piece("", 0, prompt=len(request.prompt), native_calls=request.native_calls)
        self._splitter, self.stops = ThinkingSplitter(request.thinking), StopStrings(request.stop)
        self._budget, self._max, self._end_tokens = request.budget, request.max_new_tokens, codec.end_tokens
        self.closing = () if request.budget is None else request.budget.closing
        self.cut_at: int | None = None  # tokens up to the closing mark that ended the thinking
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.reasoning: list[str] = []
        self.reasoning_tokens = 0
        self._starts: list[int] = []  # characters of the answer before each token
        self._characters = 0
        self.origins: list[TokenOrigin] = []
        self.logprobs: list[TokenLogprobs] = []

    def feed(self, tokens: CommittedTokens) -> Piece:
        """Return the piece of more tokens, up to the one that completes a stop string.

        How many come behind that one depends on the drafts.
        """
        parts: list[TokenText] = []
        for token, origin, logprobs in zip(
            tokens.ids, tokens.origins, tokens.logprobs or (None,) * len(tokens.ids), strict=True
        ):
            thinks = self._splitter.thinks
            reasoning, text = self._splitter.feed(self._stream.feed((token,)))
            parts.append(TokenText(token, origin, self.stops.feed(text), logprobs, reasoning))
            self._starts.append(self._characters)
            self._characters += len(text)
            if thinks or self._splitter.thinks or reasoning:
                self.reasoning_tokens = len(self._starts)
            if self.stops.found or self.exceeds_budget:
                break
        self.tokens += tokens.ids[: len(parts)]
        self.origins += tokens.origins[: len(parts)]
        self.logprobs += tokens.logprobs[: len(parts)]
        text = "".join(part.text for part in parts)
        reasoning = "".join(part.reasoning for part in parts)
        piece = replace(
            self.piece, text=text, tokens=len(parts), parts=tuple(parts), verified=self.verified, reasoning=reasoning
        )
        self.pieces.append(piece.text)
        self.reasoning.append(piece.reasoning)
        return piece

    @property
    def cut(self) -> bool:
        return self.cut_at is not None

    @property
    def exceeds_budget(self) -> bool:
        """The thinking has used up its budget and is not over."""
        if self._budget is None or self.cut:
            return False
        return self._splitter.thinks and self.reasoning_tokens >= self._budget.tokens

    @property
    def room_for_closing(self) -> bool:
        """There is room for the closing mark and a token of the answer."""
        return self._budget is not None and len(self.tokens) + len(self._budget.closing) < self._max

    def is_complete(self, end: EndReason | None) -> bool:
        """The output ends with these tokens: by the session's `end`, a stop string, or the budget of the thinking."""
        return end is not None or self.stops.found or self.exceeds_budget

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._end_tokens

    @property
    def verified(self) -> bool:
        return not self.origins or self.origins[-1].verified

    def shown_tokens(self, characters: int) -> int:
        """Return the number of tokens up to the end of an answer of this length."""
        return max(self.reasoning_tokens, bisect_left(self._starts, characters))

    def finish(self) -> tuple[str, str]:
        """Return the rest of the thinking and of the answer that was held back."""
        reasoning, text = self._splitter.finish()
        self.reasoning.append(reasoning)
        self.pieces.append(self.stops.feed(text) + self.stops.finish())
        return reasoning, self.pieces[-1]

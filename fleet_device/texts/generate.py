"""Generates a text on request; shared by the command line, the local API and the self-test."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from fleet_device.client.agent import Generation
from fleet_device.client.request import GenerateRequest, Piece, RequestContext, TokenText
from fleet_device.drafters.contract import Drafter, TextCodec
from fleet_device.errors import PromptTooLong
from fleet_device.session.text import CommittedTokens, TokenOrigin
from schemas.logprobs import TokenLogprobs
from schemas.reasons import EndReason

_SHOWN: Final = 80
"""Characters of a text in its representation."""


class TextGenerator(Protocol):
    """What is needed of the agent."""

    def generate(self, request: GenerateRequest, context: RequestContext) -> Generation: ...


@dataclass(frozen=True, slots=True, repr=False)
class GeneratedText:
    """What was written.

    Attributes:
        request: What was asked for.
        text: Without the stop string that ended it.
        stopped: Whether a stop string ended it.
        generation: The session behind it.
        origins: Where each of its tokens comes from.
        logprobs: The large model's log-probabilities of each of its tokens, before any shaping, and of the likeliest
            ones at its place; None if they were not asked for.
    """

    request: GenerateRequest
    text: str
    stopped: bool
    generation: Generation
    origins: tuple[TokenOrigin, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[: _SHOWN - 1]}…"
        return (
            f"<GeneratedText {text!r}: {len(self.tokens)} tokens, reason {self.reason.value!r}, "
            f"session {self.session!r}{'' if self.verified else f', {self.unverified} tokens unverified'}>"
        )

    @property
    def reason(self) -> EndReason:
        """How it ended, as the application sees it."""
        return EndReason.STOP if self.stopped else self.generation.reason

    @property
    def tokens(self) -> tuple[int, ...]:
        """The text's token ids, those of a stop string included."""
        return self.generation.tokens

    @property
    def unverified(self) -> int:
        """Tokens at the end of the text that do not follow the large model's law: no edge answered when they came."""
        return self.generation.unverified

    @property
    def verified(self) -> bool:
        """Whether all of the text follows the large model's law."""
        return not self.unverified

    @property
    def session(self) -> str:
        """The session's id, as the session log has it: 16 hexadecimal characters."""
        return self.generation.session.hex()

    @property
    def seed(self) -> int:
        """The seed: in mode `coupled` it gives the same text again."""
        return self.request.policy.seed

    @property
    def acceptance(self) -> float | None:
        """Share of the tested draft tokens that the large model accepted; None if none was tested."""
        return self.generation.counters.acceptance

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second from asking the edge to the end; 0 of a text that took no time."""
        return len(self.tokens) / (self.generation.wall_ms / 1e3) if self.generation.wall_ms else 0.0


def fit_prompt(request: GenerateRequest, context: int) -> GenerateRequest:
    """Return a request whose prompt leaves room for text in a context: as it is, or made shorter if that was asked for.

    Room is left for the tokens that are asked for, at most half of the context.

    Raises:
        PromptTooLong: There is no room for the prompt, and it is not to be made shorter, or cannot be.
    """
    prompt = request.prompt
    if request.shorten is not None:
        most = context - min(max(1, request.max_new_tokens), context // 2)
        if len(prompt) <= most:
            return request
        shorter = request.shorten(max(1, most))
        if shorter is not None and 0 < len(shorter) < context:
            return replace(request, prompt=tuple(shorter))
    if len(prompt) < context:
        return request
    how = "Shorten it, or raise the setting 'context'"
    if request.shorten is None:
        how += ", or have it cut by the setting 'truncate'"
    raise PromptTooLong(f"The prompt has {len(prompt)} tokens; the draft model holds {context} with the text. {how}.")


def generate_text(
    agent: TextGenerator, drafter: Drafter, request: GenerateRequest, context: RequestContext | None = None
) -> GeneratedText:
    """Run a request and return its text. It ends early where the draft model's context is full.

    Args:
        agent: Runs the session.
        drafter: The agent's draft model.
        request: What to write.
        context: Receives pieces, and may cancel the request.

    Raises:
        PromptTooLong: The draft model has no room for the prompt.
        DeviceError, DrafterError: See `Agent.generate`.
    """
    context = context or RequestContext()
    request = fit_prompt(request, drafter.context)
    room = drafter.context - len(request.prompt)
    text = _GrowingText(drafter.codec, request.stop)

    def on_tokens(tokens: CommittedTokens) -> bool:
        context.on_piece(text.feed(tokens))
        return text.stops.found

    generation = agent.generate(
        replace(request, max_new_tokens=min(request.max_new_tokens, room)),
        replace(context, on_tokens=on_tokens, on_void=text.cut),
    )
    if rest := text.finish():
        context.on_piece(Piece(rest, 0, verified=text.verified))
    logprobs = None if request.logprobs is None else tuple(text.logprobs)
    return GeneratedText(request, "".join(text.pieces), text.stops.found, generation, tuple(text.origins), logprobs)


class Detokenizer:
    """Decodes a growing text.

    Bytes that cannot become valid UTF-8 any more come out as U+FFFD, so that the text always goes on. The bytes of a
    character that is not complete yet are kept for the tokens to come; where none come, the text ends before it.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Iterable[int]) -> str:
        """Return the text that these tokens complete."""
        return self._decoder.decode(b"".join(map(self._codec.piece, tokens)))


class StopStrings:
    """Watches a growing text.

    Args:
        stops: Strings to end before; none of them empty.

    Attributes:
        found: Whether one has occurred; what comes after is swallowed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that can be given out: what might be the beginning of a stop string waits."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        keep = len(text) - held
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Return what was held back, at the end of a text in which it became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class _GrowingText:
    """A text as it grows, with what is needed to take back its end."""

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self._codec, self._stop = codec, stop
        self._tokens: list[int] = []
        self.origins: list[TokenOrigin] = []
        self.logprobs: list[TokenLogprobs] = []
        self._begin()

    def feed(self, tokens: CommittedTokens) -> Piece:
        """Add tokens; return what can be given out now."""
        parts = tuple(
            TokenText(token, origin, self.stops.feed(self._stream.feed((token,))), told)
            for token, origin, told in zip(
                tokens.ids, tokens.origins, tokens.logprobs or (None,) * len(tokens.ids), strict=True
            )
        )
        self._tokens += tokens.ids
        self.origins += tokens.origins
        self.logprobs += tokens.logprobs
        piece = Piece("".join(part.text for part in parts), len(parts), parts, verified=self.verified)
        self.pieces.append(piece.text)
        return piece

    @property
    def verified(self) -> bool:
        """Whether the text follows the large model's law as far as it has grown."""
        return not self.origins or self.origins[-1] is not TokenOrigin.UNVERIFIED

    def cut(self, length: int) -> None:
        """Keep no more than so many tokens."""
        kept = CommittedTokens(
            tuple(self._tokens[:length]), tuple(self.origins[:length]), tuple(self.logprobs[:length])
        )
        self._tokens, self.origins, self.logprobs = [], [], []
        self._begin()
        self.feed(kept)

    def finish(self) -> str:
        """Return what was held back because it might have become a stop string."""
        self.pieces.append(self.stops.finish())
        return self.pieces[-1]

    def _begin(self) -> None:
        self._stream, self.stops = Detokenizer(self._codec), StopStrings(self._stop)
        self.pieces: list[str] = []

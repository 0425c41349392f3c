"""A request for a generation: what to write, who follows it, and what ends it early."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fleet_device.offline import Outages
from fleet_device.session.text import CommittedTokens, TokenOrigin
from schemas.logprobs import TokenLogprobs
from schemas.policy import SamplingPolicy

Shorten = Callable[[int], Sequence[int] | None]
"""Returns a prompt of at most this many tokens (at least 1); None if it cannot be made that short."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What to write.

    Attributes:
        prompt: Token ids.
        policy: Sampling, with the seed.
        max_new_tokens: Most tokens to write.
        stop: Strings before which the generation ends.
        shorten: Makes the prompt shorter if the context cannot hold it; None if the request is refused then.
        logprobs: Asks for the large model's log-probabilities of all tokens, and of this many of the likeliest at each
            place.
        outages: What happens when no edge answers.
        app: Application that the request is for, for the session log.
    """

    prompt: tuple[int, ...]
    policy: SamplingPolicy
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    shorten: Shorten | None = field(default=None, compare=False, repr=False)
    logprobs: int | None = None
    outages: Outages = field(default_factory=Outages)
    app: str | None = None


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of a text.

    Attributes:
        token: Its id.
        origin: Where it comes from.
        text: What it adds to the text. Empty if it ends inside a character, or in what may become a stop string: the
            token that decides on that adds the rest.
        logprobs: The large model's log-probabilities at its place, if they were asked for.
    """

    token: int
    origin: TokenOrigin
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """More text.

    Attributes:
        text: Empty if the tokens complete no text that can be given out yet.
        tokens: How many are behind it.
        parts: These tokens. None where what was held back is given out at the end of a text.
        verified: Whether all of it follows the large model's law.
    """

    text: str
    tokens: int
    parts: tuple[TokenText, ...] = field(default=(), compare=False)
    verified: bool = True


class Cancellation:
    """Ends a text early. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._wake: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        """Whether the text is to end."""
        return self._requested.is_set()

    def cancel(self) -> None:
        """End the text, now or as soon as it begins. Idempotent."""
        self._requested.set()
        wake = self._wake
        if wake is not None:
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` when the text is cancelled meanwhile, and at once if it is cancelled already."""
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
        on_piece: Receives the generation as it grows.
        on_tokens: Receives committed tokens; returns True to end the generation, at a stop string for example.
        on_void: Receives the number of tokens that remain when an edge replaces what follows them.
        on_wait: Receives a sentence that says why no tokens come, once for each long wait.
        on_turn: Receives how long the request waited for the draft model (seconds), once, before anything else.
        cancellation: Ends the request early.
    """

    on_piece: Callable[[Piece], None] = lambda _piece: None
    on_tokens: Callable[[CommittedTokens], bool | None] = lambda _tokens: None
    on_void: Callable[[int], None] = lambda _length: None
    on_wait: Callable[[str], None] = lambda _reason: None
    on_turn: Callable[[float], None] = lambda _waited_s: None
    cancellation: Cancellation = field(default_factory=Cancellation)

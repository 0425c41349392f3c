"""Text of a session: what is asked for, what is committed, and where its tokens come from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import overload

from fleet_device.errors import ProtocolViolation, SessionRefused
from schemas.bounds import MAX_LABEL, MAX_TOKENS
from schemas.digest import EMPTY, extend_digest
from schemas.logprobs import TokenLogprobs
from schemas.messages import Open
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason, Finish, RefusalCode
from schemas.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What the device asks for.

    Raises:
        SessionRefused: No Open could carry it.

    Attributes:
        session: 8 random bytes.
        prompt: Token ids.
        policy: Sampling.
        max_new_tokens: Most tokens to write.
        vocabulary: The draft model's.
        draft_model: Its name.
        quantization: Of its weights.
        logprobs: Asks for the target's log-probabilities of all tokens, and of so many of the likeliest at each place.
        app: Application that the text is for, for the session log.
    """

    session: bytes
    prompt: tuple[int, ...]
    policy: SamplingPolicy
    max_new_tokens: int
    vocabulary: Vocabulary
    draft_model: str
    quantization: str
    logprobs: int | None = None
    app: str | None = None

    def __post_init__(self) -> None:
        if len(self.prompt) > MAX_TOKENS:
            raise SessionRefused(
                RefusalCode.PROMPT_TOO_LONG,
                f"The prompt has {len(self.prompt)} tokens; no edge takes more than {MAX_TOKENS}. Shorten it.",
            )
        if not 0 <= self.max_new_tokens <= MAX_TOKENS:
            raise SessionRefused(
                RefusalCode.MAX_NEW_TOKENS,
                f"max_new_tokens is {self.max_new_tokens}; ask for 1 to {MAX_TOKENS} tokens.",
            )

    def open(self, *, attempt: int, text: Sequence[int]) -> Open:
        """Return the Open that asks for it.

        Args:
            attempt: Number of the Open, from 0.
            text: All that is committed so far; the first Open does not tell it.
        """
        return Open(
            session=self.session,
            attempt=attempt,
            vocabulary=self.vocabulary,
            draft_model=self.draft_model[:MAX_LABEL],
            quantization=self.quantization[:MAX_LABEL],
            policy=self.policy,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            resume=tuple(text) if attempt or text else None,
            logprobs=self.logprobs,
            app=self.app,
        )


class TokenOrigin(StrEnum):
    """How a token came into the text. All but `UNVERIFIED` follow the large model's distribution.

    Attributes:
        DRAFTED: The draft model proposed it, and the edge accepted it.
        CORRECTED: It took the place of a draft token that the edge rejected.
        BONUS: The edge drew it behind a draft that it accepted whole.
        STREAMED: The edge wrote it by itself.
        FORCED: A grammar allowed no other.
        UNVERIFIED: The draft model wrote it alone, no edge being there; or it stands behind such a token.
    """

    DRAFTED = "drafted"
    CORRECTED = "corrected"
    BONUS = "bonus"
    STREAMED = "streamed"
    FORCED = "forced"
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True)
class CommittedTokens(Sequence[int]):
    """Token ids that have become part of a text, in order; a sequence of them.

    Attributes:
        ids: The token ids.
        origins: Of each of them.
        logprobs: Of each of them, where they were asked for.
    """

    ids: tuple[int, ...]
    origins: tuple[TokenOrigin, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.origins):
            raise ValueError(f"{len(self.ids)} tokens have {len(self.origins)} origins")

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[int, ...]: ...

    def __getitem__(self, place: int | slice) -> int | tuple[int, ...]:
        return self.ids[place]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TextBounds:
    """Bounds of a text, as the edge that had it last has named them.

    Attributes:
        tokens: Most tokens of it.
        end_tokens: Ids that end it; None as long as nobody has named them.
    """

    tokens: int
    end_tokens: Collection[int] | None = None

    def without_edge(self, own: Collection[int]) -> "TextBounds":
        """Return the bounds of a text that goes on without an edge.

        Args:
            own: Ids after which the draft model's own text ends; they count if no edge has named any.
        """
        return self if self.end_tokens is not None else TextBounds(self.tokens, own)

    def ends_with(self, token: int) -> bool:
        """Whether the token ends the text."""
        return self.end_tokens is not None and token in self.end_tokens


@dataclass(slots=True)
class Text:
    """The committed text; the drafts behind it are the session's.

    Attributes:
        vocabulary: Number of tokens that there are.
        bounds: Where it ends, as far as anybody has named that.
        tokens: All that is committed.
        digest: Of `tokens`.
        verified: Tokens that follow the target's law, if the draft model has written on alone: what stands behind them
            does not, even where an edge has verified it since. None while all of the text does.
    """

    vocabulary: int
    bounds: TextBounds
    tokens: list[int] = field(default_factory=list)
    digest: int = EMPTY
    verified: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def unverified(self) -> int:
        """Tokens at the end of the text that do not follow the target's law."""
        return 0 if self.verified is None else len(self.tokens) - self.verified

    def commit(self, tokens: Sequence[int]) -> None:
        """Add what an edge has verified or written.

        Raises:
            ProtocolViolation: No edge may have sent that; the text is as it was.
        """
        if any(token >= self.vocabulary for token in tokens):
            raise ProtocolViolation("The edge sent a token outside the vocabulary.")
        most = self.bounds.tokens
        if len(self.tokens) + len(tokens) > most:
            raise ProtocolViolation(f"The edge goes on behind the {most} tokens that it has granted.")
        self.tokens.extend(tokens)
        self.digest = extend_digest(self.digest, tokens)

    def commit_unverified(self, token: int) -> None:
        """Add what the draft model has written alone."""
        if self.verified is None:
            self.verified = len(self.tokens)
        self.commit((token,))

    def revise(self, position: int) -> None:
        """Void what no edge has verified: an edge goes on from `position`."""
        del self.tokens[position:]
        self.digest = extend_digest(EMPTY, self.tokens)
        self.verified = None

    def digest_with(self, tokens: Sequence[int]) -> int:
        """Return the digest of the text with some tokens behind it."""
        return extend_digest(self.digest, tokens)

    def go_on_alone(self, end_tokens: Collection[int]) -> None:
        """Take the draft model's own end tokens, if no edge has named any."""
        self.bounds = self.bounds.without_edge(end_tokens)

    def end(self, finish: Finish) -> EndReason | None:
        """Return how the text has ended: as the edge says, or as its own last token or its length does; else None."""
        if finish is Finish.STOP or (self.tokens and self.bounds.ends_with(self.tokens[-1])):
            return EndReason.STOP
        return EndReason.LENGTH if finish is Finish.LENGTH or len(self.tokens) >= self.bounds.tokens else None

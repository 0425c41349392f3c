"""Drafter contract: what a session needs of a draft model, and of its vocabulary's text side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dssd.distribution import Dist, Ids
from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.errors import FleetError
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


class DrafterError(FleetError):
    """The draft model cannot be loaded or cannot go on. Its text is one sentence for the user."""


class ModelNotFound(DrafterError):  # noqa: N818 - reads as what it says
    """The configuration names a model that is not there. Its text says what to do."""


class TextCodec(Protocol):
    """A vocabulary's text side."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids after which the draft model's own text ends. The edge's list rules while an edge is there."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that turns messages into a prompt, if the model has one."""

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Strings that `encode` with `special` reads as control tokens; no user's text may be read so."""

    def special_text(self, name: str) -> str:
        """Return the text of the `bos` or `eos` token, empty if there is none; chat templates want it."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any.
            special: False for plain text: nothing in it is taken for a control token, and the model's own
                beginning-of-text token is put before it, where it has one. True for a rendered chat template:
                control tokens are recognised and none is added.
        """

    def piece(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, maybe half a character; nothing for control tokens."""


@runtime_checkable
class KnowsTokens(Protocol):
    """A `TextCodec` that says what its tokens read, so that texts may have grammars."""

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the vocabulary as grammars need it. Takes a second.

        Raises:
            GrammarUnavailable: A library is missing.
        """


class Drafter(Protocol):
    """A draft model with one sequence.

    The sequence's tokens are prompt and text; `next` looks at all of them, and at nothing else: however the
    sequence came about, the same tokens MUST give the same distribution, up to the rounding of the model's
    arithmetic. (Exactness needs no more: what is reported is the distribution that was really drawn from.)
    """

    @property
    def name(self) -> str:
        """The model's name, for the log."""

    @property
    def quantization(self) -> str:
        """Of its weights, for the log."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Size and fingerprint, padding rows left out."""

    @property
    def context(self) -> int: ...

    @property
    def codec(self) -> TextCodec:
        """Between text and the vocabulary's token ids."""

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence; a prefix in common with the old one may be kept.

        Raises:
            DrafterError: A token is outside the vocabulary; the sequence is as before.
        """

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; they need not be computed before `next`.

        Raises:
            DrafterError: A token is outside the vocabulary; the sequence is as before.
        """

    def next(self, policy: SamplingPolicy) -> Dist | None:
        """Return the shaped distribution of the token after the sequence.

        Returns:
            None for "no idea": the draft ends here. This is allowed because it is decided before a token is
            drawn. A draft that ended because of the token drawn at its end would no longer follow the law.

        Raises:
            DrafterError: The sequence is empty, the context is full, or the model failed.
        """

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on; a sequence that is shorter stays as it is."""

    def close(self) -> None:
        """Free the model. May be called again."""


@runtime_checkable
class DraftsConstrained(Protocol):
    """A `Drafter` that shapes only what is allowed. One that does not is asked for all, and what it says is cut."""

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist | None:
        """Return what `next` does, with all other tokens impossible before anything is shaped.

        Args:
            policy: The session's.
            allowed: int64 ids, rising; at least one.
        """


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def require_tokens(tokens: Sequence[int], vocabulary: Vocabulary) -> None:
    """Check that all ids are in the vocabulary.

    Raises:
        DrafterError: One is not.
    """
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary.size):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary.size)
        raise DrafterError(f"Token {wrong} is outside the draft model's vocabulary of {vocabulary.size} tokens.")


@runtime_checkable
class SeveralSequences(Protocol):
    """What a `Drafter` has beside the contract if it can write several texts at once.

    Each sequence is a drafter by itself, that one thread at a time uses; different threads may use different ones.
    """

    def another(self) -> Drafter | None:
        """Return a further sequence, closed with this drafter; None if there is no room for one."""


@runtime_checkable
class _Remembers(Protocol):
    def known(self, tokens: Sequence[int]) -> int: ...


def sequences_of(drafter: Drafter, most: int) -> list[Drafter]:
    """Return a drafter and further sequences of it, at most so many together.

    Args:
        drafter: The first of them; one that cannot write several texts at once is the only one.
        most: At least 1.
    """
    found = [drafter]
    while len(found) < most and isinstance(drafter, SeveralSequences):
        another = drafter.another()
        if another is None:
            break
        found.append(another)
    return found


def known_tokens(drafter: Drafter, tokens: Sequence[int]) -> int:
    """Return with how many of these tokens the drafter's present sequence begins; 0 if it does not say."""
    return drafter.known(tokens) if isinstance(drafter, _Remembers) else 0


@dataclass(frozen=True, slots=True)
class Prospect:
    """What the next tokens of a draft from earlier text are worth, were each the likeliest one.

    Attributes:
        stands: Of each, the chance that it is accepted with all before it; falling.
        token_s: Time to find one (seconds).
        catch_up_s: Time that the draft model takes later to read a token that it has not drafted (seconds).
        alone: Whether there is no draft model that could draft in its place.
    """

    stands: tuple[float, ...]
    token_s: float
    catch_up_s: float
    alone: bool = False

    def acceptance(self, tokens: int) -> float:
        """Return the chance of each of the first tokens to be accepted after those before it, on geometric average."""
        return float(self.stands[tokens - 1] ** (1.0 / tokens))

"""Drafter contract: what a session needs of a draft model, and of its vocabulary's text side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from fleet_common.grammar.tokenizer import GrammarTokenizer
from sampling.distribution import Dist, Ids
from schemas.errors import FleetError
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


class DrafterError(FleetError):
    """The draft model cannot be loaded or failed; one sentence for the user."""


class ModelNotFound(DrafterError):  # noqa: N818 - reads as what it says
    """The configuration names a model that does not exist; the message says what to do."""


class TextCodec(Protocol):
    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a generation without an edge; otherwise the edge's own list counts."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that turns messages into a prompt, if the model has one."""

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Strings that `encode` with `special` reads as control tokens; no user's text may be read so."""

    def special_text(self, name: str) -> str:
        """Return the text of the `bos` or `eos` token for chat templates; empty if there is none."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text.

        In plain text (`special` False) nothing is read as a control token, and the model's beginning-of-text token is
        put before it, where it has one. In a rendered chat template (True) control tokens are recognised, and none is
        added.
        """

    def piece(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, maybe part of a character; empty for control tokens."""


@runtime_checkable
class _ReadsOtherTemplates(Protocol):
    def control_texts_with(self, template: str) -> tuple[str, ...]: ...


def control_texts_with(codec: TextCodec, template: str) -> tuple[str, ...]:
    """Return the control tokens of a codec's vocabulary in chats of another template, as `control_texts` has them."""
    return codec.control_texts_with(template) if isinstance(codec, _ReadsOtherTemplates) else codec.control_texts


@runtime_checkable
class GrammarCodec(Protocol):
    """A `TextCodec` that returns all tokens, so that requests may have grammars."""

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the vocabulary for grammars, which takes a second; raise GrammarUnavailable without a library."""


class Drafter(Protocol):
    """A draft model with one sequence.

    The sequence is the prompt and what follows it. `next` depends on its tokens and on nothing else: the same tokens
    MUST give the same distribution, up to the rounding of the model's arithmetic. (Exactness needs no more: what is
    reported is the distribution that was really drawn from.)
    """

    @property
    def name(self) -> str: ...

    @property
    def quantization(self) -> str: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def context(self) -> int: ...

    @property
    def codec(self) -> TextCodec: ...

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence, reusing a common prefix; raise DrafterError, unchanged, for an unknown token."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens, computed by `next` at the latest; raise DrafterError, unchanged, for an unknown one."""

    def next(self, policy: SamplingPolicy) -> Dist | None:
        """Return the shaped distribution of the token after the sequence; None ends the draft here.

        None is allowed because it is decided before a token is drawn. A draft that ended because of the token drawn at
        its end would bias the output. Raise DrafterError if the sequence is empty, the context is full, or the model
        failed.
        """

    def truncate(self, length: int) -> None:
        """Remove all tokens from `length` on; a shorter sequence is unchanged."""

    def close(self) -> None:
        """Free the model. Idempotent."""


@runtime_checkable
class DraftsConstrained(Protocol):
    """A `Drafter` that shapes only allowed tokens; the distribution of any other is restricted afterwards."""

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist | None:
        """As `next`, with all but the `allowed` ids (int64, rising, at least one) impossible before shaping."""


def restrict(dist: Dist, allowed: Ids) -> Dist | None:
    """Return a distribution restricted to some ids (int64, rising), or None if it has none of them."""
    kept = np.isin(dist.ids, allowed)
    probs = dist.probs[kept]
    return Dist(dist.ids[kept], (probs / probs.sum()).astype(np.float32).astype(np.float64)) if kept.any() else None


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def require_tokens(tokens: Sequence[int], vocabulary: Vocabulary) -> None:
    """Raise DrafterError unless all ids are in the vocabulary."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary.size):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary.size)
        raise DrafterError(f"Token {wrong} is outside the draft model's vocabulary of {vocabulary.size} tokens.")


@runtime_checkable
class SeveralSequences(Protocol):
    """A `Drafter` for several requests at once; different threads may use different sequences."""

    def another(self) -> Drafter | None:
        """Return a further sequence, closed with this drafter; None if there is no room for one."""


@runtime_checkable
class _Remembers(Protocol):
    def known(self, tokens: Sequence[int]) -> int: ...


def sequences_of(drafter: Drafter, most: int) -> list[Drafter]:
    """Return a drafter and further sequences of it, at most `most` (at least 1) together."""
    found = [drafter]
    while len(found) < most and isinstance(drafter, SeveralSequences):
        another = drafter.another()
        if another is None:
            break
        found.append(another)
    return found


def known_tokens(drafter: Drafter, tokens: Sequence[int]) -> int:
    """Return how many of these tokens the drafter's sequence begins with; 0 if it does not say."""
    return drafter.known(tokens) if isinstance(drafter, _Remembers) else 0


@dataclass(frozen=True, slots=True)
class Prospect:
    """Expectation of a draft from earlier tokens, if each token is the likeliest one.

    Attributes:
        chances: For each token, the probability that it is accepted with all before it; falling.
        token_s: Time to find one (seconds).
        catch_up_s: Time that the draft model takes later to read a token that it has not drafted (seconds).
        alone: Whether there is no draft model that could draft instead.
    """

    chances: tuple[float, ...]
    token_s: float
    catch_up_s: float
    alone: bool = False

    def acceptance(self, tokens: int) -> float:
        return float(self.chances[tokens - 1] ** (1.0 / tokens))

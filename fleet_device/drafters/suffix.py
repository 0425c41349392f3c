"""Suffix drafter: drafts what followed the same tokens before, in this device's history and in the present sequence.

Devices repeat themselves: reports, alarms, forms. (SuffixDecoding, arXiv 2411.04975; prompt lookup, Saxena, 2023, is
its special case without a history.) It may be combined with a draft model. Then the pacing chooses the source of each
draft: suffix tokens cost no time of the model, which only has to read them before it drafts again.

The draft's length may depend on what was drawn so far. What is looked up depends only on the tokens of the sequence and
of earlier ones, and how far it is trusted on committed tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from fleet_device.drafters.contract import (
    Drafter,
    DrafterError,
    Prospect,
    TextCodec,
    common_prefix,
    require_tokens,
    restrict,
)
from fleet_device.drafters.model_file import GgufModel, locate_model
from fleet_device.drafters.suffix_index import LONGEST, History, Match, SuffixIndex
from fleet_device.settings import DeviceSettings
from sampling.distribution import Dist, Ids, point_mass
from schemas.fields import MAX_TOKENS
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

_ALIKE: Final = (4, 8, 16)
_AGREED: Final = (0.5, 0.8, 0.999)
_PLACES: Final = (2, 5)
"""Bounds of the classes: matching tokens, share of the likeliest follower, and number of places."""

_ALIKE_SHARE: Final = (0.2, 0.5, 0.75, 0.85)
"""First trust in a speculation by its number of matching tokens, if all places agree."""

_PRIOR_COUNT: Final = 4.0
_REMEMBERED: Final = 64
"""Number of speculations of a class that are remembered, roughly."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """Possible next tokens, by falling probability, ties by rising id; `kind` is their class for `Trust`."""

    tokens: Sequence[int]
    probs: Sequence[float]
    kind: int

    @property
    def likeliest(self) -> int:
        return self.tokens[0]

    @property
    def dist(self) -> Dist:
        if len(self.tokens) == 1:
            return point_mass(self.tokens[0])
        rounded = np.array(self.probs, dtype=np.float32).astype(np.float64)
        return Dist(np.array(self.tokens, dtype=np.int64), rounded)

    def probability(self, token: int) -> float:
        return self.probs[self.tokens.index(token)] if token in self.tokens else 0.0


def speculate(matches: Sequence[Match], policy: SamplingPolicy) -> Speculation:
    """Return the speculation that follows from at least one match; a certain token if the policy is greedy."""
    most = max(max(match.alike) for match in matches)
    sums: dict[int, float] = {}
    places = 0
    for match in matches:
        for token, alike in zip(match.followers, match.alike, strict=True):
            sums[token] = sums.get(token, 0.0) + 2.0 ** (alike - most)
            places += alike == most
    tokens = sorted(sums, key=lambda token: (-sums[token], token))
    total = sum(sums.values())
    kind = _kind(most, sums[tokens[0]] / total, places)
    if policy.greedy:
        return Speculation(tokens[:1], (1.0,), kind)
    return Speculation(tokens, [sums[token] / total for token in tokens], kind)


def _place(bounds: Sequence[float], value: float) -> int:
    return sum(value >= bound for bound in bounds)


def _kind(alike: int, agreed: float, places: int) -> int:
    row = _place(_ALIKE, alike) * (len(_AGREED) + 1) + _place(_AGREED, agreed)
    return row * (len(_PLACES) + 1) + _place(_PLACES, places)


def _first_trust() -> list[float]:
    shares = (0.3, 0.55, 0.8, 1.0)
    return [first * share for first in _ALIKE_SHARE for share in shares for _ in range(len(_PLACES) + 1)]


@dataclass(slots=True)
class Trust:
    """Acceptance of each class of speculations, counted on every committed token, whatever has drafted it.

    Only committed tokens count, which both ends know.
    """

    _right: list[float] = field(default_factory=lambda: [_PRIOR_COUNT * trust for trust in _first_trust()])
    _made: list[float] = field(default_factory=lambda: [_PRIOR_COUNT] * len(_first_trust()))

    def of(self, speculation: Speculation) -> float:
        """Return the probability that a token drawn from a speculation is accepted, if those before it are."""
        return self._right[speculation.kind] / self._made[speculation.kind]

    def learn(self, speculation: Speculation, token: int) -> None:
        kept = 1.0 - 1.0 / _REMEMBERED
        self._made[speculation.kind] = kept * self._made[speculation.kind] + 1.0
        self._right[speculation.kind] = kept * self._right[speculation.kind] + speculation.probability(token)


_HARDLY: Final = 0.2
"""Probability of acceptance at which a prospect ends."""

_FIRST: Final = 0.4
"""Smallest probability of acceptance of a prospect's first token: in output that does not repeat, less sure
speculations are mostly wrong, and a rejected draft costs more than its time."""

_LONGEST_PROSPECT: Final = 16

_HORIZON: Final = 16.0
"""Number of times that are remembered, roughly."""

_COUNTS: Final = SamplingPolicy(temperature=1.0, seed=0)
"""Policy of the speculations that are judged: all followers, not only the likeliest."""

_CAUGHT_UP: Final = 2
"""Tokens that the draft model may have to read although it has drafted all along: its last one, and the edge's."""

_MAX_MEASURED: Final = 64
"""Latest tokens by which speculations or reading times are judged: if there are more, most are a prompt's."""

_CATCH_UP_SHARE: Final = 0.6
"""Time to read a token with others, relative to the time to draft one, before it was measured."""


class SuffixDrafter:
    """A `Drafter` from earlier tokens, with or without a draft model. Not for use from several threads at once.

    Args:
        context: Most tokens in the sequence, if there is no model.
        history: What the device has generated; None for only the present sequence. Sequences may share it.

    Attributes:
        repeats: Whether the next token is drafted from earlier tokens.
    """

    def __init__(
        self,
        model: Drafter | None,
        *,
        vocabulary: Vocabulary,
        codec: TextCodec,
        context: int,
        history: History | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.repeats = model is None
        self._owns = True
        self.vocabulary = vocabulary
        self.codec = codec
        self.context = context if model is None else model.context
        self.name = "suffix" if model is None else model.name
        self.quantization = "none" if model is None else model.quantization
        self._history = history
        self._trust = Trust()
        self._clock = clock
        self._tokens: list[int] = []
        self._index = SuffixIndex()
        self._final = 0  # number of final tokens, from which the trust has learned
        self._accepted, self._least = 1.0, 0.0  # of the suffix draft that is being made
        self._read = 0  # tokens that the model has read
        self._skipped = 0  # tokens that were drafted in its place since then
        self._token_s, self._catch_up_s, self._caught_up_s = 0.0, 0.0, 0.0
        self._found_s = 0.0  # to find a token

    @classmethod
    def before(cls, model: Drafter, history: History | None) -> "SuffixDrafter":
        return cls(model, vocabulary=model.vocabulary, codec=model.codec, context=model.context, history=history)

    def another(self) -> "SuffixDrafter | None":
        """Return a further sequence over the same history; None where the model has no room for one."""
        further = getattr(self.model, "another", lambda: None)()
        if further is None and self.model is not None:
            return None
        another = SuffixDrafter(
            further,
            vocabulary=self.vocabulary,
            codec=self.codec,
            context=self.context,
            history=self._history,
            clock=self._clock,
        )
        another._owns = False
        return another

    def known(self, tokens: Sequence[int]) -> int:
        known = getattr(self.model, "known", None)
        return int(known(tokens)) if callable(known) else common_prefix(self._tokens, tokens)

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence; the model drafts until `take` chooses earlier tokens."""
        require_tokens(tokens, self.vocabulary)
        self.begin_draft(repeats=False)
        if self.model is not None:
            self.model.reset(tokens)
        common = common_prefix(self._tokens, tokens)
        self._read = min(self._read, common)
        other = common < self._final or not self._final
        self._cut(common)
        self._append(tokens[common:])
        if other:  # another request, without output yet
            self._final = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        if self.model is not None:
            self.model.extend(tokens)
        if self.repeats:
            self._skipped += len(tokens)
        self._append(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:
        """Return the distribution of the chosen source; None if no earlier tokens match."""
        if self.repeats or self.model is None:
            return self._look_up(policy)
        return self._timed_proposal(partial(self.model.next, policy))

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist | None:
        """As `next`, restricted to the allowed ids (int64, rising)."""
        model = self.model
        if model is None or self.repeats or not hasattr(model, "next_allowed"):
            dist = self.next(policy)
            return None if dist is None else restrict(dist, allowed)
        return self._timed_proposal(partial(model.next_allowed, policy, allowed))

    def truncate(self, length: int) -> None:
        if self.model is not None:
            self.model.truncate(length)
        self._cut(length)

    def close(self) -> None:
        if self.model is not None:
            self.model.close()
        elif self._owns and callable(close := getattr(self.codec, "close", None)):
            close()

    # For the pacing

    def prospect(self, policy: SamplingPolicy) -> Prospect | None:
        """Estimate the acceptance of a draft from earlier tokens; None if nothing is found."""
        if not self._tokens:
            return None
        started = self._clock()
        end, accepted, chances = self._tokens[-LONGEST:], 1.0, list[float]()
        while len(chances) < _LONGEST_PROSPECT and (speculation := self._speculation(end, policy)) is not None:
            accepted *= self._trust.of(speculation)
            if accepted < (_HARDLY if chances else _FIRST):
                break
            chances.append(accepted)
            end.append(speculation.likeliest)
        if not chances:
            return None
        # It is found twice: for the prospect, and when it is drawn.
        self._found_s = _mean(self._found_s, 2.0 * (self._clock() - started) / len(chances))
        catch_up_s = self._catch_up_s or _CATCH_UP_SHARE * self._token_s
        return Prospect(tuple(chances), self._found_s, catch_up_s, alone=self.model is None)

    def begin_draft(self, *, repeats: bool, least: float = 0.0) -> None:
        """Begin a draft, from earlier tokens if `repeats` or if there is no model.

        The draft ends below the probability of acceptance `least`.
        """
        self.repeats = repeats or self.model is None
        self._accepted, self._least = 1.0, least

    def observe(self, length: int) -> None:
        """Learn how right the speculations were; the first `length` tokens of the sequence are final."""
        length = min(length, len(self._tokens))
        if length <= self._final:
            return
        self._index.truncate(self._final)
        begin = max(self._final, length - _MAX_MEASURED)
        self._index.append(self._tokens[self._final : begin])
        for place in range(begin, length):
            speculation = self._speculation(self._tokens[max(0, place - LONGEST) : place], _COUNTS)
            if speculation is not None:
                self._trust.learn(speculation, self._tokens[place])
            self._index.append(self._tokens[place : place + 1])
        self._index.append(self._tokens[length:])
        self._final = length

    def remember(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        if self._history is not None:
            self._history.remember(prompt, text)

    def caught_up_s(self) -> float:
        """Return how long the model has read tokens that it had not drafted, since the last call (seconds)."""
        seconds, self._caught_up_s = self._caught_up_s, 0.0
        return seconds

    # Private

    def _append(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        self._index.append(tokens)

    def _cut(self, length: int) -> None:
        length = max(length, 0)
        if length < len(self._tokens):
            del self._tokens[length:]
            self._index.truncate(length)
            self._read, self._final = min(self._read, length), min(self._final, length)

    def _speculation(self, end: Sequence[int], policy: SamplingPolicy) -> Speculation | None:
        found = [self._index.find(end)]
        if self._history is not None:
            found.append(self._history.find(end))
        matches = [match for match in found if match is not None]
        return speculate(matches, policy) if matches else None

    def _look_up(self, policy: SamplingPolicy) -> Dist | None:
        if not self._tokens:
            raise DrafterError("The suffix drafter needs at least one token: the sequence is empty.")
        if len(self._tokens) > self.context:
            raise DrafterError(f"The suffix drafter's context of {self.context} tokens is full; set a larger one.")
        speculation = self._speculation(self._tokens[-LONGEST:], policy)
        if speculation is None:
            return None
        self._accepted *= self._trust.of(speculation)
        return None if self._accepted < self._least else speculation.dist

    def _timed_proposal(self, model: Callable[[], Dist | None]) -> Dist | None:
        unread = len(self._tokens) - self._read
        started = self._clock()
        dist = model()
        took_s = self._clock() - started
        self._read = len(self._tokens)
        if unread <= _CAUGHT_UP:
            self._token_s, self._skipped = _mean(self._token_s, took_s / max(1, unread)), 0
            return dist
        late_s = max(0.0, took_s - self._token_s) if self._token_s else took_s * (unread - 1) / unread
        # The rest is the model's own: without suffix drafts it would have to read the edge's tokens too.
        self._caught_up_s += late_s * min(1.0, self._skipped / (unread - 1))
        self._skipped = 0
        if self._token_s and unread <= _MAX_MEASURED:
            self._catch_up_s = _mean(self._catch_up_s, late_s / (unread - 1))
        return dist


def _mean(mean: float, value: float) -> float:
    """Return the mean with forgetting; the first value is the mean."""
    return mean + (value - mean) / _HORIZON if mean else value


def load(settings: DeviceSettings) -> SuffixDrafter:
    """Load the vocabulary that the settings name; raise DrafterError."""
    model = GgufModel(locate_model(settings.model, folder=settings.models_dir).path, vocabulary_only=True)
    return SuffixDrafter(None, vocabulary=model.vocabulary, codec=model, context=MAX_TOKENS, history=History())


def with_suffix(model: Drafter) -> Drafter:
    """Combine a draft model with a suffix drafter, unless it is one or drafts nothing."""
    if isinstance(model, SuffixDrafter) or model.name == "none":
        return model
    return SuffixDrafter.before(model, History())

"""Drafter for a target with another vocabulary: drafts only tokens that both have, under the target's ids.

It wraps a drafter. What it shows is the target's vocabulary and text side, so that session and wire need to know of
nothing: q is restricted to the common tokens, renormalised and mapped before a token is drawn from it, and the law
holds for any q that is reported as it was drawn from.

The draft model reads the text so far in its own tokens. A token that both have is read as itself. Neighbours that only
the target has are read together, as the draft model's longest tokens that make up the same bytes. So what it reads
follows from the tokens alone, and a rollback undoes it exactly. Control tokens are read by their role: what begins a
text, begins a turn, ends a turn, ends a text. Others are not read.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from dssd.distribution import Dist
from fleet_device.drafters.common_tokens import NONE, CommonTokens, turn_begin
from fleet_device.drafters.contract import Drafter, DrafterError, TextCodec, common_prefix, require_tokens
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.several import SeveralSequences
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

__all__ = ["LEAST_OVERLAP", "UnlikeVocabularyDrafter", "wrap"]

_log = logging.getLogger(__name__)

LEAST_OVERLAP: Final = 0.2
"""Share of the smaller vocabulary below which a pair is refused: hardly a draft would survive the restriction."""

_STRETCH: Final = 16  # tokens that are read together at most, so that one more never costs much


class UnlikeVocabularyDrafter:
    """A `Drafter` over another that has another vocabulary.

    Args:
        inner: The draft model.
        vocabulary: The target's.
        codec: The target's text side.
        common: What the two vocabularies have in common, if that is known.

    Raises:
        DrafterError: The two vocabularies have too little in common.
    """

    def __init__(
        self, inner: Drafter, vocabulary: Vocabulary, codec: TextCodec, common: CommonTokens | None = None
    ) -> None:
        self._inner = inner
        self._owns = common is None
        self._vocabulary = vocabulary
        self._codec = codec
        self._common = common or CommonTokens(inner.codec, inner.vocabulary.size, codec, vocabulary.size)
        if self._common.overlap < LEAST_OVERLAP:
            raise DrafterError(
                f"The draft model {inner.name} has too little in common with the target's vocabulary: "
                f"{self._common.describe()}, and at least {LEAST_OVERLAP:.0%} must be; use a draft model of the "
                "target's family, or one nearer to it."
            )
        self._roles = self._read_roles()
        self._tokens: list[int] = []
        # Of each token: where its stretch begins, and how many draft tokens stand before that.
        self._stretches: list[tuple[int, int]] = []
        self._draft: list[int] = []
        self._given = 0  # of these, how many the draft model's sequence begins with
        self._begun = False  # a sequence that the draft model has not been told of

    def another(self) -> "UnlikeVocabularyDrafter | None":
        """Return a further sequence, if the draft model has one."""
        inner = self._inner.another() if isinstance(self._inner, SeveralSequences) else None
        if inner is None:
            return None
        return UnlikeVocabularyDrafter(inner, self._vocabulary, self._codec, self._common)

    def known(self, tokens: Sequence[int]) -> int:
        """Return with how many of these tokens the sequence begins."""
        return common_prefix(self._tokens, tokens)

    @property
    def name(self) -> str:
        """The draft model's."""
        return self._inner.name

    @property
    def quantization(self) -> str:
        """The draft model's."""
        return self._inner.quantization

    @property
    def vocabulary(self) -> Vocabulary:
        """The target's."""
        return self._vocabulary

    @property
    def context(self) -> int:
        """The draft model's; it may be full before, where the text takes more of its tokens than of the target's."""
        return self._inner.context

    @property
    def codec(self) -> TextCodec:
        """The target's."""
        return self._codec

    @property
    def common(self) -> CommonTokens:
        """What the two vocabularies have in common."""
        return self._common

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence; what the draft model has read of a common prefix is kept."""
        require_tokens(tokens, self._vocabulary)
        self.truncate(common_prefix(self._tokens, tokens))
        self._append(tokens[len(self._tokens) :])
        self._begun = True

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        require_tokens(tokens, self._vocabulary)
        self._append(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:
        """Return the draft model's distribution over common tokens, or None: no idea, or no room, or none in common."""
        if not self._tokens:
            raise DrafterError("The draft model has nothing to go on: the sequence is empty.")
        if len(self._tokens) > self.context:
            raise DrafterError(f"The draft model's context of {self.context} tokens is full; set a larger one.")
        if not 0 < len(self._draft) <= self.context:
            return None
        if self._begun:  # the draft model may have an earlier sequence to go on from
            self._inner.reset(self._draft)
        else:
            self._inner.truncate(self._given)
            self._inner.extend(self._draft[self._given :])
        self._given, self._begun = len(self._draft), False
        dist = self._inner.next(policy)
        return None if dist is None else self._common.restrict(dist)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        length = max(length, 0)
        if length >= len(self._tokens):
            return
        # The stretch that is cut through is read anew.
        first = self._stretches[length - 1][0] if length else 0
        rest = self._tokens[first:length]
        self._cut(first)
        self._append(rest)

    def close(self) -> None:
        """Free both files."""
        self._inner.close()
        if self._owns and isinstance(self._codec, GgufModel):
            self._codec.close()

    def draft_tokens(self) -> tuple[int, ...]:
        """Return the text so far as the draft model reads it."""
        return tuple(self._draft)

    def _cut(self, first: int) -> None:
        """Forget whole stretches, those from the token `first` on."""
        if first < len(self._tokens):
            del self._draft[self._stretches[first][1] :]
            del self._tokens[first:]
            del self._stretches[first:]
            self._given = min(self._given, len(self._draft))

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            image = self._image(token)
            begin = len(self._tokens)
            if image is None and begin and self._image(self._tokens[-1]) is None:
                before = self._stretches[-1][0]
                begin = before if begin - before < _STRETCH else begin
            start = self._stretches[begin][1] if begin < len(self._tokens) else len(self._draft)
            self._tokens.append(token)
            self._stretches.append((begin, start))
            if image is None:
                del self._draft[start:]
                self._given = min(self._given, start)
                image = self._spell(b"".join(map(self._codec.piece, self._tokens[begin:])))
            self._draft.extend(image)

    def _image(self, token: int) -> Sequence[int] | None:
        """Return what a token is read as by itself; None if it is read together with its neighbours."""
        role = self._roles.get(token)
        if role is not None:
            return role
        piece = self._codec.piece(token)
        found = self._common.draft_ids.get(piece)
        if found is not None:
            return (found,)
        return None if piece else ()

    def _spell(self, text: bytes) -> list[int]:
        """Return the draft model's longest tokens that make up some bytes; those that it has no token for drop out."""
        ids, place, found = self._common.draft_ids, 0, list[int]()
        while place < len(text):
            for length in range(min(self._common.longest, len(text) - place), 0, -1):
                token = ids.get(text[place : place + length])
                if token is not None:
                    found.append(token)
                    break
            place += length
        return found

    def _read_roles(self) -> Mapping[int, Sequence[int]]:
        """Return what the target's control tokens are read as."""
        roles: dict[int, Sequence[int]] = {theirs: (own,) for theirs, own in self._common.ends()}
        theirs, own = turn_begin(self._codec), turn_begin(self._inner.codec)
        if NONE not in (theirs, own):
            roles[theirs] = (own,)
        # What stands before a plain text by itself: the token that begins a text, where there is one.
        if begin := self._codec.encode(""):
            roles[begin[0]] = tuple(self._inner.codec.encode(""))
        return roles


def wrap(drafter: Drafter, settings: DeviceSettings) -> Drafter:
    """Make a drafter one for the target whose vocabulary the settings name, if it is not that already.

    Raises:
        DrafterError: The file cannot be used, or the vocabularies have too little in common; the drafter is closed.
    """
    if settings.target_vocabulary is None:
        return drafter
    target: GgufModel | None = None
    try:
        target = TargetVocabulary(settings.target_vocabulary.expanduser(), vocabulary_only=True)
        if target.vocabulary == drafter.vocabulary:
            target.close()
            return drafter
        wrapped = UnlikeVocabularyDrafter(drafter, target.vocabulary, target)
    except DrafterError:
        drafter.close()
        if target is not None:
            target.close()
        raise
    _log.info("The target has another vocabulary than %s: %s.", drafter.name, wrapped.common.describe())
    return wrapped


class TargetVocabulary(GgufModel):
    """The file of a target's vocabulary."""

    key = "target_vocabulary"

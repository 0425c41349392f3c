"""Drafter for a target with another vocabulary: drafts only tokens that both have, under the target's ids.

It wraps a drafter and has the target's vocabulary and text side, so that session and wire need no change: q is
restricted to the common tokens, renormalised and mapped before a token is drawn from it. The output is exact for any q
that is reported as it was drawn from.

The draft model reads the sequence in its own tokens. A common token is read as itself. Neighbouring tokens that only
the target has are read together, as the draft model's longest tokens with the same bytes. So what it reads depends on
the tokens alone, and a rollback undoes it exactly. Control tokens are read by their role: beginning of text, beginning
and end of a turn, end of text. Others are not read.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleet_device.drafters.contract import (
    Drafter,
    DrafterError,
    SeveralSequences,
    TextCodec,
    common_prefix,
    require_tokens,
)
from fleet_device.drafters.model_file import GgufModel
from fleet_device.settings import DeviceSettings
from sampling.distribution import Dist
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

NONE: Final = -1
"""Instead of an id where a token has no counterpart."""

_TURN_ENDS: Final = frozenset({"<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>"})


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """A vocabulary by the bytes of its tokens.

    Attributes:
        turn_end: The id that ends a turn of a chat, or the text where there are no chats; NONE if nothing does.
        text_end: The id that ends a text, if that is another; else NONE.
    """

    size: int
    ids: Mapping[bytes, int]
    turn_end: int
    text_end: int

    @classmethod
    def of(cls, codec: TextCodec, size: int) -> "_Tokens":
        ends = set(codec.end_tokens)
        same: dict[bytes, list[int]] = {}
        for token in range(size):
            if (piece := codec.piece(token)) and token not in ends:
                same.setdefault(piece, []).append(token)
        ids = {piece: _written(codec, piece, tokens) for piece, tokens in same.items()}
        last = turn_end(codec)
        others = [token for token in (*_ids(codec, codec.special_text("eos")), *codec.end_tokens) if token in ends]
        return cls(size, ids, last, next((token for token in others if token != last), NONE))


class CommonTokens:
    def __init__(self, draft: TextCodec, draft_size: int, target: TextCodec, target_size: int) -> None:
        self._draft = _Tokens.of(draft, draft_size)
        self.draft_ids = self._draft.ids
        others = _Tokens.of(target, target_size)  # not kept: it may take some ten megabytes
        self.to_target = np.full(draft_size, NONE, dtype=np.int64)
        for piece, token in self._draft.ids.items():
            self.to_target[token] = others.ids.get(piece, NONE)
        self.count = int((self.to_target != NONE).sum())
        self._target_count = len(others.ids)
        self.longest = max(map(len, self._draft.ids), default=0)
        for own, other in ((self._draft.turn_end, others.turn_end), (self._draft.text_end, others.text_end)):
            if own != NONE:
                self.to_target[own] = other

    @property
    def overlap(self) -> float:
        """Common share of the smaller vocabulary, without ends and control tokens."""
        return self.count / max(1, min(len(self._draft.ids), self._target_count))

    def ends(self) -> Iterable[tuple[int, int]]:
        for own in (self._draft.turn_end, self._draft.text_end):
            if own != NONE and self.to_target[own] != NONE:
                yield int(self.to_target[own]), own

    def restrict(self, dist: Dist) -> Dist | None:
        """Return a draft model's distribution over common tokens, under the target's ids; None if nothing is left.

        It is renormalised, to draw from and to report.
        """
        ids = self.to_target[dist.ids]
        kept = ids != NONE
        if not kept.any():
            return None
        ids, probs = ids[kept], dist.probs[kept]
        order = np.lexsort((ids, -probs))
        rounded = (probs[order] / probs.sum()).astype(np.float32).astype(np.float64)
        return Dist(ids[order], rounded)

    def describe(self) -> str:
        return (
            f"{self.count} of {len(self._draft.ids)} draft tokens and {self._target_count} target tokens are "
            f"common, {self.overlap:.0%} of the smaller vocabulary"
        )


def turn_end(codec: TextCodec) -> int:
    """Return the end token of a turn: the last one in the chat template, a common one, or the end of text.

    Files do not distinguish the two reliably.
    """
    ends, template = codec.end_tokens, codec.chat_template or ""
    texts = [text for text in codec.control_texts if text in template or text in _TURN_ENDS]
    turns = [(template.rfind(text), token) for text in texts for token in _ids(codec, text) if token in ends]
    if turns:
        return max(turns)[1]
    return next((token for token in (*_ids(codec, codec.special_text("eos")), *ends) if token in ends), NONE)


def turn_begin(codec: TextCodec) -> int:
    template = codec.chat_template or ""
    others = {*codec.end_tokens, *codec.encode("")}
    texts = [text for text in codec.control_texts if text in template]
    begins = [(template.find(text), token) for text in texts for token in _ids(codec, text) if token not in others]
    return min(begins)[1] if begins else NONE


def _ids(codec: TextCodec, text: str) -> Sequence[int]:
    ids = codec.encode(text, special=True) if text else []
    return ids if len(ids) == 1 else ()


def _written(codec: TextCodec, piece: bytes, tokens: Sequence[int]) -> int:
    """Return which of several tokens with the same bytes a tokenizer writes.

    In vocabularies with byte tokens, printable bytes occur twice: as a byte, for text that nothing else can express,
    and as a character.
    """
    if len(tokens) > 1:
        text = piece.decode("utf-8", "ignore")
        return next((token for token in codec.encode(text) if token in tokens), max(tokens))
    return tokens[0]


_log = logging.getLogger(__name__)

MIN_OVERLAP: Final = 0.2
"""Overlap below which a pair is refused: almost no draft would survive the restriction."""

_STRETCH: Final = 16  # most tokens that are read together, so that one more never costs much


class UnlikeVocabularyDrafter:
    """A `Drafter` over another that has another vocabulary; `vocabulary` and `codec` are the target's."""

    def __init__(
        self, inner: Drafter, vocabulary: Vocabulary, codec: TextCodec, common: CommonTokens | None = None
    ) -> None:
        self._inner = inner
        self.name, self.quantization = inner.name, inner.quantization
        # It may be full earlier, if the text has more of the draft model's tokens than of the target's.
        self.context = inner.context
        self._owns = common is None
        self.vocabulary = vocabulary
        self.codec = codec
        self.common = common or CommonTokens(inner.codec, inner.vocabulary.size, codec, vocabulary.size)
        if self.common.overlap < MIN_OVERLAP:
            raise DrafterError(
                f"The draft model {inner.name} has too little in common with the target's vocabulary: "
                f"{self.common.describe()}, and at least {MIN_OVERLAP:.0%} must be; use a draft model of the "
                "target's family, or one nearer to it."
            )
        self._roles = self._read_roles()
        self._tokens: list[int] = []
        # For each token: where its stretch begins, and the number of draft tokens before that.
        self._stretches: list[tuple[int, int]] = []
        self._draft: list[int] = []
        self._given = 0  # number of these that the draft model has
        self._begun = False  # the draft model has not begun this sequence

    def another(self) -> "UnlikeVocabularyDrafter | None":
        inner = self._inner.another() if isinstance(self._inner, SeveralSequences) else None
        if inner is None:
            return None
        return UnlikeVocabularyDrafter(inner, self.vocabulary, self.codec, self.common)

    def known(self, tokens: Sequence[int]) -> int:
        return common_prefix(self._tokens, tokens)

    def reset(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self.truncate(common_prefix(self._tokens, tokens))
        self._append(tokens[len(self._tokens) :])
        self._begun = True

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._append(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:
        """Return the draft model's distribution over common tokens; None for no proposal or no common token."""
        if not self._tokens:
            raise DrafterError("The draft model needs at least one token: the sequence is empty.")
        if len(self._tokens) > self.context:
            raise DrafterError(f"The draft model's context of {self.context} tokens is full; set a larger one.")
        if not 0 < len(self._draft) <= self.context:
            return None
        if self._begun:  # the draft model may continue an earlier sequence
            self._inner.reset(self._draft)
        else:
            self._inner.truncate(self._given)
            self._inner.extend(self._draft[self._given :])
        self._given, self._begun = len(self._draft), False
        dist = self._inner.next(policy.plain())  # biases and penalties name tokens of the other vocabulary
        return None if dist is None else self.common.restrict(dist)

    def truncate(self, length: int) -> None:
        length = max(length, 0)
        if length >= len(self._tokens):
            return
        # The stretch that is cut through is read again.
        first = self._stretches[length - 1][0] if length else 0
        rest = self._tokens[first:length]
        self._cut(first)
        self._append(rest)

    def close(self) -> None:
        self._inner.close()
        if self._owns and isinstance(self.codec, GgufModel):
            self.codec.close()

    def draft_tokens(self) -> tuple[int, ...]:
        return tuple(self._draft)

    def _cut(self, first: int) -> None:
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
                image = self._spell(b"".join(map(self.codec.piece, self._tokens[begin:])))
            self._draft.extend(image)

    def _image(self, token: int) -> Sequence[int] | None:
        """Return the draft model's tokens for a token; None if it is read together with its neighbours."""
        role = self._roles.get(token)
        if role is not None:
            return role
        piece = self.codec.piece(token)
        found = self.common.draft_ids.get(piece)
        if found is not None:
            return (found,)
        return None if piece else ()

    def _spell(self, text: bytes) -> list[int]:
        """Return the draft model's longest tokens that make up some bytes; bytes without a token are left out."""
        ids, place, found = self.common.draft_ids, 0, list[int]()
        while place < len(text):
            for length in range(min(self.common.longest, len(text) - place), 0, -1):
                token = ids.get(text[place : place + length])
                if token is not None:
                    found.append(token)
                    break
            place += length
        return found

    def _read_roles(self) -> Mapping[int, Sequence[int]]:
        roles: dict[int, Sequence[int]] = {theirs: (own,) for theirs, own in self.common.ends()}
        theirs, own = turn_begin(self.codec), turn_begin(self._inner.codec)
        if NONE not in (theirs, own):
            roles[theirs] = (own,)
        # The beginning-of-text token, where there is one.
        if begin := self.codec.encode(""):
            roles[begin[0]] = tuple(self._inner.codec.encode(""))
        return roles


def wrap(drafter: Drafter, settings: DeviceSettings) -> Drafter:
    """Wrap a drafter for the target whose vocabulary the settings name, if it has another one."""
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
    key = "target_vocabulary"

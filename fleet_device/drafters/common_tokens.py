"""Common tokens of two vocabularies, by the exact bytes that each token stands for, and the map between their ids.

Vocabularies spell the same bytes in different ways: as byte-level BPE, with U+2581 for a space, as single bytes. Only
the bytes are compared. Control tokens and unused ones stand for no bytes and have no counterpart, but for those that
end a text or a turn, which correspond by their role. (Timor et al., "Accelerating LLM Inference with Lossless
Speculative Decoding Algorithms for Heterogeneous Vocabularies", 2025, arXiv 2502.05202: token-level intersection.)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dssd.distribution import Dist, Ids
from fleet_device.drafters.contract import TextCodec

__all__ = ["NONE", "CommonTokens", "turn_begin", "turn_end"]

NONE: Final = -1
"""In place of an id where a token has no counterpart."""

_TURN_ENDS: Final = frozenset({"<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>"})


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """A vocabulary by the bytes of its tokens.

    Attributes:
        size: Number of tokens.
        ids: By their bytes, the tokens that a tokenizer writes; control tokens, unused ones and ends left out.
        turn_end: The id that ends a turn of a chat, or the text where there are no chats; NONE if nothing does.
        text_end: The id that ends a text, if that is another; else NONE.
    """

    size: int
    ids: Mapping[bytes, int]
    turn_end: int
    text_end: int

    @classmethod
    def of(cls, codec: TextCodec, size: int) -> "_Tokens":
        """Read a vocabulary of `size` tokens; takes a few microseconds a token."""
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
    """The tokens that a draft model's vocabulary and a target's have in common.

    Args:
        draft: The draft model's text side.
        draft_size: Tokens of its vocabulary.
        target: The target's text side.
        target_size: Tokens of its vocabulary.
    """

    def __init__(self, draft: TextCodec, draft_size: int, target: TextCodec, target_size: int) -> None:
        self._draft = _Tokens.of(draft, draft_size)
        others = _Tokens.of(target, target_size)  # not kept: it may take some ten megabytes
        self._to_target = np.full(draft_size, NONE, dtype=np.int64)
        for piece, token in self._draft.ids.items():
            self._to_target[token] = others.ids.get(piece, NONE)
        self._count = int((self._to_target != NONE).sum())
        self._target_count = len(others.ids)
        self._longest = max(map(len, self._draft.ids), default=0)
        for own, other in ((self._draft.turn_end, others.turn_end), (self._draft.text_end, others.text_end)):
            if own != NONE:
                self._to_target[own] = other

    @property
    def draft_ids(self) -> Mapping[bytes, int]:
        """The draft model's tokens by their bytes."""
        return self._draft.ids

    @property
    def to_target(self) -> Ids:
        """int64 `[draft tokens]`: the target's id of each of the draft model's tokens, or NONE; no id occurs twice."""
        return self._to_target

    @property
    def count(self) -> int:
        """Number of common tokens, ends left out."""
        return self._count

    @property
    def longest(self) -> int:
        """Bytes of the draft model's longest token."""
        return self._longest

    @property
    def overlap(self) -> float:
        """Share of the smaller vocabulary's tokens that are common, ends and control tokens left out."""
        return self._count / max(1, min(len(self._draft.ids), self._target_count))

    def ends(self) -> Iterable[tuple[int, int]]:
        """Yield the target's end tokens that have a counterpart, each with the draft model's."""
        for own in (self._draft.turn_end, self._draft.text_end):
            if own != NONE and self._to_target[own] != NONE:
                yield int(self._to_target[own]), own

    def restrict(self, dist: Dist) -> Dist | None:
        """Restrict a draft model's distribution to common tokens, and renormalise it; None if nothing is left.

        Returns:
            The distribution over the target's ids. It is the one to draw from and to report; the law asks no more.
        """
        ids = self._to_target[dist.ids]
        kept = ids != NONE
        if not kept.any():
            return None
        ids, probs = ids[kept], dist.probs[kept]
        order = np.lexsort((ids, -probs))
        rounded = (probs[order] / probs.sum()).astype(np.float32).astype(np.float64)
        return Dist(ids[order], rounded)

    def describe(self) -> str:
        """Return the overlap as part of a sentence."""
        return (
            f"{self._count} of {len(self._draft.ids)} draft tokens and {self._target_count} target tokens are "
            f"common, {self.overlap:.0%} of the smaller vocabulary"
        )


def turn_end(codec: TextCodec) -> int:
    """Return the end token that ends a turn: the last that the chat template writes, one of the usual, or the text's.

    Files do not tell the two apart reliably.
    """
    ends, template = codec.end_tokens, codec.chat_template or ""
    texts = [text for text in codec.control_texts if text in template or text in _TURN_ENDS]
    turns = [(template.rfind(text), token) for text in texts for token in _ids(codec, text) if token in ends]
    if turns:
        return max(turns)[1]
    return next((token for token in (*_ids(codec, codec.special_text("eos")), *ends) if token in ends), NONE)


def turn_begin(codec: TextCodec) -> int:
    """Return the control token with which the chat template begins a turn, or NONE."""
    template = codec.chat_template or ""
    others = {*codec.end_tokens, *codec.encode("")}
    texts = [text for text in codec.control_texts if text in template]
    begins = [(template.find(text), token) for text in texts for token in _ids(codec, text) if token not in others]
    return min(begins)[1] if begins else NONE


def _ids(codec: TextCodec, text: str) -> Sequence[int]:
    """Return the id of a control token, if its text is one."""
    ids = codec.encode(text, special=True) if text else []
    return ids if len(ids) == 1 else ()


def _written(codec: TextCodec, piece: bytes, tokens: Sequence[int]) -> int:
    """Return which of several tokens of the same bytes a tokenizer writes.

    Where bytes have tokens of their own, the printable ones occur twice: as a byte, for texts that nothing else can
    write, and as a character.
    """
    if len(tokens) > 1:
        text = piece.decode("utf-8", "ignore")
        return next((token for token in codec.encode(text) if token in tokens), max(tokens))
    return tokens[0]

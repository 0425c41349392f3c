"""Kinds of the tokens that a judgement has brought: which were drafted, corrected, added, forced, or written here."""

from collections.abc import Collection
from typing import Final

from fleet_edge.sessions.draft_results import DraftResult
from fleet_edge.store.token_kinds import TokenKind

CORRECTED: Final = TokenKind.CORRECTED.value.encode("ascii")

_DRAFTED: Final = TokenKind.DRAFTED.value.encode("ascii")
_BONUS: Final = TokenKind.BONUS.value.encode("ascii")
_FORCED: Final = TokenKind.FORCED.value.encode("ascii")[0]
_STREAMED: Final = TokenKind.STREAMED.value.encode("ascii")


def kinds_of(part: DraftResult, *, place: int, forced: Collection[int]) -> bytes:
    """Return a character for each token that a draft's part of a judgement adds to the text.

    Args:
        part: The draft's part.
        place: Of its first token among those judged on.
        forced: Places of those that the grammar left no choice about.
    """
    bonus = part.token is not None and not part.rejected
    kinds = _with_forced(_DRAFTED * part.accepted + _BONUS * bonus, place=place, forced=forced)
    return kinds if part.token is None or bonus else kinds + CORRECTED


def kinds_of_written(number: int, *, forced: Collection[int]) -> bytes:
    """Return a character for each token that the edge has written by itself."""
    return _with_forced(_STREAMED * number, place=0, forced=forced)


def _with_forced(plain: bytes, *, place: int, forced: Collection[int]) -> bytes:
    if not forced:
        return plain
    kinds = bytearray(plain)
    for each in forced:
        if 0 <= each - place < len(kinds):
            kinds[each - place] = _FORCED
    return bytes(kinds)

"""Stored texts: read back as one text, token by token, whichever edges have written it."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from sqlalchemy import Connection, RowMapping, select

from fleet_edge.store.models import TextRow
from fleet_edge.store.records import TokenKind
from fleet_edge.store.views import SegmentView, SessionView

MOST_TOKENS: Final = 1 << 16
"""Most tokens of a stored text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredToken:
    """A token of a stored text; `id` and `text` are None if not stored.

    `text` includes the end of a character that earlier tokens began.
    """

    kind: TokenKind
    id: int | None
    text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredText:
    """What is stored of a session's text; tokens not stored by an edge are of kind `UNKNOWN`.

    `hash` replaces the text: SHA-256 of the session's id, a newline and the text in UTF-8, in hexadecimal.
    """

    tokens: tuple[StoredToken, ...]
    hash: str | None

    @property
    def text(self) -> str | None:
        """The whole text; None if parts of it are not stored."""
        parts = [token.text for token in self.tokens if token.kind is not TokenKind.UNVERIFIED]
        return None if not parts or None in parts else "".join(part for part in parts if part is not None)


_UNKNOWN: Final = (TokenKind.UNKNOWN, None, None)
_Raw = tuple[TokenKind, int | None, bytes | None]


def read_text(connection: Connection, session: SessionView, segments: Sequence[SegmentView]) -> StoredText | None:
    """Return what is stored of a session's text, given its segments in order; None if nothing is."""
    numbers = [segment.segment for segment in segments]
    query = (
        select(TextRow.__table__)
        .where(TextRow.session == session.session, TextRow.segment.in_(numbers))
        .order_by(TextRow.segment, TextRow.start)
    )
    pieces: dict[int, list[RowMapping]] = {}
    for row in connection.execute(query).mappings():
        pieces.setdefault(row["segment"], []).append(row)
    if not pieces:
        return None
    tokens: list[_Raw] = []
    for segment in segments:
        # The device continues from its own tokens: what an edge had generated beyond them is not part of the text.
        _cut(tokens, segment.resumed_tokens or 0)
        for row in pieces.get(segment.segment, ()):
            _cut(tokens, min(row["start"], MOST_TOKENS))
            tokens += islice(_tokens(row), MOST_TOKENS - len(tokens))
    if session.reason is not None and session.final_tokens is not None:
        verified = max(0, session.final_tokens - (session.device_unverified or 0))
        _cut(tokens, min(verified, MOST_TOKENS))
        tokens += [(TokenKind.UNVERIFIED, None, None)] * min(session.device_unverified or 0, MOST_TOKENS)
    last = pieces[max(pieces)][-1]
    return StoredText(tokens=tuple(_decoded(tokens)), hash=last["hash"])


def _cut(tokens: list[_Raw], length: int) -> None:
    """Cut or extend a text to this length, with gaps where nothing is stored."""
    del tokens[length:]
    tokens += [_UNKNOWN] * (length - len(tokens))


def _tokens(row: RowMapping) -> Iterable[_Raw]:
    kinds = row["kinds"]
    ids = row["ids"].split(",") if row["ids"] else [None] * len(kinds)
    pieces = row["pieces"].split(",") if row["pieces"] is not None else [None] * len(kinds)
    for kind, token, piece in zip(kinds, ids, pieces, strict=False):
        known = TokenKind(kind) if kind in frozenset(TokenKind) else TokenKind.UNKNOWN
        yield known, None if token is None else int(token), None if piece is None else bytes.fromhex(piece)


def _decoded(tokens: Iterable[_Raw]) -> Iterable[StoredToken]:
    """Turn bytes into text: a character made of several tokens belongs to the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for kind, token, piece in tokens:
        if piece is None:
            decoder.reset()
        yield StoredToken(kind=kind, id=token, text=None if piece is None else decoder.decode(piece))

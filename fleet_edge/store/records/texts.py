"""Text record: what a session has written, where the edge's settings have it stored."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWritten:
    """A piece of a text. Never rewritten: of one segment and start the first holds.

    Attributes:
        session: As opened.
        segment: As opened.
        device: As opened.
        start: Position of its first token in the text.
        kinds: `fleet_edge.store.token_kinds.TokenKind` of each token, a character each.
        ids: Of the tokens, with commas; None if they are not to be stored.
        pieces: Of the tokens, the bytes in hexadecimal, with commas; None if they are not known, or not to be stored.
        hash: Of the whole text up to the end of this piece; None where the text itself is stored.
        at: When (UTC, aware).
    """

    session: str
    segment: int
    device: str
    start: int
    kinds: str
    ids: str | None
    pieces: str | None
    hash: str | None
    at: datetime

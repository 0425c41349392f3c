"""Stored generations: written to the session log piece by piece, as far as the settings ask for it.

A piece is written when it is long enough, the rest at the end. So a crash loses at most a piece of each generation.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from fleet_common.grammar.errors import GrammarUnavailable
from fleet_common.grammar.process import token_pieces
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.store.records import StoreText, TextWritten
from fleet_edge.verifiers.contract import ProvidesTokenizer, Verifier, VerifierError

_log = logging.getLogger(__name__)

_PIECE: Final = 256
"""Most tokens in a row."""

_PIECE_BYTES: Final = 8_192
"""Most bytes of text in a row: a line of the spool holds it in hexadecimal."""


@dataclass(slots=True)
class GenerationRecorder:
    """Writes generations of one edge, on the orchestrator's thread. `put` MUST NOT block or raise.

    `piece` returns the bytes of a token; None if they are unknown for the target.
    """

    put: Callable[[TextWritten], object]
    store: StoreText = StoreText.NONE
    piece: Callable[[int], bytes] | None = None
    _written: dict[int, int] = field(default_factory=dict)  # by handle, position up to which it was written

    def grew(self, session: EdgeSession, *, segment: int, at: datetime) -> None:
        if self.store is not StoreText.FULL:
            return
        while session.committed - self._begin(session) >= _PIECE:
            self._put(session, self._begin(session), session.committed, segment=segment, at=at)

    def ended(self, session: EdgeSession, *, tokens: int, segment: int, at: datetime) -> None:
        """Write the rest of a generation of `tokens` tokens that ends or goes on elsewhere."""
        begin, end = self._begin(session), min(tokens, session.committed)
        if self.store is StoreText.HASH and end > begin:
            self.put(self._hashed(session, begin, end, segment=segment, at=at))
        while self.store is StoreText.FULL and begin < end:
            begin = self._put(session, begin, end, segment=segment, at=at)
        self._written.pop(session.handle, None)

    def _begin(self, session: EdgeSession) -> int:
        return self._written.get(session.handle, session.committed - len(session.kinds))

    def _put(self, session: EdgeSession, begin: int, end: int, *, segment: int, at: datetime) -> int:
        """Write a piece from `begin` on; return its end."""
        tokens = session.text[begin : min(end, begin + _PIECE)]
        pieces = None if self.piece is None else _fitting([self.piece(token) for token in tokens])
        if pieces is not None:
            tokens = tokens[: len(pieces)]
        self.put(
            self._record(
                session,
                begin,
                begin + len(tokens),
                segment=segment,
                at=at,
                ids=",".join(map(str, tokens)),
                pieces=None if pieces is None else ",".join(piece.hex() for piece in pieces),
            )
        )
        self._written[session.handle] = begin + len(tokens)
        return begin + len(tokens)

    def _hashed(self, session: EdgeSession, begin: int, end: int, *, segment: int, at: datetime) -> TextWritten:
        digest = hashlib.sha256(f"{session.session.hex()}\n".encode())
        assert self.piece is not None  # the settings' hash is of what the tokens read
        for token in session.text[:end]:
            digest.update(self.piece(token))
        return self._record(session, begin, end, segment=segment, at=at, hash_=digest.hexdigest())

    def _record(
        self,
        session: EdgeSession,
        begin: int,
        end: int,
        *,
        segment: int,
        at: datetime,
        ids: str | None = None,
        pieces: str | None = None,
        hash_: str | None = None,
    ) -> TextWritten:
        first = session.committed - len(session.kinds)
        return TextWritten(
            session=session.session.hex(),
            segment=segment,
            device=session.device,
            start=begin,
            kinds=session.kinds[begin - first : end - first].decode("ascii"),
            ids=ids,
            pieces=pieces,
            hash=hash_,
            at=at,
        )


def token_bytes(verifier: Verifier, store: StoreText) -> Callable[[int], bytes] | None:
    """Return a function from token to bytes if needed; None if it is unknown.

    Raises `VerifierError` if it is needed for the hash, and unknown.
    """
    if store is StoreText.NONE:
        return None
    try:
        if isinstance(verifier, ProvidesTokenizer):
            return token_pieces(verifier.grammar_tokenizer()).__getitem__
        why = "Its engine does not tell."
    except GrammarUnavailable as error:
        why = str(error)
    if store is StoreText.HASH:
        raise VerifierError(
            f"store_text is hash, but the strings of the target's tokens are unknown; set it to full or none. {why}"
        )
    _log.warning(
        "GenerationRecorder are stored as token ids alone: what the target's tokens read is not known. %s", why
    )
    return None


def _fitting(pieces: Sequence[bytes]) -> Sequence[bytes]:
    """Return as many pieces as a row holds, at least one; a piece that is too long is cut."""
    size = 0
    for number, piece in enumerate(pieces):
        size += len(piece)
        if size > _PIECE_BYTES:
            return pieces[:number] if number else [piece[:_PIECE_BYTES]]
    return pieces

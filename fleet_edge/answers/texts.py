"""Stored generations: written to the session log piece by piece, as far as the settings ask for it.

A piece is written when it is long enough, the rest at the end. So a crash loses at most a piece of each generation.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

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

    def grew(self, session: EdgeSession, **key: Any) -> None:  # noqa: ANN401 - segment and time
        if self.store is StoreText.FULL:
            while session.committed - self._begin(session) >= _PIECE:
                self._piece(session, self._begin(session), session.committed, key)

    def ended(self, session: EdgeSession, *, tokens: int, **key: Any) -> None:  # noqa: ANN401
        """Write the rest of a generation of `tokens` tokens that ends or goes on elsewhere."""
        begin, end = self._begin(session), min(tokens, session.committed)
        if self.store is StoreText.HASH and end > begin:
            digest = hashlib.sha256(f"{session.session.hex()}\n".encode())
            assert self.piece is not None  # the settings' hash is of what the tokens read
            for token in session.text[:end]:
                digest.update(self.piece(token))
            self._put(session, begin, end, key, hash=digest.hexdigest())
        while self.store is StoreText.FULL and begin < end:
            begin = self._piece(session, begin, end, key)
        self._written.pop(session.handle, None)

    def _begin(self, session: EdgeSession) -> int:
        return self._written.get(session.handle, session.committed - len(session.kinds))

    def _piece(self, session: EdgeSession, begin: int, end: int, key: dict[str, Any]) -> int:
        """Write a piece from `begin` on; return its end."""
        tokens, pieces = session.text[begin : min(end, begin + _PIECE)], None
        if self.piece is not None:
            fitting = _fitting([self.piece(token) for token in tokens])
            tokens, pieces = tokens[: len(fitting)], ",".join(piece.hex() for piece in fitting)
        end = self._written[session.handle] = begin + len(tokens)
        self._put(session, begin, end, key, ids=",".join(map(str, tokens)), pieces=pieces)
        return end

    def _put(self, session: EdgeSession, begin: int, end: int, key: dict[str, Any], **content: str | None) -> None:
        first = session.committed - len(session.kinds)
        kinds = session.kinds[begin - first : end - first].decode("ascii")
        stored: dict[str, Any] = {"ids": None, "pieces": None, "hash": None} | content
        name = session.session.hex()
        self.put(TextWritten(session=name, device=session.device, start=begin, kinds=kinds, **key, **stored))


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

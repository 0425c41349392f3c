"""Stored texts on a terminal: as they read, coloured by how each token came about."""

import sys
from itertools import groupby
from typing import TYPE_CHECKING

from fleet_cli.device.chat.colours import Painter, wants_colours
from fleet_device.requests.generate import Piece, TokenText
from fleet_device.session.sequence import TokenOrigin

if TYPE_CHECKING:
    from fleet_edge.store.texts import StoredText, StoredToken

_UNKNOWN = "UNKNOWN"


def show_text(stored: "StoredText | None") -> None:
    """Show what is stored of a session's text."""
    print()
    if stored is None:
        print("The text is not stored: the edge's setting store_text was none, or it is purged.")
        return
    if stored.hash is not None:
        print(f"Of the text its hash is stored: {stored.hash}")
        print("It is the SHA-256 of the session's id, a newline and the text.")
        return
    painter = Painter(colours=wants_colours(sys.stdout))
    for known, tokens in groupby(stored.tokens, key=lambda token: token.text is not None):
        run = list(tokens)
        print(painter.paint(_piece(run)) if known else _gap(run), end="")
    print()
    if legend := painter.legend():
        print(legend)


def _piece(tokens: "list[StoredToken]") -> Piece:
    parts = tuple(
        TokenText(token=token.id or 0, origin=TokenOrigin[token.kind.name], text=token.text or "") for token in tokens
    )
    return Piece("".join(part.text for part in parts), tokens=len(parts), parts=parts)


def _gap(tokens: "list[StoredToken]") -> str:
    ids = [str(token.id) for token in tokens if token.id is not None]
    if ids:
        return f"[token ids {' '.join(ids)}]"
    kind = "that no edge has stored" if tokens[0].kind.name == _UNKNOWN else "that were written without an edge"
    return f"[{len(tokens):,} tokens {kind}]"

"""Colours of tokens by where they come from, and the legend to them."""

import os
from collections.abc import Mapping
from typing import Final, TextIO

from fleet_device.requests.generate import Piece
from fleet_device.session.sequence import TokenOrigin
from schemas.printable import printable

_RESET: Final = "\x1b[0m"

_STYLES: Final[Mapping[TokenOrigin, str]] = {
    TokenOrigin.DRAFTED: "\x1b[32m",  # green
    TokenOrigin.CORRECTED: "\x1b[33m",  # yellow
    TokenOrigin.BONUS: "\x1b[36m",  # cyan
    TokenOrigin.STREAMED: "\x1b[36m",
    TokenOrigin.FORCED: "\x1b[35m",  # magenta
    TokenOrigin.UNVERIFIED: "\x1b[4;31m",  # red, underlined
}
_MEANINGS: Final[Mapping[TokenOrigin, str]] = {
    TokenOrigin.DRAFTED: "drafted here and accepted",
    TokenOrigin.CORRECTED: "corrected by the edge",
    TokenOrigin.STREAMED: "written by the edge",
    TokenOrigin.FORCED: "forced by a grammar",
    TokenOrigin.UNVERIFIED: "unverified",
}


def wants_colours(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether what is written on a stream is to be coloured: on a terminal that can, unless NO_COLOR is set."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


class Painter:
    """Makes a text fit for a terminal, its tokens coloured.

    Args:
        colours: Whether to colour.
    """

    def __init__(self, *, colours: bool) -> None:
        self.colours = colours

    def paint(self, piece: Piece) -> str:
        """Return a piece without what a terminal would obey, but for colours, which end with it."""
        if not self.colours or not piece.parts:
            return printable(piece.text)
        painted, style = [], ""
        for part in piece.parts:
            if not part.text:
                continue
            if (wanted := _STYLES[part.origin]) != style:
                # From plain each time: a style may have more to it than a colour.
                painted.append(f"{_RESET}{wanted}" if style else wanted)
                style = wanted
            painted.append(printable(part.text))
        return "".join(painted) + (_RESET if style else "")

    def legend(self) -> str:
        """Return a line with each colour's meaning in it; empty without colours."""
        if not self.colours:
            return ""
        return " · ".join(f"{_STYLES[origin]}{meaning}{_RESET}" for origin, meaning in _MEANINGS.items())

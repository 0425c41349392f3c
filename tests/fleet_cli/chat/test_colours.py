import re

import pytest
from rich.color import ColorSystem

from fleet_cli.device_chat import paint
from fleet_device.requests.generate import Piece, TokenText
from fleet_device.session.sequence import TokenOrigin

COLOURS = ColorSystem.STANDARD
COLOUR = re.compile("\x1b\\[[0-9;]*m")


def piece(*parts: tuple[TokenOrigin, str]) -> Piece:
    tokens = tuple(TokenText(1, origin, text) for origin, text in parts)
    return Piece("".join(text for _, text in parts), len(tokens), tokens)


def test_tokens_are_coloured_by_their_origin_and_the_colour_ends_with_the_piece() -> None:
    painted = paint(
        piece(
            (TokenOrigin.DRAFTED, "a "),
            (TokenOrigin.DRAFTED, "b "),
            (TokenOrigin.CORRECTED, ""),
            (TokenOrigin.UNVERIFIED, "c "),
            (TokenOrigin.BONUS, "d"),
        ),
        COLOURS,
    )
    assert painted == "\x1b[32ma \x1b[0m\x1b[32mb \x1b[0m\x1b[4;31mc \x1b[0m\x1b[36md\x1b[0m"


@pytest.mark.parametrize("colours", [COLOURS, None])
def test_what_a_text_says_cannot_steer_the_terminal(colours: ColorSystem | None) -> None:
    hostile = "a\x1b[2J\x1b]0;title\x07b\x9bc\u202ed"
    painted = paint(piece((TokenOrigin.DRAFTED, hostile)), colours)
    assert COLOUR.sub("", painted) == "a\ufffd[2J\ufffd]0;title\ufffdb\ufffdc\ufffdd"

import io
import re

import pytest

from fleet_cli.device_chat import Painter, wants_colours
from fleet_device.requests.generate import Piece, TokenText
from fleet_device.session.sequence import TokenOrigin

COLOUR = re.compile("\x1b\\[[0-9;]*m")


def piece(*parts: tuple[TokenOrigin, str]) -> Piece:
    tokens = tuple(TokenText(1, origin, text) for origin, text in parts)
    return Piece("".join(text for _, text in parts), len(tokens), tokens)


def test_tokens_are_coloured_by_their_origin_and_the_colour_ends_with_the_piece() -> None:
    painted = Painter(colours=True).paint(
        piece(
            (TokenOrigin.DRAFTED, "a "),
            (TokenOrigin.DRAFTED, "b "),
            (TokenOrigin.CORRECTED, ""),
            (TokenOrigin.UNVERIFIED, "c "),
            (TokenOrigin.BONUS, "d"),
        )
    )
    assert painted == "\x1b[32ma b \x1b[0m\x1b[4;31mc \x1b[0m\x1b[36md\x1b[0m"


@pytest.mark.parametrize("colours", [True, False])
def test_what_a_text_says_cannot_steer_the_terminal(colours: bool) -> None:
    hostile = "a\x1b[2J\x1b]0;title\x07b\x9bc\u202ed"
    painted = Painter(colours=colours).paint(piece((TokenOrigin.DRAFTED, hostile)))
    assert COLOUR.sub("", painted) == "a\ufffd[2J\ufffd]0;title\ufffdb\ufffdc\ufffdd"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_need_a_terminal_that_can_and_a_user_who_wants_them() -> None:
    assert wants_colours(Screen(), {"TERM": "xterm"})
    assert wants_colours(Screen(), {"NO_COLOR": ""})  # as the convention has it: set, and not empty
    assert not wants_colours(Screen(), {"NO_COLOR": "1"})
    assert not wants_colours(Screen(), {"TERM": "dumb"})
    assert not wants_colours(io.StringIO(), {})

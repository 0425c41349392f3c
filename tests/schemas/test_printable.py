"""What others say of themselves is one printable line as soon as it is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import decode_reply, encode_reply
from schemas.control import EdgeState
from schemas.messages import Fault, Refused
from schemas.printable import printable_line
from schemas.reasons import Action, FaultCode, RefusalCode


@given(st.text())
def test_a_line_is_one_line_and_as_long(text: str) -> None:
    line = printable_line(text)
    assert line.isprintable()
    assert len(line) == len(text)
    assert printable_line(line) == line


def test_what_can_be_printed_stays() -> None:
    text = "déjà vu, 日本語, שלום, 🚀"
    assert printable_line(text) == text


@pytest.mark.parametrize("escape", ["\x1b[2J", "\x9b31m", "\r", "\n", "\x7f", "\x85", "\N{RIGHT-TO-LEFT OVERRIDE}"])
def test_what_an_edge_says_of_itself_is_printable_as_soon_as_it_is_read(escape: str) -> None:
    wild, tame = f"a{escape}b", printable_line(f"a{escape}b")
    refused = Refused.model_construct(session=bytes(8), code=RefusalCode.OTHER, sentence=wild)
    fault = Fault.model_construct(code=FaultCode.OTHER, action=Action.GIVE_UP, sentence=wild)
    for message in (refused, fault):
        read = decode_reply(encode_reply(message))
        assert isinstance(read, Refused | Fault)
        assert read.sentence == tame
    labelled = {"presence": "online", "software": wild, "edge": "e", "target": wild, "vocabulary": wild}
    state = EdgeState.model_validate(labelled | {"since": "2026-01-01T00:00:00Z"})
    assert state.software == state.target == state.vocabulary == tame

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_common.terminal import json_text, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\ufffd[2J\ufffd]0;title\ufffd"),
        ("one\r\x08two\x7f", "one\ufffd\ufffdtwo\ufffd"),
        ("\x9b31m", "\ufffd31m"),  # CSI as one character
        ("a\u202eb\u2066c", "a\ufffdb\ufffdc"),
        ("\ud800", "\ufffd"),
        ("line\n\tnext", "line\n\tnext"),
        ("Grüße, 東京 👩‍👩‍👧 שלום", "Grüße, 東京 👩‍👩‍👧 שלום"),
    ],
)
def test_what_a_terminal_would_obey_is_not_printed_and_all_else_is(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_nothing_is_obeyed_and_nothing_is_lost(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not any(ord(each) < 32 and each not in "\n\t" for each in shown)
    assert not any(0x7F <= ord(each) < 0xA0 for each in shown)
    shown.encode(sys.getdefaultencoding())


VALUES = st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(VALUES)
def test_json_is_exact_and_has_nothing_that_a_terminal_obeys(value: object) -> None:
    for indent in (None, 2):
        text = json_text(value, indent=indent)
        assert json.loads(text) == value
        surrogates = {each for each in text if "\ud800" <= each <= "\udfff"}
        assert printable(text) == text or surrogates

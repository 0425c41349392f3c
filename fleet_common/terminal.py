"""Terminal output: text from a model or from the network, without what a terminal would obey.

A large model writes what it was asked to, an edge what its owner wants. Escape sequences could move the cursor, set the
window's title or, in some terminals, type for the user; marks of writing direction make a line read otherwise than it
is.
"""

import json
import re
import unicodedata
from typing import Final

_KEPT: Final = frozenset("\n\t")
_DIRECTIONS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_IN_PLACE: Final = "\ufffd"
_UNESCAPED: Final = re.compile(f"[\x7f-\x9f{''.join(sorted(_DIRECTIONS))}]")
"""What JSON does not escape by itself."""


def printable(text: str) -> str:
    """Return a text with U+FFFD for each control character but newline and tab, and for each override of direction."""
    if text.isprintable():
        return text
    return "".join(_IN_PLACE if _obeyed(each) else each for each in text)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return JSON that holds a value exactly, with what a terminal would obey escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _UNESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _obeyed(character: str) -> bool:
    if character in _KEPT:
        return False
    return character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs")

"""Text from a model or from the network, safe to print: it cannot control a terminal or begin a new line in a log.

Escape sequences could move the cursor, set the title or, in some terminals, type for the user. Overrides of the
writing direction make a line read differently.
"""

import json
import re
import unicodedata
from typing import Final

from pydantic import AfterValidator

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


def printable_line(text: str) -> str:
    """Return a text in one line: unprintable characters, including line feeds, are replaced."""
    return text if text.isprintable() else "".join(each if each.isprintable() else _REPLACEMENT for each in text)


PRINTABLE: Final = AfterValidator(printable_line)
"""Annotation of a field for people: applies `printable_line`."""


_KEPT: Final = frozenset("\n\t")
_DIRECTIONS: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_IN_PLACE: Final = "\ufffd"
_UNESCAPED: Final = re.compile(f"[\x7f-\x9f{''.join(sorted(_DIRECTIONS))}]")
"""Control characters that JSON does not escape."""


def printable(text: str) -> str:
    """Replace control characters, except newline and tab, and overrides of direction by U+FFFD."""
    if text.isprintable():
        return text
    return "".join(_IN_PLACE if _obeyed(each) else each for each in text)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return JSON that represents a value exactly, with terminal control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _UNESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _obeyed(character: str) -> bool:
    if character in _KEPT:
        return False
    return character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs")

"""Words that a newer release has added to an enumeration: how one that does not know them reads them.

A neighbouring release may send a code, a reason or a number that this one lacks. Its message is sound all the same, so
the value is read as the member of ours that promises least. Only what such a word may look like is read so: text of
another shape, or a number that needs more than a byte, is still no message.
"""

import re
from enum import IntEnum, StrEnum
from typing import Final

from pydantic import BeforeValidator

__all__ = ["UNKNOWN_NUMBERS", "unknown_as"]

UNKNOWN_NUMBERS: Final = range(256)
"""What a number of an enumeration may be, now or later."""

_WORD: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")


def unknown_as(member: IntEnum | StrEnum) -> BeforeValidator:
    """Return the annotation of an enumeration's field that reads an unknown value as `member`, and coerces none."""
    kind = type(member)
    known = frozenset[object](kind)

    def read(value: object) -> object:
        if isinstance(value, kind):
            return value
        # By themselves, enumerations would take bytes for text, and `true` and 1.0 for 1.
        if type(value) is not (int if issubclass(kind, IntEnum) else str):
            raise ValueError(f"not a {'number' if issubclass(kind, IntEnum) else 'word'}")
        return member if value not in known and _may_be_added(value) else value

    return BeforeValidator(read)


def _may_be_added(value: object) -> bool:
    return _WORD.fullmatch(value) is not None if isinstance(value, str) else value in UNKNOWN_NUMBERS

"""Printable line: a sentence or a name of another, which can neither begin a new line in a log nor steer a terminal."""

from typing import Final

from pydantic import AfterValidator

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


def printable_line(text: str) -> str:
    """Return a text in one line: whatever cannot be printed is replaced, line feeds among it."""
    return text if text.isprintable() else "".join(each if each.isprintable() else _REPLACEMENT for each in text)


PRINTABLE: Final = AfterValidator(printable_line)
"""Annotation of a field that people read: it is read as `printable_line` has it."""

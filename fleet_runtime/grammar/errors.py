"""Exceptions of grammars."""

from typing import Final

from schemas.bounds import MAX_SENTENCE
from schemas.errors import FleetError
from schemas.printable import printable_line

__all__ = ["GrammarError", "GrammarUnavailable", "OutsideGrammar", "unusable"]

_MOST: Final = MAX_SENTENCE - 100


class GrammarError(FleetError):
    """A grammar that cannot be used, or cannot go on. Its text is one sentence for the user."""


class GrammarUnavailable(GrammarError):  # noqa: N818 - reads as what it says
    """No grammar can be used here: a library is missing, or the vocabulary's tokens are not known."""


class OutsideGrammar(GrammarError):  # noqa: N818
    """A text that the grammar rules out."""


def unusable(reason: str) -> GrammarError:
    """Return the error of a grammar that llguidance does not take, for its reason, which may have many lines."""
    plain = printable_line(" ".join(reason.replace("<non-verbose/>", "").split()))
    return GrammarError(f"The grammar cannot be used: {plain[:_MOST].rstrip('. ')}.")

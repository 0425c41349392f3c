"""Exceptions of grammars."""

from typing import Final

from schemas.bounds import MAX_SENTENCE
from schemas.errors import FleetError
from schemas.printable import printable_line

_MOST: Final = MAX_SENTENCE - 100

_REASONS: Final = {
    "coerce_one_of": "the alternatives of the keyword 'oneOf' must exclude each other, by their types or by a property "
    "that they require with different constants; use 'anyOf' if they need not",
    "NoExtension": "it allows no text",
}
"""Sentences in place of reasons that help no user, by a sign of them."""


class GrammarError(FleetError):
    """A grammar that cannot be used, or cannot go on. Its text is one sentence for the user."""


class GrammarUnavailable(GrammarError):  # noqa: N818 - reads as what it says
    """No grammar can be used here: a library is missing, or the vocabulary's tokens are not known."""


class GrammarBusy(GrammarError):  # noqa: N818
    """The grammars in use take all the memory that grammars may have."""


class OutsideGrammar(GrammarError):  # noqa: N818
    """A text that the grammar rules out.

    Attributes:
        taken: Tokens before the one that is ruled out.
    """

    def __init__(self, sentence: str, *, taken: int = 0) -> None:
        super().__init__(sentence)
        self.taken = taken


class GrammarBanned(GrammarError):  # noqa: N818
    """A grammar that has ended a process before."""

    def __init__(self) -> None:
        super().__init__(
            "The grammar cannot be used: it takes too much time, memory or stack, and is refused from now on. "
            "Simplify it."
        )


class GrammarKilled(GrammarBanned):
    """A grammar that has just ended the process that it was compiled or followed in.

    Attributes:
        digest: Of the grammar.
    """

    def __init__(self, digest: str) -> None:
        super().__init__()
        self.digest = digest


def unusable(reason: str) -> GrammarError:
    """Return the error of a grammar that llguidance does not take, for its reason, which may have many lines."""
    plain = printable_line(" ".join(reason.replace("<non-verbose/>", "").split()))
    sentence = next((sentence for sign, sentence in _REASONS.items() if sign in plain), plain)
    return GrammarError(f"The grammar cannot be used: {sentence[:_MOST].rstrip('. ')}.")

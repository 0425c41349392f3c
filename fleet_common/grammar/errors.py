"""Exceptions of grammars."""

import re
from typing import Final

from schemas.errors import FleetError
from schemas.fields import MAX_SENTENCE
from schemas.printable import printable_line

_MOST: Final = MAX_SENTENCE - 100

_REASONS: Final = {
    "coerce_one_of": "the alternatives of the keyword 'oneOf' must exclude each other, by their types, by constants or "
    "by required properties; use 'anyOf' if they need not",
    "NoExtension": "it allows no text",
}
"""Replacements for unhelpful reasons of llguidance, by a part of their text."""

_KEYWORDS: Final = re.compile(r"Unimplemented keys: \[(.*?)\]")


class GrammarError(FleetError):
    """A grammar that cannot be used, or cannot continue. The message is one sentence for the user."""


class GrammarUnavailable(GrammarError):  # noqa: N818 - reads as what it says
    """Grammars cannot be used here: a library is missing, or the tokens of the vocabulary are unknown."""


class GrammarBusy(GrammarError):  # noqa: N818
    """A process was killed from outside; the grammar may be usable later."""


class OutsideGrammar(GrammarError):  # noqa: N818
    """Tokens violate the grammar; `taken` is the number of tokens before the one that is not allowed."""

    def __init__(self, sentence: str, *, taken: int = 0) -> None:
        super().__init__(sentence)
        self.taken = taken


class GrammarNotReady(GrammarError):  # noqa: N818
    """The worker does not follow a generation, and making it follow takes long; `restore` does it."""

    def __init__(self) -> None:
        super().__init__("The grammar is being prepared again; try again shortly.")


class GrammarBanned(GrammarError):  # noqa: N818
    def __init__(self) -> None:
        super().__init__(
            "The grammar is refused for a day, because it takes too much time, memory or stack to compile; simplify it."
        )


class GrammarKilled(GrammarError):  # noqa: N818
    """A grammar has ended two processes: while it was compiled, or by the same request of a generation."""

    def __init__(self, digest: str, how: str) -> None:
        super().__init__("The grammar cannot be used: it takes too much time, memory or stack. Simplify it.")
        self.report = f"A grammar ended its process ({how}); its SHA-256 is {digest}."


def unusable(reason: str) -> GrammarError:
    """Return the error of a grammar; llguidance's reason may have many lines."""
    plain = printable_line(" ".join(reason.replace("<non-verbose/>", "").split()))
    sentence = next((sentence for sign, sentence in _REASONS.items() if sign in plain), plain)
    if found := _KEYWORDS.search(plain):
        sentence = f"the following keywords of its schema are not supported: {found[1].replace(chr(34), chr(39))}"
    return GrammarError(f"The grammar cannot be used: {sentence[:_MOST].rstrip('. ')}.")

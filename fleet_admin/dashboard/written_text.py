"""Written text of a session for its page: runs of tokens that came about alike, and how many there are of each kind."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from fleet_edge.store.texts import StoredText, StoredToken
from fleet_edge.store.token_kinds import TokenKind

_MOST_TOKENS: Final = 4_096
"""Shown of a text; `fleet admin session --text` shows all of it."""

_WORDS: Final = {
    TokenKind.DRAFTED: "drafted and accepted",
    TokenKind.CORRECTED: "corrected",
    TokenKind.BONUS: "bonus",
    TokenKind.FORCED: "forced by the grammar",
    TokenKind.STREAMED: "written by the edge",
    TokenKind.UNVERIFIED: "unverified",
    TokenKind.UNKNOWN: "not stored",
}


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that follow each other and came about alike.

    Attributes:
        kind: The kind's name, in small letters.
        words: The same for people.
        text: What they read, or how many they are where that is not shown.
        known: Whether `text` is what they read.
    """

    kind: str
    words: str
    text: str
    known: bool


@dataclass(frozen=True, slots=True)
class WrittenText:
    """A text for its page.

    Attributes:
        runs: From its beginning; empty if nobody may read it, or only a hash is stored.
        counts: Kind, the same for people, number of tokens.
        hash: Where a hash is stored in place of the text.
        hidden: Whether there is a text that this visitor may not read.
        left_out: Tokens that are not shown because the text is long.
    """

    runs: tuple[Run, ...]
    counts: tuple[tuple[str, str, int], ...]
    hash: str | None
    hidden: bool
    left_out: int


def written_text(stored: StoredText, *, readable: bool) -> WrittenText:
    """Return a stored text as its page shows it.

    Args:
        stored: As the log has it.
        readable: Whether the visitor may read what it says.
    """
    counts = Counter(token.kind for token in stored.tokens)
    told = any(token.id is not None for token in stored.tokens)
    return WrittenText(
        runs=tuple(_runs(stored.tokens[:_MOST_TOKENS])) if readable and told else (),
        counts=tuple((kind.name.lower(), words, counts[kind]) for kind, words in _WORDS.items() if counts[kind]),
        hash=stored.hash,
        hidden=told and not readable,
        left_out=max(0, len(stored.tokens) - _MOST_TOKENS) if readable and told else 0,
    )


def _runs(tokens: tuple[StoredToken, ...]) -> Iterator[Run]:
    for (kind, known), group in groupby(tokens, key=lambda token: (token.kind, token.text is not None)):
        run = list(group)
        text = "".join(token.text or "" for token in run) if known else f"[{len(run):,} {_WORDS[kind]}]"
        yield Run(kind.name.lower(), _WORDS[kind], text, known)

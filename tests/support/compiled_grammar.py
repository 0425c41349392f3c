"""Grammars that are compiled once, for tests of what they allow."""

from typing import Final

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import OutsideGrammar
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.policy import Grammar

_WORDS: Final = [*map(chr, range(32, 127)), "\n", "ö", "end"]
_CHARACTERS: Final = GrammarTokenizer.of_words(_WORDS, end_tokens=[len(_WORDS) - 1])


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarMatcher:
    """Return a matcher, with whose last reference its processes end."""
    return GrammarCompiler(lambda: tokenizer).matcher(grammar)


def takes(grammar: Grammar | None, text: str) -> bool:
    """Return whether a grammar allows a text, a token for each character."""
    assert grammar is not None
    matcher, ids = compile_grammar(grammar, _CHARACTERS), [_WORDS.index(character) for character in text]
    try:
        for end in range(100, len(ids), 100):  # as a generation grows; only a short one begins as a whole
            matcher.check(ids[:end])
        matcher.check([*ids, len(_WORDS) - 1])
    except OutsideGrammar:
        return False
    return True

"""Grammars that are compiled once, for tests of what they allow."""

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.policy import Grammar


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarMatcher:
    """Return a matcher, with whose last reference its processes end."""
    return GrammarCompiler(lambda: tokenizer).matcher(grammar)

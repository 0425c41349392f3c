"""Grammars that are compiled once, for tests of what they allow."""

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.process import GrammarMatcher, GrammarTokenizer
from schemas.policy import Grammar


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarMatcher:
    compiler = GrammarCompiler(lambda: tokenizer)
    try:
        return compiler.matcher(grammar)
    finally:
        compiler.close()

"""Compiler of grammars: bounded in size, time and memory, whoever has written them; the latest are kept."""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fleet_runtime.grammar.errors import GrammarError, unusable
from fleet_runtime.grammar.matcher import GrammarMatcher
from fleet_runtime.grammar.tokenizer import GrammarTokenizer
from schemas.grammar import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["GrammarCompiler", "compile_grammar"]

_JSON: "Final[JsonCompileOptions]" = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
}
"""One way to write a value, the way that most texts have it: so most of what stands around values is forced."""

_KEPT: Final = 32
"""Grammars that are kept compiled; each takes up to some megabytes."""


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarMatcher:
    """Return a matcher at the beginning of a text. Takes up to some tenths of a second.

    Raises:
        GrammarError: The grammar cannot be read, uses what is not supported, allows no text, or is too complex.
    """
    return _maker(grammar, tokenizer)()


class GrammarCompiler:
    """Compiles grammars, each once as long as it is among the latest. Callable on any thread.

    Args:
        load: Builds the vocabulary's tokenizer, when the first grammar comes.
    """

    def __init__(self, load: Callable[[], GrammarTokenizer]) -> None:
        self._load = load
        self._tokenizer: GrammarTokenizer | None = None
        self._makers: OrderedDict[Grammar, Callable[[], GrammarMatcher]] = OrderedDict()
        self._compiling = threading.Lock()

    def knows(self, grammar: Grammar) -> bool:
        """Whether a matcher is there at once."""
        return grammar in self._makers

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the beginning of a text.

        Raises:
            GrammarError: See `compile_grammar`.
        """
        maker = self._makers.get(grammar)
        if maker is None:
            with self._compiling:  # others that are known are not held up
                if self._tokenizer is None:
                    self._tokenizer = self._load()
                maker = self._makers.get(grammar) or _maker(grammar, self._tokenizer)
                self._makers[grammar] = maker
                if len(self._makers) > _KEPT:
                    self._makers.popitem(last=False)
        else:
            with contextlib.suppress(KeyError):  # it may just have been dropped
                self._makers.move_to_end(grammar)
        return maker()


def _maker(grammar: Grammar, tokenizer: GrammarTokenizer) -> Callable[[], GrammarMatcher]:
    import llguidance  # noqa: PLC0415 - the tokenizer has it loaded

    try:
        source = _source(grammar)
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=1_000_000,  # some 20 ms
            max_grammar_size=100_000,  # symbols
            max_lexer_states=50_000,  # up to 2 kB each
            step_lexer_fuel=50_000,  # some 4 ms
            step_max_items=20_000,  # some 1 ms
            verbose_errors=False,
        )
        first = llguidance.LLMatcher(tokenizer.native, source, log_level=0, limits=limits)
    except (ValueError, RecursionError) as error:
        raise unusable(str(error)) from None
    if first.is_error():
        raise unusable(first.get_error())

    def make() -> GrammarMatcher:
        return GrammarMatcher(first.deep_copy, vocabulary=tokenizer.vocabulary, end_tokens=tokenizer.end_tokens)

    try:
        make().allowed(())  # whether there is any text; and what the first mask needs is computed here
    except GrammarError as error:
        if "NoExtension" in str(error):
            raise GrammarError("The grammar cannot be used: it allows no text.") from None
        raise
    return make


def _source(grammar: Grammar) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415

    match grammar.kind:
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.LARK:
            return LLMatcher.grammar_from_lark(grammar.text)
        case GrammarKind.JSON_OBJECT:
            schema: object = {"type": "object"}
        case GrammarKind.JSON_SCHEMA:
            try:
                schema = json.loads(grammar.text)
            except json.JSONDecodeError as error:
                raise ValueError(f"the schema is not JSON: {error}") from None
            if not isinstance(schema, dict | bool):
                raise ValueError("a JSON schema is an object")  # noqa: TRY004 - a value, not a type
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)

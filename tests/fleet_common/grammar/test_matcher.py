from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, strategies as st

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarError, OutsideGrammar
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.policy import Grammar, GrammarKind
from tests.support.compiled_grammar import compile_grammar
from tests.support.toy_grammar import GRAMMAR, TEXTS, allowed

END = 0
TOY = GrammarTokenizer.of_words([f"t{token} " for token in range(6)], end_tokens=[END])

LETTERS = [*(chr(code) for code in range(32, 127)), '{"', '": ', '", "', "na", "name", "true", "é"]
JSON = GrammarTokenizer.of_words([*LETTERS, "end"], end_tokens=[len(LETTERS)])
SCHEMA = Grammar(
    kind=GrammarKind.JSON_SCHEMA,
    text="""{"type": "object", "properties": {"name": {"type": "string"}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"], "additionalProperties": false}""",
)


COMPILER = GrammarCompiler(lambda: TOY)


def toy() -> GrammarMatcher:
    return COMPILER.matcher(GRAMMAR)


def possible(text: Sequence[int]) -> bool:
    return all(token in allowed(text[:place], end=END) for place, token in enumerate(text))


BEGINNINGS = [text for length in range(5) for text in product(range(6), repeat=length) if possible(text)]


def test_after_every_text_just_those_tokens_are_allowed_that_some_text_goes_on_with() -> None:
    matcher = toy()
    for text in BEGINNINGS:
        expected = [END] if END in text else allowed(text, end=END)
        assert matcher.allowed(text).tolist() == expected, text


@given(st.lists(st.sampled_from(BEGINNINGS), min_size=1, max_size=12))
def test_what_is_allowed_depends_on_the_text_alone_however_the_matcher_came_there(texts: list[tuple[int, ...]]) -> None:
    matcher = toy()
    for text in texts:
        assert matcher.allowed(text).tolist() == toy().allowed(text).tolist()
        assert matcher.forced(text) == toy().forced(text)


@pytest.mark.parametrize("text", BEGINNINGS)
def test_a_forced_token_is_the_only_one_allowed(text: tuple[int, ...]) -> None:
    matcher = toy()
    for token in matcher.forced(text):
        assert matcher.allowed(text).tolist() == [token]
        text = (*text, token)


def test_a_run_of_forced_tokens_is_known_at_once() -> None:
    assert toy().forced((4,)) == (5, 1, 1)
    assert toy().forced((4, 5, 1, 1)) == (END,)
    assert toy().forced((1,)) == ()
    assert toy().forced((3,)) == ()  # which may end there, or go on
    assert toy().forced((3, END)) == ()


@pytest.mark.parametrize("text", [(1, 1), (2, 4), (0,), (1, 3, 0), (4, 5, 1, 1, 1)])
def test_a_text_outside_the_grammar_is_told_and_the_matcher_goes_on_with_others(text: tuple[int, ...]) -> None:
    matcher = toy()
    with pytest.raises(OutsideGrammar):
        matcher.check(text)
    assert matcher.allowed((2,)).tolist() == [3]


@pytest.mark.parametrize("text", [*TEXTS, (), (1,), (3, END)])
def test_a_text_of_the_grammar_passes_ended_or_not(text: tuple[int, ...]) -> None:
    toy().check(text)


def test_json_is_written_in_one_way_so_that_what_stands_around_values_is_forced() -> None:
    matcher = compile_grammar(SCHEMA, JSON)

    def ids(text: str) -> list[int]:
        found = list[int]()
        while text:
            word = max((word for word in LETTERS if text.startswith(word)), key=len)
            found.append(LETTERS.index(word))
            text = text[len(word) :]
        return found

    forced = "".join(LETTERS[token] for token in matcher.forced(()))
    assert '{"name": "'.startswith(forced)
    assert forced.startswith('{"')
    matcher.check(ids('{"name": "Bo", "ok": true}'))
    with pytest.raises(OutsideGrammar):
        matcher.check(ids('{"name":"Bo"'))


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (GrammarKind.JSON_SCHEMA, '{"type": "strin"}', "strin"),
        (GrammarKind.JSON_SCHEMA, '{"not": {"pattern": "a"}}', "not"),
        (GrammarKind.JSON_SCHEMA, '{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        (GrammarKind.JSON_SCHEMA, '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        (GrammarKind.JSON_SCHEMA, "[1", "JSON"),
        (GrammarKind.JSON_SCHEMA, "7", "object"),
        (GrammarKind.JSON_SCHEMA, "[" * 60_000, "cannot be used"),
        (GrammarKind.REGEX, "(", "cannot be used"),
        (GrammarKind.REGEX, r"[^\s\S]", "allows no text"),
        (GrammarKind.LARK, "start: foo", "foo"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(kind: GrammarKind, text: str, says: str) -> None:
    with pytest.raises(GrammarError) as found:
        compile_grammar(Grammar(kind=kind, text=text), JSON)
    assert says in str(found.value)
    assert str(found.value).startswith("The grammar cannot be used")


def _doubling(depth: int, word: str) -> str:
    definitions = ",".join(
        f'"d{level}": {{"{word}": [{{"$ref": "#/$defs/d{level + 1}"}}, {{"$ref": "#/$defs/d{level + 1}"}}]}}'
        for level in range(depth)
    )
    return f'{{"$ref": "#/$defs/d0", "$defs": {{{definitions}, "d{depth}": {{"type": "integer"}}}}}}'


BOMBS = {
    "nested repetition": Grammar(kind=GrammarKind.REGEX, text="((((x{1,99}){1,99}){1,99}){1,99}){1,99}"),
    "states": Grammar(kind=GrammarKind.REGEX, text="(.*a.{14}.*)(.*b.{14}.*)"),
    "ambiguity": Grammar(kind=GrammarKind.LARK, text='start: a a a a a\na: "x"* | a a | b\nb: a b | "y"*'),
    "any of any": Grammar(kind=GrammarKind.JSON_SCHEMA, text=_doubling(40, "anyOf")),
    "all of all": Grammar(kind=GrammarKind.JSON_SCHEMA, text=_doubling(40, "allOf")),
    "one of one": Grammar(kind=GrammarKind.JSON_SCHEMA, text=_doubling(40, "oneOf")),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("grammar", BOMBS.values(), ids=BOMBS)
def test_a_grammar_that_would_take_for_ever_is_refused_or_followed_within_limits(grammar: Grammar) -> None:
    try:
        matcher = compile_grammar(grammar, JSON)
        text = list[int]()
        while len(text) < 60 and len(JSON_ENDS & set(ids := matcher.allowed(text).tolist())) < len(ids):
            text.append(ids[len(text) % len(ids)])
            if text[-1] in JSON_ENDS:
                break
    except GrammarError:
        pass


JSON_ENDS = set(JSON.end_tokens)

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.hostile.grammars import random_bomb
from fleet_common.grammar.compiler import BannedGrammars, GrammarCompiler
from fleet_common.grammar.errors import GrammarBanned, GrammarError, GrammarKilled, GrammarUnavailable
from fleet_common.grammar.process import GrammarMatcher, GrammarProcess, GrammarTokenizer, token_pieces
from schemas.policy import Grammar, GrammarKind
from tests.support.toy_grammar import GRAMMAR

LETTERS = [chr(code) for code in range(32, 127)]
WORDS = GrammarTokenizer.of_words([*LETTERS, "end"], end_tokens=[len(LETTERS)])
TOY = GrammarTokenizer.of_words([f"t{token} " for token in range(6)], end_tokens=[0])
SMALL = Grammar.regex("ab|ac")


def schema_chain(length: int) -> Grammar:
    """Definitions, each of arrays of the next: with 1,200 they take 42 KB, and overflow a stack of 8 MiB."""
    chain = ",".join(f'"{place}":{{"items":{{"$ref":"#/$defs/{place + 1}"}}}}' for place in range(length))
    text = f'{{"$defs":{{{chain},"{length}":{{}}}},"$ref":"#/$defs/0"}}'
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)


def lark_chain(length: int, form: str = '{} "a"') -> Grammar:
    lines = "\n".join(f"A{place}: {form.format(f'A{place + 1}')}" for place in range(length))
    return Grammar.lark(f'start: A0\n{lines}\nA{length}: "a"\n')


DEADLY = {"schema": schema_chain(1600), "terminals": lark_chain(3800)}


@pytest.fixture(scope="module")
def process() -> Iterator[GrammarProcess]:
    found = GrammarProcess(WORDS)
    yield found
    found.close()


def workers_of(use: Callable[[], object]) -> list[psutil.Process]:
    before = set(psutil.Process().children())
    use()
    return [each for each in psutil.Process().children() if each not in before]


def ignore(_grammar: Grammar) -> None:
    pass


@pytest.mark.parametrize("grammar", DEADLY.values(), ids=DEADLY)
def test_a_stack_overflow_ends_only_the_grammars_process(process: GrammarProcess, grammar: Grammar) -> None:
    other = process.compile(SMALL, SMALL.text, ignore)
    killed: list[Grammar] = []
    with pytest.raises(GrammarKilled) as found:
        process.compile(grammar, grammar.text, killed.append)
    assert found.value.digest == grammar.digest
    assert killed == [grammar]
    assert other.allowed(other.new_matcher(), 0, [LETTERS.index("a")]).tolist() == [LETTERS.index(c) for c in "bc"]
    assert process.compile(SMALL, SMALL.text, ignore).usable


@pytest.mark.timeout(60)
def test_a_grammar_that_compiles_for_minutes_is_given_up(process: GrammarProcess) -> None:
    endless = lark_chain(1800, '{}+ "a"')
    with pytest.raises(GrammarKilled):
        process.compile(endless, endless.text, ignore)


@pytest.mark.parametrize("grammar", DEADLY.values(), ids=DEADLY)
def test_the_shape_of_such_a_grammar_is_refused_before_any_process_sees_it(grammar: Grammar) -> None:
    def load() -> GrammarTokenizer:
        raise AssertionError("no vocabulary is needed")

    with pytest.raises(GrammarError):
        GrammarCompiler(load).matcher(grammar)


def test_a_grammar_whose_process_ends_while_it_is_followed_is_banned_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "banned"
    compiler = GrammarCompiler(lambda: TOY, BannedGrammars(file))
    (worker,) = workers_of(lambda: compiler.matcher(Grammar.regex("t2 ")))
    matcher = compiler.matcher(GRAMMAR)
    assert matcher.allowed((4,)).tolist() == [5]
    for each in worker.children():
        each.kill()
    with pytest.raises(GrammarKilled):
        matcher.allowed((4, 5))
    with pytest.raises(GrammarBanned):
        compiler.matcher(GRAMMAR)
    assert compiler.matcher(Grammar.regex("t1 t2 ")).allowed(()).tolist() == [1]
    with pytest.raises(GrammarBanned):
        GrammarCompiler(lambda: TOY, BannedGrammars(file)).matcher(GRAMMAR)
    compiler.close()


def test_what_another_version_of_the_library_could_not_bear_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "banned"
    file.write_text(f"0.0.1 {GRAMMAR.digest}\n")
    BannedGrammars(file).check(GRAMMAR)


def test_the_process_that_others_are_forked_from_is_replaced_when_it_ends() -> None:
    compiler = GrammarCompiler(lambda: TOY)
    (worker,) = workers_of(lambda: compiler.matcher(GRAMMAR))
    worker.kill()
    assert compiler.matcher(Grammar.regex("t1 t2 ")).allowed(()).tolist() == [1]
    compiler.close()


def test_the_process_of_a_grammar_ends_with_its_last_matcher() -> None:
    process = GrammarProcess(TOY)
    matchers = list[GrammarMatcher]()

    def use() -> None:
        matchers.append(GrammarMatcher(process.compile(GRAMMAR, GRAMMAR.text, ignore)))

    before = {child for each in psutil.Process().children() for child in each.children()}
    use()
    after = {child for each in psutil.Process().children() for child in each.children()}
    assert len(after - before) == 1
    process.close()
    assert matchers[0].allowed((4,)).tolist() == [5]
    matchers.clear()
    _, left = psutil.wait_procs(after - before, timeout=10)
    assert not left


def test_a_tokenizer_that_the_library_does_not_know_is_told() -> None:
    broken = GrammarTokenizer.of_tokenizer_json("{}", vocabulary=8, end_tokens=[0])
    with pytest.raises(GrammarUnavailable):
        GrammarProcess(broken)
    with pytest.raises(GrammarUnavailable):
        token_pieces(broken)


def test_what_the_vocabulary_raises_is_told_and_the_grammar_is_compiled_again_later() -> None:
    words = list[str]()

    def encode(text: str) -> list[int]:
        words.append(text)
        if len(words) < 3:
            raise ValueError("not now")
        return [text.encode()[0]]

    pieces = [bytes([byte]) for byte in range(256)]
    compiler = GrammarCompiler(lambda: GrammarTokenizer.of_pieces(pieces, end_tokens=[0], encode=encode))
    with pytest.raises(GrammarError):
        compiler.matcher(Grammar.regex("ab"))
    compiler.close()


@pytest.mark.parametrize("text", ["a" * 20_000, "ab cd " * 4_000, "é" * 10_000])
def test_a_step_along_a_long_constant_encodes_little_of_it(text: str) -> None:
    asked = list[int]()
    pieces = [b"", *(bytes([byte]) for byte in range(1, 256)), b"aaaa", b"ab ", b"cd ", "éé".encode()]
    plain = GrammarTokenizer.of_words([piece.decode("latin-1") for piece in pieces], end_tokens=[0])

    def encode(part: str) -> list[int]:
        asked.append(len(part))
        found, raw = list[int](), part.encode()
        while raw:
            piece = max((each for each in pieces if each and raw.startswith(each)), key=len)
            found.append(pieces.index(piece))
            raw = raw[len(piece) :]
        return found

    assert plain.vocabulary == len(pieces)
    compiler = GrammarCompiler(lambda: GrammarTokenizer.of_pieces(pieces, end_tokens=[0], encode=encode))
    matcher = compiler.matcher(Grammar.json_schema({"const": text}))
    written = list[int]()
    while len(written) < 40:
        run = matcher.forced(written)
        assert 16 <= len(run) <= 1024
        assert matcher.allowed(written).tolist() == [run[0]]
        written += run[:5]
    assert (
        b'"' + text.encode()
        == b"".join(pieces[token] for token in written)
        + (('"' + text).encode()[len(b"".join(pieces[token] for token in written)) :])
    )
    assert max(asked) <= 600
    compiler.close()


def limited(times: int) -> Callable[[], bool]:
    left = iter(range(times))
    return lambda: next(left, None) is not None


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_random_bombs_are_refused_or_followed_and_the_compiler_lives_on(seed: int) -> None:
    rng = random.Random(seed)
    compiler = GrammarCompiler(lambda: WORDS)
    for _ in range(15):
        try:
            matcher, text, more = compiler.matcher(random_bomb(rng)), list[int](), limited(20)
            while more() and text[-1:] != [len(LETTERS)]:
                text.append(int(rng.choice(matcher.allowed(text))))
        except GrammarError:
            continue
    assert compiler.matcher(SMALL).allowed(()).tolist() == [LETTERS.index("a")]
    compiler.close()

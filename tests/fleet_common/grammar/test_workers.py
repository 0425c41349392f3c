import random
import signal
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fleet_common.grammar import worker, workers
from fleet_common.grammar.compiler import BannedGrammars, GrammarCompiler
from fleet_common.grammar.errors import (
    GrammarBanned,
    GrammarBusy,
    GrammarError,
    GrammarKilled,
    GrammarNotReady,
    GrammarUnavailable,
    OutsideGrammar,
)
from fleet_common.grammar.matcher import CompiledGrammar, compile_alone
from fleet_common.grammar.messages import GrammarRequest, Op, Status
from fleet_common.grammar.native import NativeVocabulary
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.grammar.worker import MatcherCache
from fleet_common.grammar.workers import GrammarWorkers
from schemas.policy import Grammar, GrammarKind
from tests.support.grammar_processes import end_at, end_processes, forking_process, grammar_processes
from tests.support.random_grammars import random_bomb
from tests.support.toy_grammar import GRAMMAR
from tests.support.waiting import PATIENCE_S, until

LETTERS = [chr(code) for code in range(32, 127)]
WORDS = GrammarTokenizer.of_words([*LETTERS, "end"], end_tokens=[len(LETTERS)])
TOY = GrammarTokenizer.of_words([f"t{token} " for token in range(6)], end_tokens=[0])
SMALL = Grammar.regex("ab|ac")
JSON_OBJECT = Grammar.json_object()


def schema_chain(length: int) -> Grammar:
    """Definitions, each of arrays of the next: with 1,200 they take 42 KB, and overflow a stack of 8 MiB."""
    chain = ",".join(f'"{place}":{{"items":{{"$ref":"#/$defs/{place + 1}"}}}}' for place in range(length))
    text = f'{{"$defs":{{{chain},"{length}":{{}}}},"$ref":"#/$defs/0"}}'
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)


def lark_chain(length: int, form: str = '{} "a"') -> Grammar:
    lines = "\n".join(f"A{place}: {form.format(f'A{place + 1}')}" for place in range(length))
    return Grammar.lark(f'start: A0\n{lines}\nA{length}: "a"\n')


ENDLESS = lark_chain(1800, '{}+ "a"')
DEADLY = {"schema": schema_chain(1600), "terminals": lark_chain(3800)}


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: TOY)
    yield made
    made.close()


@pytest.fixture
def letters() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: WORDS)
    yield made
    made.close()


@pytest.fixture
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes see what the check of a grammar's shape refuses."""
    monkeypatch.setattr("fleet_common.grammar.compiler.bounded_text", lambda grammar: grammar.text)


def compiled(grammar: Grammar) -> CompiledGrammar:
    return compile_alone(grammar, grammar.text, GrammarWorkers(lambda: WORDS))


@pytest.mark.usefixtures("unbounded")
@pytest.mark.parametrize("grammar", DEADLY.values(), ids=DEADLY)
def test_a_stack_overflow_ends_only_the_processes_that_try_the_grammar(
    letters: GrammarCompiler, grammar: Grammar
) -> None:
    other = letters.matcher(SMALL)
    text = [LETTERS.index("a")]
    other.restore(text)
    with pytest.raises(GrammarKilled) as found:
        letters.matcher(grammar)
    assert grammar.digest in found.value.report
    assert "SIG" in found.value.report
    assert other.allowed(text, patient=False).tolist() == [LETTERS.index(c) for c in "bc"]


@pytest.mark.timeout(120)
def test_a_grammar_that_compiles_for_minutes_is_given_up() -> None:
    with pytest.raises(GrammarKilled):
        compiled(ENDLESS)


@pytest.mark.parametrize("grammar", DEADLY.values(), ids=DEADLY)
def test_the_shape_of_such_a_grammar_is_refused_before_any_process_sees_it(grammar: Grammar) -> None:
    def load() -> GrammarTokenizer:
        raise AssertionError("no vocabulary is needed")

    with pytest.raises(GrammarError):
        GrammarCompiler(load).matcher(grammar)


@pytest.mark.usefixtures("unbounded")
def test_a_grammar_that_ends_two_processes_while_it_is_compiled_is_banned_for_a_day(tmp_path: Path) -> None:
    now = [0.0]
    banned = BannedGrammars(tmp_path / "banned", lambda: now[0])
    compiler = GrammarCompiler(lambda: WORDS, banned)
    deadly = DEADLY["schema"]
    with pytest.raises(GrammarKilled):
        compiler.matcher(deadly)
    with pytest.raises(GrammarBanned):
        compiler.matcher(deadly)
    with pytest.raises(GrammarBanned):
        BannedGrammars(tmp_path / "banned", lambda: now[0]).check(deadly)
    assert list(banned.until()) == [deadly.digest]
    now[0] = 90_000.0
    banned.check(deadly)
    compiler.close()


def test_one_crash_of_a_compilation_bans_nothing(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = end_at(monkeypatch, (), times=1)
    assert compiler.matcher(GRAMMAR).allowed((4,)).tolist() == [5]
    assert len(ended) == 1


def test_a_ban_is_lifted_while_the_edge_runs(tmp_path: Path) -> None:
    banned = BannedGrammars(tmp_path / "banned")
    banned.add(GRAMMAR)
    banned.add(SMALL)
    BannedGrammars(tmp_path / "banned").lift(GRAMMAR.digest)
    banned.check(GRAMMAR)
    with pytest.raises(GrammarBanned):
        banned.check(SMALL)


def test_a_ban_by_a_clock_that_was_a_year_ahead_is_over_with_the_clock(tmp_path: Path) -> None:
    now = [1e9 + 365 * 86_400.0]
    banned = BannedGrammars(tmp_path / "banned", lambda: now[0])
    banned.add(GRAMMAR)
    assert GRAMMAR.digest in banned.until()
    now[0] = 1e9
    assert banned.until() == {}
    banned.add(GRAMMAR)
    assert GRAMMAR.digest in banned.until()


def test_a_compilation_that_the_kernel_ends_bans_nothing(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        end_at(patch, (), signal.SIGKILL)
        with pytest.raises(GrammarBusy):
            compiler.matcher(GRAMMAR)
    assert compiler.matcher(GRAMMAR).allowed((4,)).tolist() == [5]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_no_generation_fails_whose_worker_ends(compiler: GrammarCompiler, number: int) -> None:
    matchers = [compiler.matcher(GRAMMAR) for _ in range(3)]
    for matcher in matchers:
        matcher.restore((4,))
    end_processes(grammar_processes(compiler), number)
    for matcher in matchers:
        with pytest.raises(GrammarNotReady):
            matcher.allowed((4, 5), patient=False)
    for matcher in matchers:
        matcher.restore((4, 5))
        assert matcher.allowed((4, 5), patient=False).tolist() == [1]


def test_a_request_that_ends_the_worker_and_then_a_process_of_its_own_ends_its_generation(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause, other = compiler.matcher(GRAMMAR), compiler.matcher(GRAMMAR)
    for each in (cause, other):
        each.restore((4,))
    with monkeypatch.context() as patch:
        ended = end_at(patch, (4, 5, 1))
        with pytest.raises(GrammarNotReady):
            cause.allowed((4, 5, 1), patient=False)
        other.restore((4,))
        with pytest.raises(GrammarNotReady):
            cause.allowed((4, 5, 1), patient=False)
        assert len(ended) == 1, "it ends no other worker"
        with pytest.raises(GrammarKilled):
            cause.restore((4, 5))
        assert len(set(ended)) == 2
        assert other.allowed((4, 5)).tolist() == [1]
    with pytest.raises(GrammarKilled):
        cause.allowed((4, 5))
    assert compiler.matcher(GRAMMAR).allowed((4,)).tolist() == [5], "the grammar is not banned"


@pytest.mark.parametrize(("number", "times"), [(signal.SIGSEGV, 1), (signal.SIGKILL, 2)])
def test_a_request_that_is_answered_in_a_process_of_its_own_goes_on(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    """Another request of that moment was the cause, or the kernel, which may end the process of its own too."""
    matcher = compiler.matcher(GRAMMAR)
    ended = end_at(monkeypatch, (4, 5), number, times=times)
    assert matcher.allowed((4, 5)).tolist() == [1]
    assert len(ended) == times
    assert matcher.allowed((4, 5), patient=False).tolist() == [1]


def test_a_generation_whose_workers_end_again_and_again_is_given_up(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compiler.matcher(GRAMMAR)
    ended = end_at(monkeypatch, (4, 5), signal.SIGKILL)
    with pytest.raises(GrammarError):
        matcher.allowed((4, 5))
    assert 1 < len(ended) < 10


def test_a_request_that_takes_too_much_time_is_ended_and_given_up(
    letters: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = letters.matcher(JSON_OBJECT)
    matcher.restore(())
    for name, limit_s in (("_STEP_S", 0.02), ("_TOKEN_S", 0.0), ("_COMPILE_S", 0.0)):
        monkeypatch.setattr(workers, name, limit_s)
    text = [LETTERS.index(letter) for letter in '{"a": "' + "Some text of a long answer. " * 4000]
    with pytest.raises(GrammarKilled) as found:
        matcher.restore(text)
    assert "SIGXCPU" in found.value.report


def test_a_worker_that_is_suspended_is_replaced_and_no_generation_is_the_cause(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compiler.matcher(GRAMMAR)
    matcher.restore((4,))
    (process,) = grammar_processes(compiler)
    process.suspend()
    until(lambda: process.status() == psutil.STATUS_STOPPED)  # until then its other threads answer
    monkeypatch.setattr(workers, "_PATIENCE", 1.0)
    with pytest.raises(GrammarNotReady):
        matcher.allowed((4, 5), patient=False)
    assert matcher.allowed((4, 5)).tolist() == [1]
    psutil.wait_procs([process], timeout=PATIENCE_S)
    assert not process.is_running()


def test_who_must_not_wait_does_not(letters: GrammarCompiler) -> None:
    """Nothing is compiled and no long text is replayed, and another grammar's compilation delays no mask."""
    matcher = letters.matcher(JSON_OBJECT)
    text = [LETTERS.index(letter) for letter in '{"a": "' + "Some text. " * 100]
    with pytest.raises(GrammarNotReady):
        matcher.allowed(text[:8], patient=False)
    matcher.restore(text[:8])
    with pytest.raises(GrammarNotReady):
        matcher.allowed(text, patient=False)
    assert len(matcher.allowed(text[:200], patient=False)) > 80

    def masks_beside_compiling(properties: int) -> int:
        schema = {f"p{number}": {"type": "string", "pattern": "^[ab]*a[ab]{9}$"} for number in range(properties)}
        large = letters.matcher(Grammar.json_schema({"properties": schema, "required": list(schema)}))
        compiling = threading.Thread(target=large.restore, args=((),))
        compiling.start()
        masks = 0
        while compiling.is_alive():
            matcher.allowed(text[: 8 + masks % 50], patient=False)
            masks += 1
        return masks

    # On a busy machine this thread may get no turn before a compilation ends; a mask that waits for one makes it 1.
    assert any(masks_beside_compiling(900 + attempt) > 10 for attempt in range(20))


def test_many_threads_get_the_same_answers_as_one(letters: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "ok": {"const": "certainly so"}}}
    grammars = [Grammar.json_schema({**schema, "title": str(number), "required": ["name", "ok"]}) for number in (0, 1)]
    text = [LETTERS.index(letter) for letter in '{"name": "' + "Bo" * 40 + '", "ok": "certainly so"}']

    def follow(number: int) -> list[tuple[list[int], tuple[int, ...]]]:
        matcher = letters.matcher(grammars[number % 2])
        return [(matcher.allowed(text[:end]).tolist(), matcher.forced(text[:end])) for end in range(len(text))]

    expected = follow(0)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(follow, range(24)))


@pytest.mark.timeout(300)
def test_two_thousand_generations_of_json_objects_run_at_once(letters: GrammarCompiler) -> None:
    text = tuple(LETTERS.index(letter) for letter in '{"a": "' + "Some text of an answer. " * 60)
    matchers = [letters.matcher(JSON_OBJECT, f"device-{number // 8}") for number in range(2000)]
    for length in (100, len(text)):
        for matcher in matchers:
            assert LETTERS.index('"') in matcher.allowed(text[:length])


class Cache:
    """A worker's cache, with a clock and memory of the test's own."""

    def __init__(self) -> None:
        self.now, self.used_kb = 0.0, 0
        self.cache = MatcherCache(NativeVocabulary(TOY.description()), lambda: self.used_kb, lambda: self.now)
        self.cache._vocabulary.encoder.set_caller(lambda text: list(TOY.encode_inside(text)))
        message = GRAMMAR.kind.value.encode() + b"\0" + GRAMMAR.text.encode()
        self.request = GrammarRequest(Op.ALLOWED, message)

    def follow(self, number: int, *, owner: int = 0, takes_kb: int = 0) -> None:
        self.used_kb += takes_kb
        assert self.answer(number, owner=owner, patient=True)[:1] == Status.DONE

    def answer(self, number: int, *, owner: int = 0, patient: bool = False) -> bytes:
        request = GrammarRequest(Op.ALLOWED, self.request.grammar, bytes([4, 0, 0, 0]), number, owner)
        return self.cache.answer(request, patient=patient)

    @property
    def followed(self) -> set[int]:
        return set(self.cache._followers)


def test_the_device_with_the_largest_part_of_the_memory_loses_its_matchers(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache()
    monkeypatch.setattr(worker, "_CACHE_KB", 1000)
    for number in range(8):
        cache.follow(number, owner=1, takes_kb=100)
    for number in range(8, 11):
        cache.follow(number, owner=number, takes_kb=60)
    assert cache.cache.limit()
    cache.follow(11, owner=8, takes_kb=60)
    monkeypatch.setattr(worker, "give_back_free_memory", lambda: setattr(cache, "used_kb", 240))
    assert cache.cache.limit()
    assert cache.followed == {8, 9, 10, 11}


def test_a_worker_that_cannot_free_enough_memory_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache()
    monkeypatch.setattr(worker, "_CACHE_KB", 1000)
    cache.follow(1, takes_kb=2000)
    assert not cache.cache.limit()
    assert cache.answer(1) == Status.NOT_READY, "its grammar is dropped too"


def test_matchers_that_are_not_used_are_dropped() -> None:
    cache = Cache()
    cache.follow(1)
    cache.now = 8.0
    cache.follow(2)
    cache.now = 12.0
    cache.cache.drop_idle()
    assert cache.followed == {2}
    assert cache.answer(1)[:1] == Status.DONE, "a short text is replayed at once"


def test_the_grammars_used_last_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache()
    monkeypatch.setattr(worker, "_GRAMMARS", 2)
    cache.follow(1)
    for text in ("t1 ", "t2 "):
        cache.answer(1)
        cache.cache.answer(GrammarRequest(Op.ALLOWED, b"regex\0" + text.encode(), number=7), patient=True)
    assert cache.answer(1)[:1] == Status.DONE
    first = GrammarRequest(Op.ALLOWED, b"regex\0t1 ", number=7)
    assert cache.cache.answer(first, patient=False) == Status.NOT_READY


def test_a_long_text_is_replayed_whatever_one_mask_may_take(letters: GrammarCompiler) -> None:
    matcher = letters.matcher(JSON_OBJECT)
    text = [LETTERS.index(letter) for letter in '{"a": "' + "Some text of a long answer. " * 4000]
    matcher.restore(text)
    assert LETTERS.index('"') in matcher.allowed(text, patient=False)
    with pytest.raises(OutsideGrammar) as found:
        matcher.allowed([*text[:500], len(LETTERS), *text[500:]])
    assert found.value.taken == 500


def pattern(text: str, length: int) -> Grammar:
    inner = {"type": "string", "pattern": text, "maxLength": length}
    return Grammar.json_schema(
        {"type": "object", "properties": {"p": inner}, "required": ["p"], "additionalProperties": False}
    )


@pytest.mark.parametrize(("words", "length"), [(49, 500), (8, 200)])
def test_counted_repetitions_of_words_are_followed(letters: GrammarCompiler, words: int, length: int) -> None:
    rng = random.Random(1)
    matcher, text = letters.matcher(pattern(rf"^(?:\S+\s+){{0,{words}}}\S+$", length)), list[int]()
    while len(text) < 60 and text[-1:] != [len(LETTERS)]:
        text.append(rng.choice(matcher.allowed(tuple(text)).tolist()))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [16, 17])
def test_two_hundred_generations_of_a_grammar_that_reaches_a_limit_of_its_lexer_never_show_it(
    letters: GrammarCompiler, count: int
) -> None:
    """Each letter of each text is a new state of this lexer, which fails at 50,000, for all generations."""
    rng = random.Random(1)
    grammar = Grammar.json_schema({"type": "array", "items": {"pattern": f"^[ab]*a[ab]{{{count}}}$", "type": "string"}})
    both = [LETTERS.index("a"), LETTERS.index("b")]
    begin = [LETTERS.index(letter) for letter in '["']
    for _ in range(200):
        matcher, text = letters.matcher(grammar), begin + rng.choices(both, k=1000)
        for length in range(len(begin), len(text), 250):
            assert set(both) <= set(matcher.allowed(tuple(text[:length])).tolist())


def test_a_lexer_at_its_limit_is_no_reason_to_refuse_a_token() -> None:
    """Another generation has brought it there at the same time; then it takes no token, and reports nothing."""
    vocabulary = NativeVocabulary(WORDS.description())
    vocabulary.encoder.set_caller(lambda text: list(WORDS.encode_inside(text)))
    cache = MatcherCache(vocabulary, lambda: 0)
    pattern = Grammar.json_schema({"type": "array", "items": {"pattern": "^[ab]*a[ab]{16}$", "type": "string"}})
    request = GrammarRequest(Op.ALLOWED, pattern.kind.value.encode() + b"\0" + pattern.text.encode(), number=1)
    assert cache.answer(request, patient=True)[:1] == Status.DONE
    rng, begin = random.Random(1), [LETTERS.index(letter) for letter in '["']
    both = [LETTERS.index("a"), LETTERS.index("b")]
    error = ""
    while not error:
        other = cache._grammars[request.grammar].deep_copy()
        other.try_consume_tokens(begin + rng.choices(both, k=1000))
        error = other.get_error()
    request = request._replace(tokens=array("I", [*begin, *rng.choices(both, k=20)]).tobytes(), number=2)
    assert cache.answer(request, patient=True)[:1] == Status.FAILED
    assert cache.answer(request, patient=True)[:1] == Status.DONE


def test_the_process_that_others_are_forked_from_is_replaced_when_it_ends(compiler: GrammarCompiler) -> None:
    running = compiler.matcher(GRAMMAR)
    running.restore((4,))
    end_processes([forking_process(compiler)])
    assert compiler.matcher(Grammar.regex("t1 t2 ")).allowed(()).tolist() == [1]
    assert running.allowed((4, 5)).tolist() == [1]


@pytest.mark.usefixtures("unbounded")
def test_closing_ends_all_processes_even_one_that_computes_endlessly(letters: GrammarCompiler) -> None:
    letters.matcher(SMALL).restore(())

    def compile_endlessly() -> None:
        with pytest.raises(GrammarError):
            letters.matcher(ENDLESS)

    trial = threading.Thread(target=compile_endlessly)
    trial.start()
    until(lambda: len(grammar_processes(letters)) == 2)
    processes = [forking_process(letters), *grammar_processes(letters)]
    letters.close()
    _, left = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not left
    trial.join()


def test_a_tokenizer_that_the_library_does_not_know_is_told() -> None:
    broken = GrammarTokenizer(file="{}", vocabulary=8, end_tokens=(0,))
    with pytest.raises(GrammarUnavailable):
        GrammarCompiler(lambda: broken).matcher(GRAMMAR)


def test_what_the_vocabulary_raises_is_told_and_the_grammar_is_compiled_again_later() -> None:
    words = list[str]()

    def encode(text: str) -> list[int]:
        words.append(text)
        if len(words) < 3:
            raise ValueError("not now")
        return [text.encode()[0]]

    pieces = [bytes([byte]) for byte in range(256)]
    compiler = GrammarCompiler(
        lambda: GrammarTokenizer(vocabulary=len(pieces), pieces=tuple(pieces), end_tokens=(0,), encode=encode)
    )
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
    compiler = GrammarCompiler(
        lambda: GrammarTokenizer(vocabulary=len(pieces), pieces=tuple(pieces), end_tokens=(0,), encode=encode)
    )
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

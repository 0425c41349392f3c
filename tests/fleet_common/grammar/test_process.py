import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from fleet_common.grammar.compiler import BannedGrammars, GrammarCompiler
from fleet_common.grammar.errors import (
    GrammarBanned,
    GrammarBusy,
    GrammarError,
    GrammarKilled,
    GrammarLost,
    GrammarUnavailable,
)
from fleet_common.grammar.process import (
    GrammarMatcher,
    GrammarProcess,
    GrammarTokenizer,
    WorkerLink,
)
from schemas.policy import Grammar, GrammarKind
from tests.support.random_grammars import random_bomb
from tests.support.toy_grammar import GRAMMAR
from tests.support.waiting import PATIENCE_S

LETTERS = [chr(code) for code in range(32, 127)]
WORDS = GrammarTokenizer.of_words([*LETTERS, "end"], end_tokens=[len(LETTERS)])
TOY = GrammarTokenizer.of_words([f"t{token} " for token in range(6)], end_tokens=[0])
SMALL = Grammar.regex("ab|ac")
SMALL_TOY = Grammar.regex("t2 ")
JSON_OBJECT = Grammar.json_object()


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


def matcher_of(process: GrammarProcess, grammar: Grammar) -> GrammarMatcher:
    again = partial(process.compile, grammar, grammar.text)
    return GrammarMatcher(again(), again)


def workers_of(use: Callable[[], object]) -> list[psutil.Process]:
    before = set(psutil.Process().children())
    use()
    return [each for each in psutil.Process().children() if each not in before]


def followers(compiler: GrammarCompiler, use: Callable[[], object] = lambda: None) -> list[psutil.Process]:
    """Return the processes that follow generations, of those that are started in `use` or were before."""
    use()
    (worker,) = (each for each in psutil.Process().children() if each.pid == pid_of(compiler))
    return [each for grammar in worker.children() for each in grammar.children()]


def pid_of(compiler: GrammarCompiler) -> int:
    process = compiler._process
    assert process is not None
    found = process._end.peek()
    assert found is not None
    return int(found[2][1].pid)


def signalled(processes: list[psutil.Process], number: int) -> None:
    for each in processes:
        each.send_signal(number)
    psutil.wait_procs(processes, timeout=PATIENCE_S)


@pytest.mark.parametrize("grammar", DEADLY.values(), ids=DEADLY)
def test_a_stack_overflow_ends_only_the_grammars_process(process: GrammarProcess, grammar: Grammar) -> None:
    other = matcher_of(process, SMALL)
    with pytest.raises(GrammarKilled) as found:
        process.compile(grammar, grammar.text)
    assert grammar.digest in found.value.report
    assert "SIG" in found.value.report
    assert other.allowed([LETTERS.index("a")]).tolist() == [LETTERS.index(c) for c in "bc"]
    assert process.compile(SMALL, SMALL.text).usable


@pytest.mark.timeout(120)
def test_a_grammar_that_compiles_for_minutes_is_given_up(process: GrammarProcess) -> None:
    endless = lark_chain(1800, '{}+ "a"')
    with pytest.raises(GrammarKilled):
        process.compile(endless, endless.text)


@pytest.mark.parametrize("grammar", DEADLY.values(), ids=DEADLY)
def test_the_shape_of_such_a_grammar_is_refused_before_any_process_sees_it(grammar: Grammar) -> None:
    def load() -> GrammarTokenizer:
        raise AssertionError("no vocabulary is needed")

    with pytest.raises(GrammarError):
        GrammarCompiler(load).matcher(grammar)


def test_a_grammar_that_ends_its_process_while_it_is_compiled_is_banned_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet_common.grammar.compiler.bounded_text", lambda grammar: grammar.text)
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


def test_a_compilation_that_the_kernel_ends_bans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(lambda: TOY)
    compiler.matcher(SMALL_TOY)
    exchange = WorkerLink.exchange

    def killed(link: WorkerLink, request: bytes | None, wait_s: float) -> tuple[bytes, int, int, bytes]:
        if request is not None:
            (worker,) = (each for each in psutil.Process().children() if each.pid == pid_of(compiler))
            signalled(worker.children(), signal.SIGKILL)
        return exchange(link, request, wait_s)

    with monkeypatch.context() as patch:
        patch.setattr(WorkerLink, "exchange", killed)
        with pytest.raises(GrammarBusy):
            compiler.matcher(GRAMMAR)
    assert compiler.matcher(GRAMMAR).allowed((4,)).tolist() == [5]
    compiler.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_no_generation_fails_whose_process_ends(number: int) -> None:
    compiler = GrammarCompiler(lambda: TOY)
    matchers = [compiler.matcher(GRAMMAR) for _ in range(3)]
    signalled(followers(compiler, lambda: [each.allowed((4,)) for each in matchers]), number)
    for matcher in matchers:
        assert follow(matcher, (4, 5)) == [1]
    assert compiler.matcher(GRAMMAR).allowed((4, 5)).tolist() == [1]
    compiler.close()


def test_a_generation_that_ends_the_process_that_it_has_for_itself_is_given_up() -> None:
    compiler = GrammarCompiler(lambda: TOY)
    guilty, innocent = compiler.matcher(GRAMMAR), compiler.matcher(GRAMMAR)
    innocent.allowed((4,))

    guilty.allowed((4,))
    signalled(followers(compiler), signal.SIGSEGV)
    with pytest.raises(GrammarLost):
        guilty.allowed((4, 5))
    guilty.restore((4,))
    assert guilty._link is not innocent._link
    signalled(followers(compiler), signal.SIGSEGV)
    for _ in range(2):
        with pytest.raises(GrammarKilled):
            guilty.allowed((4, 5))
    assert follow(innocent, (4, 5)) == [1]
    assert compiler.matcher(GRAMMAR).allowed((4,)).tolist() == [5], "the grammar is not banned"
    compiler.close()


def test_a_grammar_whose_own_process_is_killed_is_compiled_again() -> None:
    compiler = GrammarCompiler(lambda: TOY)
    running = compiler.matcher(GRAMMAR)
    (worker,) = (each for each in psutil.Process().children() if each.pid == pid_of(compiler))
    before = followers(compiler, lambda: running.allowed((4,)))
    signalled(worker.children(), signal.SIGKILL)
    assert running.allowed((4, 5)).tolist() == [1], "another process follows it"
    signalled(before, signal.SIGKILL)
    assert follow(running, (4, 5, 1)) == [1]
    assert follow(compiler.matcher(GRAMMAR), (4,)) == [5]
    compiler.close()


def follow(matcher: GrammarMatcher, text: tuple[int, ...]) -> list[int]:
    try:
        return matcher.allowed(text).tolist()
    except GrammarLost:
        matcher.restore(text)
        return matcher.allowed(text).tolist()


def test_a_process_follows_a_bounded_number_of_generations() -> None:
    compiler = GrammarCompiler(lambda: TOY)
    matchers = [compiler.matcher(GRAMMAR) for _ in range(70)]
    running = followers(compiler, lambda: [each.allowed((4,)) for each in matchers])
    assert len(running) == 3
    matchers.clear()
    _, left = psutil.wait_procs(running[:2], timeout=PATIENCE_S)
    assert not left
    compiler.close()


@pytest.mark.timeout(300)
def test_two_thousand_generations_of_json_objects_run_at_once() -> None:
    compiler = GrammarCompiler(lambda: WORDS)
    text = tuple(LETTERS.index(letter) for letter in '{"a": "' + "Some text of an answer. " * 60)
    matchers = [compiler.matcher(JSON_OBJECT, f"device-{number // 8}") for number in range(2000)]
    for length in (100, len(text)):
        for matcher in matchers:
            assert LETTERS.index('"') in follow(matcher, text[:length])
    compiler.close()


def test_a_generation_that_takes_much_memory_gets_a_process_for_itself_and_a_device_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fleet_common.grammar.compiler._MOST_OF_DEVICE_KB", 16 << 10)
    compiler = GrammarCompiler(lambda: WORDS)
    text = [LETTERS.index(letter) for letter in '{"a": "'] + [LETTERS.index("#")] * 40_000
    honest = compiler.matcher(JSON_OBJECT, "honest")
    honest.allowed(text[:7])
    heavy = list[GrammarMatcher]()

    def begin() -> None:
        heavy.append(compiler.matcher(JSON_OBJECT, "greedy"))
        heavy[-1].restore(text)

    with pytest.raises(GrammarBusy):
        [begin() for _ in range(20)]
    assert len({each._link for each in heavy}) > len(heavy) // 2
    assert honest._link is not None
    assert honest._link.memory_kb < 8 << 10
    compiler.matcher(JSON_OBJECT, "honest").restore(text)
    assert len(honest.allowed(text[:9])) > 80
    heavy.clear()
    compiler.matcher(JSON_OBJECT, "greedy").restore(text)
    compiler.close()


def test_devices_have_equal_parts_of_the_memory_of_all_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    most_kb = 32 << 10
    monkeypatch.setattr("fleet_common.grammar.compiler._MOST_KB", most_kb)
    compiler = GrammarCompiler(lambda: WORDS)
    text = [LETTERS.index(letter) for letter in '{"a": "'] + [LETTERS.index("#")] * 40_000
    heavy: dict[str, list[GrammarMatcher]] = {"one": [], "other": []}

    def begin(device: str) -> None:
        heavy[device].append(compiler.matcher(JSON_OBJECT, device))
        heavy[device][-1].restore(text)

    small = compiler.matcher(JSON_OBJECT, "small")
    small.allowed(text[:7])
    for _ in range(20):
        with suppress(GrammarBusy):
            begin("one")
    begin("other")  # it has less than a third
    parts_kb = {device: sum(each.cost_kb for each in matchers) for device, matchers in heavy.items()}
    assert parts_kb["one"] > most_kb / 3 > parts_kb["other"], "or nothing is shown"
    with pytest.raises(GrammarBusy):
        begin("one")
    assert len(compiler.matcher(JSON_OBJECT, "small").allowed(text[:9])) > 80
    heavy["one"].clear()
    begin("one")
    compiler.close()


def test_a_long_text_is_replayed_in_pieces_whatever_one_request_may_take() -> None:
    compiler = GrammarCompiler(lambda: WORDS)
    matcher = compiler.matcher(JSON_OBJECT)
    text = [LETTERS.index(letter) for letter in '{"a": "' + "Some text of a long answer. " * 4000]
    matcher.restore(text)
    assert LETTERS.index('"') in matcher.allowed(text)
    compiler.close()


def pattern(text: str, length: int) -> Grammar:
    inner = {"type": "string", "pattern": text, "maxLength": length}
    return Grammar.json_schema(
        {"type": "object", "properties": {"p": inner}, "required": ["p"], "additionalProperties": False}
    )


@pytest.mark.parametrize(("words", "length"), [(49, 500), (8, 200)])
def test_counted_repetitions_of_words_are_followed(words: int, length: int) -> None:
    rng = random.Random(1)
    compiler = GrammarCompiler(lambda: WORDS)
    matcher, text = compiler.matcher(pattern(rf"^(?:\S+\s+){{0,{words}}}\S+$", length)), list[int]()
    while len(text) < 60 and text[-1:] != [len(LETTERS)]:
        text.append(rng.choice(follow(matcher, tuple(text))))
    compiler.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("count", "generations"), [(16, 32), (17, 1000)], ids=["retired", "replaced"])
def test_two_hundred_generations_of_a_grammar_that_wears_out_never_show_it(
    count: int, generations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each letter of each text is a new state of this lexer, which fails at 50,000."""
    monkeypatch.setattr("fleet_common.grammar.process._GENERATIONS", generations)
    rng = random.Random(1)
    compiler = GrammarCompiler(lambda: WORDS)
    grammar = Grammar.json_schema({"type": "array", "items": {"pattern": f"^[ab]*a[ab]{{{count}}}$", "type": "string"}})
    letters = [LETTERS.index("a"), LETTERS.index("b")]
    begin = [LETTERS.index(letter) for letter in '["']
    for _ in range(200):
        matcher, text = compiler.matcher(grammar), begin + rng.choices(letters, k=1000)
        for length in range(len(begin), len(text), 250):
            assert set(letters) <= set(follow(matcher, tuple(text[:length])))
    compiler.close()


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
        matchers.append(matcher_of(process, GRAMMAR))

    before = {child for each in psutil.Process().children() for child in each.children()}
    use()
    after = {child for each in psutil.Process().children() for child in each.children()}
    assert len(after - before) == 1
    process.close()
    assert matchers[0].allowed((4,)).tolist() == [5]
    matchers.clear()
    _, left = psutil.wait_procs(after - before, timeout=PATIENCE_S)
    assert not left


def test_a_tokenizer_that_the_library_does_not_know_is_told() -> None:
    broken = GrammarTokenizer(file="{}", vocabulary=8, end_tokens=(0,))
    with pytest.raises(GrammarUnavailable):
        GrammarProcess(broken)


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

import threading
from collections.abc import Callable

import numpy as np
import pytest

from dssd.verification import Judgement
from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarKilled
from fleet_common.grammar.process import CompiledGrammar, GrammarProcess, GrammarTokenizer, WorkerEnded
from fleet_edge.errors import OpenRefused
from fleet_edge.sessions.grammars import Constraint, Grammars, PreparedGrammar
from schemas.messages import Open
from schemas.policy import Grammar, SamplingPolicy
from schemas.reasons import RefusalCode
from schemas.vocabulary import Vocabulary
from tests.support.toy_grammar import GRAMMAR

WORDS = [f"t{token} " for token in range(6)]


def message(grammar: Grammar = GRAMMAR, *, session: bytes = b"12345678", resume: tuple[int, ...] | None = None) -> Open:
    return Open(
        session=session, vocabulary=Vocabulary.of(WORDS), draft_model="", quantization="",
        policy=SamplingPolicy(grammar=grammar), prompt=(1,), max_new_tokens=8, resume=resume,
    )  # fmt: skip


class Gated(GrammarCompiler):
    def __init__(self) -> None:
        super().__init__(lambda: GrammarTokenizer.of_words(WORDS, end_tokens=[0]))
        self.gate = threading.Semaphore(0)
        self.asked: list[Grammar] = []

    def compiled(self, grammar: Grammar) -> CompiledGrammar:
        self.asked.append(grammar)
        self.gate.acquire()
        return super().compiled(grammar)


class Edge:
    def __init__(self, compiler: GrammarCompiler | None = None) -> None:
        self.calls: list[Callable[[], None]] = []
        self.results: list[PreparedGrammar] = []
        found = compiler or GrammarCompiler(lambda: GrammarTokenizer.of_words(WORDS, end_tokens=[0]))
        self.grammars = Grammars(found, self.calls.append, most_per_device=4)

    def prepare(self, asked: Open, device: str = "a") -> None:
        self.grammars.prepare(device, asked, self.results.append)

    def settle(self) -> None:
        if self.grammars._pool is not None:
            self.grammars._pool.shutdown()
            self.grammars._pool = None
        while self.calls:
            self.calls.pop(0)()


def test_a_grammar_is_prepared_once_and_there_at_once_from_then_on() -> None:
    edge = Edge()
    assert edge.grammars.at_once("a", message()) is None
    edge.prepare(message())
    assert edge.grammars.waits("a", message())
    edge.settle()
    assert isinstance(edge.results[0].found, Constraint)
    assert edge.results[0].seconds > 0.0
    assert not edge.grammars.waits("a", message())
    first, second = edge.grammars.at_once("a", message()), edge.grammars.at_once("a", message())
    assert first.matcher is not second.matcher


def test_a_known_grammar_begins_a_session_without_its_process() -> None:
    """The thread that answers devices never waits for a mask."""
    edge = Edge()
    edge.prepare(message())
    edge.settle()
    assert isinstance(edge.results[0].found, Constraint)
    compiled = edge.results[0].found.matcher._compiled
    with compiled.link._lock:  # its process is asked for nothing
        found = edge.grammars.at_once("a", message())
        assert found.matcher.allowed(()).tolist() == compiled.first_allowed.tolist()
        assert found.next_forced((), 8) == compiled.first_forced
    assert edge.grammars.at_once("a", message(resume=(1,))) is None


def end_by_timeout(compiled: CompiledGrammar) -> None:
    with pytest.raises(WorkerEnded):
        compiled.link.exchange(None, 1e-3)  # it has nothing to answer


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Threads that have compiled a grammar."""
    found = list[threading.Thread]()
    compile_it = GrammarProcess.compile

    def recorded(self: GrammarProcess, grammar: Grammar, text: str) -> CompiledGrammar:
        found.append(threading.current_thread())
        return compile_it(self, grammar, text)

    monkeypatch.setattr(GrammarProcess, "compile", recorded)
    return found


def test_a_grammar_whose_process_was_silent_is_compiled_again_on_another_thread(
    compiling: list[threading.Thread],
) -> None:
    edge = Edge()
    edge.prepare(message())
    edge.settle()
    assert isinstance(edge.results[0].found, Constraint)
    end_by_timeout(edge.results[0].found.matcher._compiled)
    assert edge.grammars.at_once("a", message()) is None
    edge.prepare(message())
    edge.settle()
    assert isinstance(edge.results[1].found, Constraint)
    assert len(compiling) == 2
    assert threading.current_thread() not in compiling


def test_nor_does_the_thread_that_answers_devices_compile_if_the_process_ends_meanwhile(
    compiling: list[threading.Thread],
) -> None:
    class Ending(GrammarCompiler):
        def known(self, grammar: Grammar) -> CompiledGrammar | None:
            found = super().known(grammar)
            if found is not None:
                end_by_timeout(found)
            return found

    edge = Edge(Ending(lambda: GrammarTokenizer.of_words(WORDS, end_tokens=[0])))
    edge.prepare(message())
    edge.settle()
    found = edge.grammars.at_once("a", message())
    assert found is not None
    assert found.next_forced((), 8) == found.matcher.forced(())
    assert len(compiling) == 1
    found.restore((4,))  # as on another thread
    assert found.matcher.allowed((4,)).tolist() == [5]


@pytest.mark.parametrize("grammar", [Grammar.regex("("), Grammar.lark("start: x")])
def test_one_that_cannot_be_used_is_refused(grammar: Grammar) -> None:
    edge = Edge()
    edge.prepare(message(grammar))
    edge.settle()
    found = edge.results[0].found
    assert isinstance(found, OpenRefused)
    assert found.code is RefusalCode.GRAMMAR
    with pytest.raises(OpenRefused):
        edge.grammars.at_once("a", message(grammar))


@pytest.mark.parametrize(("resume", "granted"), [((), True), ((1, 3), True), ((1, 1), False), ((2, 3, 1, 4), False)])
def test_a_text_is_resumed_if_it_is_one_of_the_grammars(resume: tuple[int, ...], *, granted: bool) -> None:
    edge = Edge()
    edge.prepare(message(resume=resume))
    edge.settle()
    assert isinstance(edge.results[0].found, Constraint) is granted


def test_what_must_follow_a_resumed_text_is_known_at_once() -> None:
    edge = Edge()
    edge.prepare(message(resume=(4,)))
    edge.settle()
    found = edge.results[0].found
    assert isinstance(found, Constraint)
    assert found.next_forced((4,), 8) == (5, 1, 1)
    assert found.next_forced((4,), 2) == (5, 1)
    assert found.next_forced((4, 5), 8) == ()


def test_rows_are_cut_to_what_the_grammar_allows_and_forced_tokens_are_counted() -> None:
    edge = Edge()
    edge.prepare(message())
    edge.settle()
    found = edge.results[0].found
    assert isinstance(found, Constraint)
    policy, row = SamplingPolicy(seed=1, top_p=1.0), np.array([9.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=np.float32)
    rows = [found.shape(row, policy, text=text).ids.tolist() for text in ((), (4,), (4, 5))]
    assert (sorted(rows[0]), rows[1:]) == ([1, 2, 3, 4, 5], [[5], [1]])
    assert found.count(Judgement(1, rejected=False, token=5)).forced == (1,)
    with pytest.raises(ValueError, match="grammar"):
        found.shape(np.full(6, -np.inf, dtype=np.float32), policy, text=())
    assert found.failure


def test_of_a_session_that_is_closed_meanwhile_only_the_cost_is_told() -> None:
    edge = Edge()
    edge.prepare(message())
    edge.grammars.forget("a", message().session)
    edge.settle()
    assert edge.results[0].found is None
    assert edge.results[0].seconds > 0.0


def test_a_grammar_that_ends_its_process_is_told_by_its_digest() -> None:
    class Deadly(GrammarCompiler):
        def compiled(self, grammar: Grammar) -> CompiledGrammar:
            raise GrammarKilled(grammar.digest, "SIGSEGV")

    edge = Edge(Deadly(lambda: GrammarTokenizer.of_words(WORDS, end_tokens=[0])))
    edge.prepare(message())
    edge.settle()
    assert GRAMMAR.digest in edge.results[0].killed
    assert isinstance(edge.results[0].found, OpenRefused)


def test_a_device_has_few_grammars_prepared_at_a_time_and_keeps_no_other_from_it() -> None:
    edge = Edge()
    for number in range(4):
        edge.prepare(message(session=bytes([number]) * 8))
    with pytest.raises(OpenRefused) as refused:
        edge.prepare(message(session=b"another!"))
    assert refused.value.code is RefusalCode.BUSY
    edge.prepare(message(), device="b")
    edge.settle()
    assert len(edge.results) == 5


def test_another_devices_grammar_waits_for_none_of_those_that_a_device_has_waiting() -> None:
    compiler = Gated()
    edge = Edge(compiler)
    patterns = [Grammar.regex("t1 " * number) for number in range(1, 6)]
    for number, grammar in enumerate(patterns[:4]):
        edge.prepare(message(grammar, session=bytes([number]) * 8))
    edge.prepare(message(patterns[4]), device="b")
    compiler.gate.release(5)
    edge.settle()
    assert compiler.asked[0] == patterns[0]
    assert compiler.asked.index(patterns[4]) == 1, "one of a device is compiled at a time, and the other's beside it"
    assert compiler.asked.index(patterns[1]) < compiler.asked.index(patterns[2]) < compiler.asked.index(patterns[3])


def test_an_engine_that_does_not_know_whole_rows_refuses_by_name() -> None:
    with pytest.raises(OpenRefused) as refused:
        Grammars().at_once("a", message())
    assert refused.value.code is RefusalCode.GRAMMAR

import threading
from collections.abc import Callable

import numpy as np
import pytest

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarKilled
from fleet_common.grammar.matcher import CompiledGrammar
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.grammar.workers import GrammarWorkers
from fleet_edge.errors import OpenRefused
from fleet_edge.sessions.grammars import Constraint, Grammars, PreparedGrammar
from sampling.verification import Judgement
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
        self.compiler = found
        self.grammars = Grammars(found, self.calls.append, max_per_device=4)

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


def test_a_known_grammar_begins_a_session_without_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that answers devices never waits for a mask."""
    edge = Edge()
    edge.prepare(message())
    edge.settle()
    assert isinstance(edge.results[0].found, Constraint)

    def ask(*_: object, **__: object) -> bytes:
        raise AssertionError("a process is asked")

    monkeypatch.setattr(GrammarWorkers, "ask", ask)
    monkeypatch.setattr(GrammarWorkers, "try_alone", ask)
    found = edge.grammars.at_once("a", message())
    assert found.matcher.allowed(()).tolist() == [1, 2, 3, 4, 5]
    assert edge.grammars.at_once("a", message(resume=(1,))) is None


def test_the_worker_follows_a_session_before_its_first_step() -> None:
    edge = Edge()
    edge.prepare(message())
    edge.settle()
    found = edge.results[0].found
    assert isinstance(found, Constraint)
    assert found.matcher.allowed((4,), patient=False).tolist() == [5]


def test_a_session_whose_worker_has_ended_is_not_ready_until_it_is_restored() -> None:
    edge = Edge()
    edge.prepare(message())
    edge.settle()
    found = edge.results[0].found
    assert isinstance(found, Constraint)
    edge.compiler.close()
    with pytest.raises(ValueError, match="again"):
        found.shape(np.zeros(6, dtype=np.float32), SamplingPolicy(seed=1), text=(4,))
    assert not found.ready
    edge.grammars.restore("a", found, (4,))
    edge.settle()
    assert found.ready
    assert found.next_forced((4,), 8) == (5, 1, 1)
    assert found.shape(np.zeros(6, dtype=np.float32), SamplingPolicy(seed=1), text=(4,)).ids.tolist() == [5]


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

from collections.abc import Callable
from typing import Any

import pytest

from fleet_edge.errors import OpenRefused
from fleet_edge.sessions.constraint import Constraint
from fleet_edge.sessions.grammars import Grammars
from fleet_runtime.grammar.compiler import GrammarCompiler
from fleet_runtime.grammar.tokenizer import GrammarTokenizer
from schemas.grammar import Grammar
from schemas.messages import Open
from schemas.policy import SamplingPolicy
from schemas.reasons import RefusalCode
from schemas.vocabulary import Vocabulary
from tests.support.toy_grammar import GRAMMAR

WORDS = [f"t{token} " for token in range(6)]


def message(grammar: Grammar = GRAMMAR, *, session: bytes = b"12345678", resume: tuple[int, ...] | None = None) -> Open:
    return Open(
        session=session, vocabulary=Vocabulary.of(WORDS), draft_model="", quantization="",
        policy=SamplingPolicy(grammar=grammar), prompt=(1,), max_new_tokens=8, resume=resume,
    )  # fmt: skip


class Edge:
    """Grammars, and what was told of them; calls are made when they are asked for."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.told: list[Any] = []
        compiler = GrammarCompiler(lambda: GrammarTokenizer.of_words(WORDS, end_tokens=[0]))
        self.grammars = Grammars(compiler, self.calls.append)

    def prepare(self, asked: Open, device: str = "a") -> None:
        self.grammars.prepare(device, asked, self.told.append)

    def settle(self) -> None:
        """Wait for what is being prepared, and make the calls."""
        if self.grammars._pool is not None:
            self.grammars._pool.submit(lambda: None).result()
        while self.calls:
            self.calls.pop(0)()


def test_a_grammar_is_prepared_once_and_there_at_once_from_then_on() -> None:
    edge = Edge()
    assert edge.grammars.at_once(message()) is None
    edge.prepare(message())
    assert edge.grammars.waits("a", message())
    edge.settle()
    assert isinstance(edge.told[0], Constraint)
    assert not edge.grammars.waits("a", message())
    first, second = edge.grammars.at_once(message()), edge.grammars.at_once(message())
    assert first is not None
    assert second is not None
    assert first.matcher is not second.matcher


@pytest.mark.parametrize("grammar", [Grammar.regex("("), Grammar.lark("start: x")])
def test_one_that_cannot_be_used_is_refused(grammar: Grammar) -> None:
    edge = Edge()
    edge.prepare(message(grammar))
    edge.settle()
    assert edge.told[0].code is RefusalCode.GRAMMAR
    assert str(edge.told[0]).startswith("The grammar cannot be used")


@pytest.mark.parametrize(("resume", "granted"), [((), True), ((1, 3), True), ((1, 1), False), ((2, 3, 1, 4), False)])
def test_a_text_is_resumed_if_it_is_one_of_the_grammars(resume: tuple[int, ...], *, granted: bool) -> None:
    edge = Edge()
    edge.prepare(message(resume=resume))
    edge.settle()
    assert isinstance(edge.told[0], Constraint) is granted
    if granted:
        assert edge.grammars.at_once(message(resume=resume)) is not None
    else:
        with pytest.raises(OpenRefused, match="rules out"):
            edge.grammars.at_once(message(resume=resume))


def test_a_session_that_is_closed_meanwhile_is_told_nothing() -> None:
    edge = Edge()
    edge.prepare(message())
    edge.grammars.forget("a", message().session)
    edge.settle()
    assert edge.told == []


def test_a_device_has_few_grammars_prepared_at_a_time_and_keeps_no_other_from_it() -> None:
    edge = Edge()
    for number in range(4):
        edge.prepare(message(session=bytes([number]) * 8))
    with pytest.raises(OpenRefused) as refused:
        edge.prepare(message(session=b"another!"))
    assert refused.value.code is RefusalCode.BUSY
    edge.prepare(message(), device="b")
    edge.settle()
    assert len(edge.told) == 5


def test_an_engine_that_does_not_know_whole_rows_refuses_by_name() -> None:
    with pytest.raises(OpenRefused, match="response_format, tools, grammar") as refused:
        Grammars().at_once(message())
    assert refused.value.code is RefusalCode.GRAMMAR

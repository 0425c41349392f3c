import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from fleet_cli.device_chat import Conversation
from fleet_device.errors import EdgeUnavailable, SessionRefused
from fleet_device.requests.chat import ChatHistory
from fleet_device.requests.generate import GeneratedText, generate_text
from fleet_device.requests.prompt import TextOptions
from schemas.reasons import EndReason, RefusalCode
from tests.support.memory_device import ScriptedAgent, TalkingDrafter
from tests.support.scripted_talker import ScriptedTalker

Line = str | BaseException | Callable[[], str]


class Script:
    def __init__(self, *lines: Line) -> None:
        self._lines = list(lines)
        self.shown = ""
        self.notes: list[str] = []

    def read(self) -> str | None:
        if not self._lines:
            return None
        line = self._lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line if isinstance(line, str) else line()

    def write(self, text: str) -> None:
        self.shown += text

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


@pytest.fixture
def talkers() -> Iterator[list[ScriptedTalker]]:
    made: list[ScriptedTalker] = []
    yield made
    for talker in made:
        talker.close()


Talk = Callable[..., Script]


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Handle SIGINT as at a terminal; tests that run in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def talk(talkers: list[ScriptedTalker]) -> Talk:
    def run(
        *lines: Line,
        agent: ScriptedAgent | None = None,
        context: int = 4096,
        answer_tokens: int = 10,
    ) -> Script:
        talkers.append(ScriptedTalker(agent, TalkingDrafter(context=context)))
        script = Script(*lines)
        Conversation(talkers[-1], script, None, ChatHistory(), answer_tokens=answer_tokens).run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return script

    return run


def test_the_options_of_a_chat_count_for_each_answer(talkers: list[ScriptedTalker]) -> None:
    talkers.append(ScriptedTalker())
    script, options = Script("Hi", "And?"), TextOptions(min_p=0.25)
    Conversation(talkers[-1], script, None, ChatHistory(), answer_tokens=10, options=options).run()
    assert [each["policy"].min_p for each in talkers[-1].agent.asked] == [0.25, 0.25]


def asked(talker: ScriptedTalker, turn: int) -> list[str]:
    return [f"{message.role}:{message.content}" for message in talker.asked[turn]]


def test_each_answer_goes_with_the_next_message(talk: Talk, talkers: list[ScriptedTalker]) -> None:
    script = talk("t1", "", "  t2 ")
    assert script.shown == "t1 t2 t3 \n" * 2
    assert script.notes == []
    assert asked(talkers[0], 0) == ["user:t1"]
    assert asked(talkers[0], 1) == ["user:t1", "assistant:t1 t2 t3 ", "user:t2"]


def test_commands_set_the_system_s_message_forget_and_end(talk: Talk, talkers: list[ScriptedTalker]) -> None:
    script = talk(
        "/system be kind", "t1", "/reset", "/system", "t2", "/system -", "t3", "//help", "/quit", "never asked"
    )  # fmt: skip
    turns = [asked(talkers[0], turn) for turn in range(4)]
    assert turns[0] == ["system:be kind", "user:t1"]
    assert turns[1] == ["system:be kind", "user:t2"]
    assert turns[2][0] == "user:t2"
    assert turns[3][-1] == "user:/help"
    assert len(talkers[0].asked) == 4
    assert "[The conversation is empty.]" in script.notes
    assert script.notes.count("[The system's message is: be kind]") == 2
    assert "[There is no system's message.]" in script.notes


def test_turns_that_the_context_cannot_hold_are_dropped_with_a_note(talk: Talk, talkers: list[ScriptedTalker]) -> None:
    script = talk("t1", "t2", "t3", context=20)  # half of it is the answers'; a turn has six words of the template
    assert asked(talkers[0], 2) == ["user:t2", "assistant:t1 t2 t3 ", "user:t3"]
    assert script.notes == [
        "[The oldest turn is no longer part of the conversation, which is longer than the context.]"
    ]


def test_where_the_large_model_holds_less_turns_are_dropped_too(talk: Talk, talkers: list[ScriptedTalker]) -> None:
    agent = ScriptedAgent()

    def refuse() -> str:
        agent.error, agent.batches = SessionRefused(RefusalCode.PROMPT_TOO_LONG, "Too long."), ()
        return "t2"

    script = talk("t1", refuse, agent=agent)
    assert [len(messages) for messages in talkers[0].asked] == [1, 3, 1]
    assert script.notes[-1] == "[Too long.]"


def test_a_text_that_fails_is_told_and_the_next_one_is_written(talk: Talk, talkers: list[ScriptedTalker]) -> None:
    agent = ScriptedAgent(batches=(), error=EdgeUnavailable("No edge \x1b[2J is there."))

    def mend() -> str:
        agent.error, agent.batches = None, ((1,),)
        return "t2"

    script = talk("t1", mend, agent=agent)
    assert script.notes == ["[No edge \ufffd[2J is there.]"]
    assert script.shown == "t1 \n"
    assert asked(talkers[0], 1) == ["user:t2"]


def test_an_answer_of_which_the_end_was_taken_back_is_shown_as_it_is_now(
    talk: Talk, talkers: list[ScriptedTalker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mended(*given: Any, **named: Any) -> GeneratedText:
        return replace(generate_text(*given, **named), text="t1 t2 t4 \x1b")

    monkeypatch.setattr("tests.support.scripted_talker.generate_text", mended)
    script = talk("t1", "t2")
    assert script.shown == "t1 t2 t3 \nt1 t2 t4 \ufffd\n" * 2
    assert script.notes == ["[Unverified tokens were taken back; the whole answer is now:]"] * 2
    assert asked(talkers[0], 1)[1] == "assistant:t1 t2 t4 \x1b"


class Interrupting(Script):
    def write(self, text: str) -> None:
        if not self.shown:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        super().write(text)


def test_an_interrupt_stops_the_answer_and_keeps_what_there_is(talkers: list[ScriptedTalker]) -> None:
    agent = ScriptedAgent(batches=[(1, 2), (3,)], gate=threading.Semaphore(1))

    def let_go() -> str:
        agent.gate = None
        return "t2"

    talkers.append(ScriptedTalker(agent))
    script = Interrupting("t1", let_go)
    Conversation(talkers[0], script, None, ChatHistory(), answer_tokens=10).run()
    assert script.shown == "t1 t2 \nt1 t2 t3 \n"
    assert script.notes == ["[Stopped.]"]
    assert agent.ended == [EndReason.CANCELLED, EndReason.STOP]
    assert asked(talkers[0], 1) == ["user:t1", "assistant:t1 t2 ", "user:t2"]


def test_an_interrupt_at_the_prompt_ends_nothing(talk: Talk) -> None:
    script = talk(KeyboardInterrupt(), "t1")
    assert script.notes == ["\n[Ctrl-D or /quit ends the chat.]"]
    assert script.shown == "t1 t2 t3 \n"

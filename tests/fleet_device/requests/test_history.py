"""What of a conversation is sent with a new message."""

from collections.abc import Sequence

import pytest

from fleet_device.errors import PromptTooLong
from fleet_device.requests.chat import ChatHistory, ChatMessage


def words(messages: Sequence[ChatMessage]) -> int:
    return sum(len(message.content.split()) for message in messages)


def contents(messages: Sequence[ChatMessage]) -> list[str]:
    return [f"{message.role[0]}:{message.content}" for message in messages]


def talked(turns: int, system: str = "") -> ChatHistory:
    history = ChatHistory(system)
    for turn in range(turns):
        history.answered(f"q{turn}", f"a{turn} b{turn}")
    return history


def test_all_that_was_said_goes_with_a_new_message() -> None:
    history = talked(2, "be kind")
    messages, dropped = history.ask("q2", count=words, room=100, drop=True)
    assert contents(messages) == ["s:be kind", "u:q0", "a:a0 b0", "u:q1", "a:a1 b1", "u:q2"]
    assert (dropped, history.turns, history.prompt_tokens) == (0, 2, 9)


@pytest.mark.parametrize(
    ("room", "dropped"),
    [
        (15, 0),  # 2 words of the system, 4 turns of 3, and one more
        (14, 2),  # 9 words fill three quarters of the room at most, 12 do not
        (8, 3),
        (6, 3),  # three quarters would be none, and one turn is better than none
        (5, 4),
    ],
)
def test_the_oldest_turns_are_dropped_some_at_a_time_and_the_system_s_message_stays(room: int, dropped: int) -> None:
    history = talked(4, "be kind")
    messages, told = history.ask("q4", count=words, room=room, drop=True)
    kept = [content for turn in range(dropped, 4) for content in (f"u:q{turn}", f"a:a{turn} b{turn}")]
    assert contents(messages) == ["s:be kind", *kept, "u:q4"]
    assert (told, history.turns, history.prompt_tokens) == (dropped, 4 - dropped, words(messages))


def test_after_a_drop_the_next_turns_keep_the_beginning() -> None:
    history, drops = talked(6), 0
    for turn in range(20):
        _, dropped = history.ask(f"q{turn}", count=words, room=25, drop=True)
        history.answered(f"q{turn}", "a b")
        drops += dropped > 0
    assert drops <= 7  # not 20


@pytest.mark.parametrize(("turns", "drop", "words_of"), [(4, False, "begin a new one"), (4, True, "shorten it")])
def test_what_is_too_long_all_the_same_is_refused_and_nothing_is_dropped(turns: int, drop: bool, words_of: str) -> None:
    history = talked(turns)
    question = "w " * 9 if drop else "q"
    with pytest.raises(PromptTooLong, match=words_of):
        history.ask(question, count=words, room=8, drop=drop)
    assert history.turns == turns


def test_a_conversation_begins_anew_and_loses_its_oldest_turn_when_told_to() -> None:
    history = talked(2)
    assert history.drop_oldest()
    assert history.turns == 1
    history.reset()
    assert not history.drop_oldest()
    assert contents(history.ask("q", count=words, room=1, drop=False)[0]) == ["u:q"]

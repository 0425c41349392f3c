import threading
from collections.abc import Callable, Iterator

import pytest

from fleet_device.errors import EdgeUnavailable, RequestTimeout, TextCancelled
from fleet_device.requests.generate import GenerateRequest, Piece
from fleet_device.requests.queue import TextStream
from fleet_device.requests.template import ChatError
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason
from tests.fleet_device.requests.conftest import Make, gated, open_gate
from tests.support.memory_device import ScriptedAgent
from tests.support.waiting import PATIENCE_S, until

REQUEST = GenerateRequest((1, 2), SamplingPolicy(seed=1), 4)


def test_a_stream_gives_the_pieces_and_then_the_whole_text(make: Make) -> None:
    stream = TextStream(make(ScriptedAgent()), lambda: REQUEST)
    assert list(stream) == ["t1 t2 ", "t3 "]
    assert list(stream) == []
    assert stream.result().text == "t1 t2 t3 "
    assert stream.request() is REQUEST


def test_pieces_tell_their_tokens_also_where_they_complete_no_text(make: Make) -> None:
    agent = ScriptedAgent(batches=[(1,), (), (2, 3)])
    stream = TextStream(make(agent), lambda: REQUEST)
    assert list(stream.pieces()) == [Piece("t1 ", 1), Piece("", 0), Piece("t2 t3 ", 2)]


@pytest.mark.parametrize("pieces", [TextStream.__iter__, TextStream.pieces])
def test_leaving_the_loop_gives_the_text_up_while_the_stream_is_kept(
    make: Make, pieces: Callable[[TextStream], Iterator[object]]
) -> None:
    agent = gated()
    open_gate(agent, 1)
    stream = TextStream(make(agent), lambda: REQUEST)
    for _ in pieces(stream):
        break
    until(lambda: agent.ended == [EndReason.CANCELLED])
    assert stream.result().text == "t1 t2 "


def test_a_text_that_takes_too_long_is_given_up_and_what_there_is_of_it_is_kept(make: Make) -> None:
    agent, now = gated(), [0.0]
    open_gate(agent, 1)
    stream = TextStream(make(agent), lambda: REQUEST, timeout=5.0, clock=lambda: now[0])
    assert next(stream) == "t1 t2 "
    now[0] = 5.0
    with pytest.raises(RequestTimeout, match="5 s"):
        stream.result()
    until(lambda: agent.ended == [EndReason.CANCELLED])
    assert stream.result().text == "t1 t2 "


def test_what_has_come_in_time_is_read_later(make: Make) -> None:
    now = [0.0]
    stream = TextStream(make(ScriptedAgent()), lambda: REQUEST, timeout=5.0, clock=lambda: now[0])
    stream.result()
    now[0] = 9.0
    assert stream.result().text == "t1 t2 t3 "


def test_a_stream_that_is_closed_gives_nothing_more(make: Make) -> None:
    agent = gated()
    open_gate(agent, 1)
    stream = TextStream(make(agent), lambda: REQUEST)
    assert next(stream) == "t1 t2 "
    stream.close()
    stream.close()
    assert list(stream) == []
    until(lambda: agent.ended == [EndReason.CANCELLED])


def test_a_text_cancelled_by_another_thread_ends_where_it_is(make: Make) -> None:
    agent = gated()
    open_gate(agent, 1)
    stream = TextStream(make(agent), lambda: REQUEST)
    assert next(stream) == "t1 t2 "
    threading.Thread(target=stream.cancel).start()
    assert list(stream) == []
    text = stream.result()
    assert (text.text, text.reason) == ("t1 t2 ", EndReason.CANCELLED)


def test_a_text_cancelled_while_it_waits_leaves_the_queue(make: Make) -> None:
    agent = gated()
    texts = make(agent)
    first, second = TextStream(texts, lambda: REQUEST), TextStream(texts, lambda: REQUEST)
    assert agent.started.wait(PATIENCE_S)
    second.close()
    assert texts.waiting == 0
    assert list(second) == []
    with pytest.raises(TextCancelled):
        second.result()
    open_gate(agent)
    assert "".join(first) == "t1 t2 t3 "


def test_a_text_that_others_give_up_is_a_failure(make: Make) -> None:
    agent = gated()
    texts = make(agent)
    open_gate(agent, 1)
    stream = TextStream(texts, lambda: REQUEST)
    assert next(stream) == "t1 t2 "
    texts.abandon()
    with pytest.raises(TextCancelled):
        list(stream)
    with pytest.raises(TextCancelled):
        stream.result()


def test_a_failure_is_raised_after_the_pieces_before_it(make: Make) -> None:
    stream = TextStream(make(ScriptedAgent(error=EdgeUnavailable("nobody there"))), lambda: REQUEST)
    assert next(stream) == "t1 t2 "
    assert next(stream) == "t3 "
    for _ in range(2):
        with pytest.raises(EdgeUnavailable, match="nobody there"):
            next(stream)
    with pytest.raises(EdgeUnavailable, match="nobody there"):
        stream.result()


def test_a_prompt_that_cannot_be_encoded_is_a_failure(make: Make) -> None:
    def prepare() -> GenerateRequest:
        raise ChatError("no template")

    stream = TextStream(make(ScriptedAgent()), prepare)
    for ask in (stream.request, stream.request, stream.result, lambda: next(stream)):
        with pytest.raises(ChatError, match="no template"):
            ask()


def test_several_streams_of_one_thread_do_not_wait_for_each_other_s_readers(make: Make) -> None:
    texts = make(ScriptedAgent())
    first, second = TextStream(texts, lambda: REQUEST), TextStream(texts, lambda: REQUEST)
    assert "".join(second) == "".join(first) == "t1 t2 t3 "


def test_why_it_waits_is_told_to_who_reads_and_is_no_piece(make: Make) -> None:
    agent = gated()
    agent.late = "Edge 'edge-1' has not answered."
    stream = TextStream(make(agent), lambda: REQUEST)
    told: list[str] = []
    stream.on_wait = told.append
    open_gate(agent)
    assert "".join(stream) == "t1 t2 t3 "
    assert told == ["Edge 'edge-1' has not answered."]

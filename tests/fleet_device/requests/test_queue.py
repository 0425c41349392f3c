import queue
import threading

import pytest

from fleet_device.errors import EdgeUnavailable, RequestQueueFull, TextCancelled
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Piece, RequestContext
from fleet_device.requests.queue import Failed, RequestQueue, TextStream
from schemas.policy import SamplingPolicy
from tests.fleet_device.requests.conftest import Make, gated, open_gate
from tests.support.memory_device import ScriptedAgent
from tests.support.memory_fleet import Clock
from tests.support.waiting import PATIENCE_S, until

REQUEST = GenerateRequest((1,), SamplingPolicy(seed=1), 4)
Events = queue.SimpleQueue[Piece | GeneratedText | Failed]


def take(events: Events) -> Piece | GeneratedText | Failed:
    return events.get(timeout=PATIENCE_S)


def failure(events: Events) -> Exception:
    event = take(events)
    assert isinstance(event, Failed)
    return event.error


def test_texts_are_written_one_at_a_time_in_order(make: Make) -> None:
    agent, first, second = gated(), Events(), Events()
    texts = make(agent)
    texts.submit(lambda: REQUEST, first.put)
    assert agent.started.wait(PATIENCE_S)
    texts.submit(lambda: REQUEST, second.put)
    assert (texts.running, texts.waiting, len(agent.asked)) == (True, 1, 1)
    open_gate(agent)
    for events in (first, second):
        assert [type(take(events)) for _ in range(3)] == [Piece, Piece, GeneratedText]
    assert len(agent.asked) == 2


def test_what_exceeds_the_queue_is_told_when_to_come_again(make: Make) -> None:
    agent = gated()
    texts = make(agent, waiting=1)
    texts.submit(lambda: REQUEST, Events().put)
    assert agent.started.wait(PATIENCE_S)
    texts.submit(lambda: REQUEST, Events().put)
    with pytest.raises(RequestQueueFull) as caught:
        texts.submit(lambda: REQUEST, Events().put)
    assert caught.value.retry_after_s >= 1
    open_gate(agent)


def full(make: Make, *, lasted_s: list[float], elapsed_s: float, waiting: int = 3) -> int:
    agent, clock = gated(), Clock()
    texts = make(agent, waiting=waiting, clock=clock)
    for duration_s in lasted_s:
        agent.started.clear()
        events = Events()
        texts.submit(lambda: REQUEST, events.put)
        assert agent.started.wait(PATIENCE_S)
        clock.seconds += duration_s
        open_gate(agent, 2)
        assert isinstance([take(events) for _ in range(3)][-1], GeneratedText)
        until(lambda: not texts.running)
    agent.started.clear()
    texts.submit(lambda: REQUEST, Events().put)
    assert agent.started.wait(PATIENCE_S)
    clock.seconds += elapsed_s
    for _ in range(waiting):
        texts.submit(lambda: REQUEST, Events().put)
    with pytest.raises(RequestQueueFull) as caught:
        texts.submit(lambda: REQUEST, Events().put)
    open_gate(agent)
    return caught.value.retry_after_s


def test_a_place_is_free_when_the_text_under_way_ends(make: Make) -> None:
    assert full(make, lasted_s=[9.5], elapsed_s=0.5) == 9
    assert full(make, lasted_s=[9.5], elapsed_s=7.5) == 2


def test_a_failure_is_told_and_the_next_text_is_written(make: Make) -> None:
    agent, first, second = ScriptedAgent(error=EdgeUnavailable("nobody there")), Events(), Events()
    texts = make(agent)
    texts.submit(lambda: REQUEST, first.put)
    assert isinstance(take(first), Piece)
    assert isinstance(take(first), Piece)
    assert str(failure(first)) == "nobody there"
    agent.error = None
    texts.submit(lambda: REQUEST, second.put)
    assert isinstance([take(second) for _ in range(3)][-1], GeneratedText)


def test_a_listener_that_fails_does_not_disturb_the_others(make: Make) -> None:
    def broken(_event: object) -> None:
        raise RuntimeError("gone")

    events = Events()
    texts = make(ScriptedAgent())
    texts.submit(lambda: REQUEST, broken)
    until(lambda: texts.done == 1)
    texts.submit(lambda: REQUEST, events.put)
    assert isinstance([take(events) for _ in range(3)][-1], GeneratedText)


def test_a_closed_queue_writes_what_it_took_and_says_when_it_is_idle(make: Make) -> None:
    agent, events, idle = gated(), Events(), threading.Event()
    texts = make(agent, on_idle=idle.set)
    texts.submit(lambda: REQUEST, events.put)
    assert agent.started.wait(PATIENCE_S)
    texts.close()
    with pytest.raises(TextCancelled):
        texts.submit(lambda: REQUEST, Events().put)
    assert not idle.is_set()
    open_gate(agent)
    assert idle.wait(PATIENCE_S)
    assert isinstance([take(events) for _ in range(3)][-1], GeneratedText)


def test_an_abandoned_queue_gives_up_everything(make: Make) -> None:
    agent, first, second = gated(), Events(), Events()
    texts = make(agent)
    texts.submit(lambda: REQUEST, first.put)
    assert agent.started.wait(PATIENCE_S)
    texts.submit(lambda: REQUEST, second.put)
    texts.abandon()
    texts.join()
    assert isinstance(failure(first), TextCancelled)
    assert isinstance(failure(second), TextCancelled)


def test_a_ticket_says_how_long_it_waited_for_its_turn(make: Make) -> None:
    agent, clock = gated(), Clock()
    texts = make(agent, clock=clock)
    tickets = []
    for _ in range(2):
        events = Events()
        tickets.append(texts.submit(lambda: REQUEST, events.put))
    until(lambda: tickets[0].begun)
    clock.seconds += 1.5
    open_gate(agent)
    until(lambda: tickets[1].begun)
    assert [ticket.waited_s for ticket in tickets] == [0.0, 1.5]


def test_a_request_knows_until_when_its_application_waits() -> None:
    deadlines = list[float | None]()

    def write(_request: GenerateRequest, context: RequestContext) -> GeneratedText:
        deadlines.append(context.deadline)
        raise TextCancelled("Enough.")

    now = [100.0]
    requests = RequestQueue(write, clock=lambda: now[0])
    streams = [TextStream(requests, lambda: REQUEST, timeout=timeout) for timeout in (None, 5.0)]
    now[0] = 103.0  # the time in the queue counts
    requests.start()
    for stream in streams:
        with pytest.raises(TextCancelled):
            stream.result()
    requests.close()
    assert deadlines == [None, 105.0]


def test_the_wait_for_the_draft_model_counts_as_a_wait() -> None:
    def write(_request: GenerateRequest, context: RequestContext) -> GeneratedText:
        context.on_turn(2.5)
        raise TextCancelled

    texts, events = RequestQueue(write), Events()
    texts.start()
    ticket = texts.submit(lambda: REQUEST, events.put)
    failure(events)
    assert ticket.waited_s >= 2.5
    texts.abandon()
    texts.join()

import contextlib
import itertools
from collections.abc import Callable

import pytest

from fleet_device.client.decision import REPORT_AFTER_S
from fleet_device.errors import EdgeUnavailable, SessionRefused
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import RequestContext
from schemas.control import Presence
from schemas.messages import Draft, Open
from schemas.policy import Mode
from schemas.reasons import Finish, RefusalCode
from tests.support.scripted_edge import PATIENCE, Answers, LoneDevice, ScriptedEdge, accepted, fault, opened, refusal


def accept(message: Open, draft: Draft) -> Answers:
    full = draft.base + len(draft.tokens) == message.max_new_tokens
    return [accepted(draft, **({"next": None, "finish": Finish.LENGTH} if full else {}))]


def test_an_edge_that_comes_while_another_hangs_is_gone_to_at_once() -> None:
    device, given, came = LoneDevice(context=8192), itertools.count(), list[float]()

    def hang(message: Open, draft: Draft) -> Answers:
        return accept(message, draft) if next(given) < 2 else []

    hung = ScriptedEdge(device.broker, on_draft=hang, shared=True)

    def come(_number: int) -> None:
        if device.clock() >= 104.0 and not came:  # a verdict is overdue since 103
            came.append(device.clock())
            hung.stop_opens()
            ScriptedEdge(
                device.broker,
                name="edge-2",
                on_open=lambda message: [opened(message, edge="edge-2")],
                on_draft=accept,
                shared=True,
            )

    device.inbox.on_wait = come
    assert device.generate(most=30).edge == "edge-2"
    assert device.clock() == came[0]


# Why no text comes.


def told_by(device: LoneDevice) -> list[tuple[float, str]]:
    told: list[tuple[float, str]] = []
    context = RequestContext(on_wait=lambda sentence: told.append((device.clock() - 100.0, sentence)))
    with contextlib.suppress(EdgeUnavailable, SessionRefused):
        device.generate(mode=Mode.COUPLED, context=context)
    return told


PATIENT = {"retry_policy": type(PATIENCE)(open_s=40.0, resume_s=60.0, verdict_s=3.0, close_s=2.0, retry_s=1.0)}


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda device: ScriptedEdge(device.broker), "Edge 'edge-1' has the session and has not answered for 10 s;"),
        (lambda _device: None, "No edge of fleet 'memory' is online"),
        (lambda device: device.broker.go_down(), "The broker has not been reachable for 10 s"),
    ],
    ids=["hung edge", "no edge", "no broker"],
)
def test_what_is_waited_for_is_told_once_and_in_time(prepare: Callable[[LoneDevice], object], sentence: str) -> None:
    device = LoneDevice(**PATIENT)
    prepare(device)
    ((at, told),) = told_by(device)
    assert at == REPORT_AFTER_S
    assert sentence in told


def test_a_wait_that_an_edge_asks_for_is_told_in_its_words() -> None:
    device = LoneDevice(**PATIENT)

    def refuse(message: Open) -> Answers:
        late = device.clock() > 125.0
        return [opened(message)] if late else [refusal(message, RefusalCode.QUOTA, 30.0, "Over it for 30 s.")]

    ScriptedEdge(device.broker, on_open=refuse, on_draft=accept)
    assert told_by(device) == [(REPORT_AFTER_S, "Over it for 30 s.")]


def test_each_wait_is_told_anew_and_short_ones_are_not() -> None:
    device = LoneDevice(pacing=FixedPacing(0), **PATIENT)
    waits = iter([5.0, 12.0, 9.0, 15.0])
    asked: set[int] = set()

    def answer(message: Open, draft: Draft) -> Answers:
        if draft.round not in asked and (wait_s := next(waits, None)) is not None:
            asked.add(draft.round)
            return [fault(draft, retry_s=wait_s, sentence=f"Wait {wait_s:.0f} s.")]
        return accept(message, draft)

    ScriptedEdge(device.broker, on_draft=answer)
    assert told_by(device) == [(15.0, "Wait 12 s."), (36.0, "Wait 15 s.")]


def test_a_wait_with_all_that_is_sent_is_told_too() -> None:
    device = LoneDevice(pacing=FixedPacing(0), **PATIENT)
    notice = fault(None, retry_s=15.0, sentence="Too many bytes.")

    def answer(message: Open, draft: Draft) -> Answers:
        return [*accept(message, draft), *([notice] if draft.round == 1 else [])]

    ScriptedEdge(device.broker, on_draft=answer)
    assert told_by(device) == [(REPORT_AFTER_S, "Too many bytes. Ask again in 15 s.")]
    assert device.inbox.taken < 100


def test_an_edge_that_says_nothing_of_use_does_not_put_the_reason_off() -> None:
    device = LoneDevice(**PATIENT)
    edge = ScriptedEdge(device.broker)

    def chatter(_number: int) -> None:
        device.clock.seconds += 0.5
        edge.say(Presence.ONLINE)

    device.inbox.on_wait = chatter
    told = told_by(device)
    assert len(told) == 1
    assert REPORT_AFTER_S <= told[0][0] <= REPORT_AFTER_S + 0.5

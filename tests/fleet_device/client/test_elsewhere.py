from collections.abc import Callable, Sequence

import pytest

from fleet_device.errors import DeviceError, SessionRefused
from fleet_device.requests.generate import RequestContext
from schemas.control import Presence
from schemas.messages import Open
from schemas.reasons import Action, EndReason, RefusalCode
from tests.support.scripted_edge import PATIENCE, Answers, LoneDevice, ScriptedEdge, accepted, fault, opened, refusal

FOR_EVER = 1e9


def refuse(message: Open, code: RefusalCode = RefusalCode.QUARANTINED, retry_s: float = FOR_EVER) -> Answers:
    return [refusal(message, code, retry_s)]


def honest(device: LoneDevice, name: str = "edge-honest") -> ScriptedEdge:
    return ScriptedEdge(
        device.broker,
        name=name,
        shared=True,
        on_open=lambda message: [opened(message, edge=name, handle=2)],
        on_draft=lambda _message, draft: [accepted(draft, next=1)],
    )


def hostile(device: LoneDevice, **given: Callable[..., Answers]) -> ScriptedEdge:
    return ScriptedEdge(device.broker, name="edge-hostile", shared=True, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["hostile", "honest"])
@pytest.mark.parametrize("code", [RefusalCode.QUARANTINED, RefusalCode.QUOTA, RefusalCode.BUSY, RefusalCode.TOO_LATE])
def test_what_one_edge_refuses_another_takes(first: str, code: RefusalCode) -> None:
    device = LoneDevice()

    def join_hostile() -> None:
        hostile(device, on_open=lambda message: refuse(message, code))

    if first == "hostile":
        join_hostile()
    honest(device)
    if first == "honest":
        join_hostile()
    before = device.clock()
    for _ in range(6):
        done = device.generate(most=4)
        assert (done.reason, done.edge) == (EndReason.LENGTH, "edge-honest")
    assert device.clock() - before <= 6 * 0.25


def test_an_edge_that_refuses_what_another_was_asked_for_is_not_believed() -> None:
    """It receives every Open, and answers first and repeatedly."""
    device = LoneDevice()
    ScriptedEdge(device.broker, name="edge-a", on_open=lambda message: [*refuse(message)] * 20)
    hostile(device, on_open=lambda _message: ())
    honest(device)
    before = device.clock()
    for _ in range(6):
        assert device.generate(most=4).edge == "edge-honest"
    assert device.clock() - before <= 6 * PATIENCE.retry_s


@pytest.mark.parametrize("action", [Action.WAIT, Action.GIVE_UP])
@pytest.mark.parametrize("named", [True, False])
def test_a_text_that_an_edge_holds_up_goes_on_at_another(action: Action, named: bool) -> None:
    device = LoneDevice()
    hostile(
        device,
        on_open=lambda message: [opened(message, edge="edge-hostile")],
        on_draft=lambda _message, draft: [fault(draft if named else None, action, FOR_EVER)],
    )
    honest(device)
    before = device.clock()
    for _ in range(4):
        assert (done := device.generate(most=4)).edge == "edge-honest"
        assert done.reason is EndReason.LENGTH
    assert device.clock() - before <= 4 * PATIENCE.retry_s


def test_an_edge_that_asks_for_short_waits_without_end_is_left() -> None:
    device = LoneDevice()
    slow = hostile(
        device,
        on_open=lambda message: [opened(message, edge="edge-hostile")],
        on_draft=lambda _message, draft: [fault(draft, retry_s=1.0)],
    )
    honest(device)
    before = device.clock()
    for _ in range(2):
        assert device.generate(most=4).edge == "edge-honest"
    assert slow.drafts
    assert device.clock() - before <= 2 * PATIENCE.verdict_s


def refusing(device: LoneDevice, code: RefusalCode, waits: Sequence[float]) -> list[ScriptedEdge]:
    """Return edges that refuse every Open, each with a time of its own."""
    return [
        ScriptedEdge(
            device.broker,
            name=f"edge-{number}",
            shared=True,
            on_open=lambda message, wait_s=wait_s: refuse(message, code, wait_s),  # type: ignore[misc]
        )
        for number, wait_s in enumerate(waits)
    ]


def test_a_request_whose_first_token_would_come_too_late_everywhere_fails_at_once() -> None:
    device = LoneDevice()
    edges = refusing(device, RefusalCode.TOO_LATE, (80.0, 50.0))
    before = device.clock()
    with pytest.raises(SessionRefused) as refused:
        device.generate(context=RequestContext(deadline=before + 60.0))
    assert (refused.value.code, refused.value.retry_s) == (RefusalCode.TOO_LATE, pytest.approx(50.0, abs=1.0))
    assert device.clock() - before < 2.0
    assert [message.wait_s for edge in edges for message in edge.opens[:1]] == [60.0, 60.0]


@pytest.mark.parametrize("waits", [(3600.0, FOR_EVER), (FOR_EVER, 3600.0)])
def test_what_all_edges_refuse_stands_with_the_shortest_time(waits: tuple[float, float]) -> None:
    device = LoneDevice()
    edges = refusing(device, RefusalCode.QUOTA, waits)
    before = device.clock()
    with pytest.raises(SessionRefused) as refused:
        device.generate()
    assert refused.value.retry_s is not None
    assert refused.value.retry_s <= 3600.0
    assert (sum(len(edge.opens) for edge in edges), device.clock() - before) == (3, 0.5)
    for _ in range(20):
        with pytest.raises(SessionRefused):
            device.generate()
    assert sum(len(edge.opens) for edge in edges) == 3, "nobody is asked again meanwhile"


def test_a_time_that_one_edge_names_is_waited_for_whatever_another_says() -> None:
    device = LoneDevice()
    hostile(device, on_open=refuse)
    since = device.clock() + 3.0

    def answer(message: Open) -> Answers:
        left_s = since - device.clock()
        return refuse(message, RefusalCode.QUOTA, left_s) if left_s > 0 else [opened(message, edge="edge-honest")]

    good = honest(device)
    good.on_open = answer
    before = device.clock()
    assert device.generate(most=4).edge == "edge-honest"
    assert device.clock() - before <= 3.0 + 3 * 0.25


def test_an_edge_that_is_new_is_asked_whatever_others_have_said() -> None:
    device = LoneDevice()
    hostile(device, on_open=refuse)
    with pytest.raises(SessionRefused):
        device.generate()
    good = honest(device)
    assert device.generate(most=4).edge == "edge-honest"
    good.say(Presence.OFFLINE)
    good.stop()
    with pytest.raises(SessionRefused):
        device.generate()
    with pytest.raises(SessionRefused):
        device.generate()


def test_edges_that_hold_a_text_up_in_turn_end_it() -> None:
    device = LoneDevice()
    for name in ("edge-a", "edge-b"):
        ScriptedEdge(
            device.broker,
            name=name,
            shared=True,
            on_open=lambda message, name=name: [opened(message, edge=name)],  # type: ignore[misc]
            on_draft=lambda _message, draft: [fault(draft, retry_s=FOR_EVER)],
        )
    before = device.clock()
    with pytest.raises(DeviceError):
        device.generate()
    assert device.clock() - before <= PATIENCE.resume_s

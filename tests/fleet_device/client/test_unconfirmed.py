from fleet_device.client.messaging import EdgeStateChanged
from fleet_device.client.reports import UnconfirmedCloses
from schemas.control import Presence
from schemas.messages import Close, Closed
from schemas.reasons import EndReason

BACK = EdgeStateChanged("edge-1", Presence.ONLINE)


def close(number: int) -> Close:
    return Close(
        session=number.to_bytes(8, "big"),
        handle=7,
        edge="edge-1",
        reason=EndReason.STOP,
        tokens=number,
        rounds=0,
        drafted=0,
        tested=0,
        accepted=0,
        digest=0,
        uplink_bytes=0,
        downlink_bytes=0,
        draft_ms=0.0,
        wait_ms=0.0,
        wall_ms=0.0,
    )


def confirmed(number: int) -> Closed:
    return Closed(
        session=close(number).session,
        reason=EndReason.STOP,
        tokens=number,
        rounds=0,
        mean_batch=0.0,
        queue_ms=0.0,
        compute_ms=0.0,
    )


def test_what_is_not_confirmed_is_said_to_whichever_edge_is_there_next() -> None:
    said: list[Close] = []
    closes = UnconfirmedCloses(said.append)
    for number in (1, 2):
        closes.keep(close(number))
    closes.on_event(confirmed(1))
    closes.on_event(EdgeStateChanged("edge-1", Presence.OFFLINE))
    assert said == []
    closes.on_event(BACK)
    assert [(each.tokens, each.edge, each.handle) for each in said] == [(2, None, None)]
    closes.on_event(confirmed(2))
    closes.on_event(BACK)
    assert len(said) == 1


def test_neither_are_they_many_nor_said_without_end() -> None:
    said: list[Close] = []
    closes = UnconfirmedCloses(said.append)
    for number in range(1, 30):
        closes.keep(close(number))
    assert len(closes) == 8
    for _ in range(100):
        closes.on_event(BACK)
    assert len(closes) == 0
    assert {each.tokens for each in said} == set(range(22, 30))
    assert len(said) == 8 * 20

"""Messages that come so late that they meet another session."""

from contextlib import closing

from schemas.policy import Mode
from schemas.topics import Topic, parse
from tests.protocol_model.machine import ProtocolModel, Wish

LONG = Wish(mode=Mode.COUPLED, tokens=20, prompt=(2,), temperature=1.5, top_k=0, length=2, ahead=False)


def leave_an_edge(model: ProtocolModel) -> None:
    """Have a text cancelled at an edge whose verdict is held back."""
    model.start(window=2)
    (device, other), broker = model.devices, model.broker
    other.crash()
    model.write_text(device, LONG)
    while not any(parse(parcel.topic).topic is Topic.VERDICT for parcel in broker.waiting):
        model.go_on_once()
    place = next(i for i, parcel in enumerate(broker.waiting) if parse(parcel.topic).topic is Topic.VERDICT)
    broker.hold(place, copy=False)
    device.cancel()
    while device.text is not None and not device.text.over:
        model.go_on_once()


def test_a_verdict_of_an_edge_that_was_left_is_not_taken_for_that_of_another() -> None:
    with closing(ProtocolModel()) as model:
        leave_an_edge(model)
        (device, _), broker = model.devices, model.broker
        model.write_text(device, LONG)
        assert device.text is not None
        while not device.text.session.unanswered():
            model.go_on_once()
        broker.release(0)
        while not device.text.over:
            model.go_on_once()
            model.holds()

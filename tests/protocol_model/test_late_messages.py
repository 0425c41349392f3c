from contextlib import closing

from schemas.policy import Mode
from schemas.topics import Topic, parse
from tests.protocol_model.machine import ProtocolModel, Wish

LONG = Wish(mode=Mode.COUPLED, tokens=20, prompt=(2,), temperature=1.5, top_k=0, length=2, ahead=False)


def meet_late(kind: Topic, *, edges: int) -> None:
    """Deliver the first message of a kind during its device's next request, and check the result."""
    with closing(ProtocolModel()) as model:
        model.start(window=2)
        (device, other), broker = model.devices, model.broker
        other.crash()
        for edge in model.edges[edges:]:
            edge.crash()
        model.write_text(device, LONG)
        while not (places := [at for at, each in enumerate(broker.waiting) if parse(each.topic).topic is kind]):
            model.go_on_once()
        broker.hold(places[0], copy=False)
        device.cancel()
        first = device.text
        while first is not None and not first.over:
            model.go_on_once()
        model.write_text(device, LONG)
        second = device.text
        assert second is not None
        while not second.session.unanswered():
            model.go_on_once()
        broker.release(0)
        while not second.over:
            model.go_on_once()
            model.holds()
        assert second.driver.resumes == 0


def test_a_verdict_of_an_edge_that_was_left_is_not_taken_for_that_of_another() -> None:
    meet_late(Topic.VERDICT, edges=2)


def test_a_draft_of_a_text_that_is_over_is_not_taken_for_one_of_the_next() -> None:
    meet_late(Topic.DRAFT, edges=1)

"""A request waits for as long as the edge gets on with it."""

from collections.abc import Callable, Sequence

import pytest

from fleet_device.client.driver import progress_sentence
from fleet_device.errors import EdgeUnavailable
from fleet_device.requests.generate import RequestContext
from fleet_edge.verifiers.contract import Item, Logits
from schemas.codec import decode_reply
from schemas.control import Presence, encode_json
from schemas.messages import Progress
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from tests.support.memory_fleet import EDGE, FLEET, MemoryFleet, edge_state
from tests.support.memory_link import MemoryLink
from tests.support.scripted_edge import DEVICE, PATIENCE, LoneDevice, ScriptedEdge, accepted, opened

PROMPT = [1 + index % 4 for index in range(200)]


class Slow:
    """A fleet whose edge takes a time for each token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, token_s: float) -> None:
        self.fleet = MemoryFleet()
        self.device = LoneDevice(self.fleet)
        self.reasons: list[str] = []
        self.progress: list[Progress] = []
        score, publish = self.fleet.verifier.score, self.fleet._link.publish

        def slowly(items: Sequence[Item]) -> Logits:
            self.fleet.clock.seconds += token_s * sum(len(item.tokens) for item in items)
            return score(items)

        def published(topic: str, payload: bytes, **more: object) -> object:
            if topic == build(Topic.SESSION, fleet=FLEET, device=DEVICE):
                reply = decode_reply(payload)
                self.progress += [reply] if isinstance(reply, Progress) else []
            return publish(topic, payload, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(self.fleet.verifier, "score", slowly)
        monkeypatch.setattr(self.fleet._link, "publish", published)

    def generate(self, prompt: Sequence[int] = PROMPT) -> EndReason:
        return self.device.generate(prompt=prompt, context=RequestContext(on_wait=self.reasons.append)).reason


def test_a_session_is_not_lost_while_the_edge_computes_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its device waits in silence, for longer than a lease."""
    slow = Slow(monkeypatch, token_s=2.0)
    score = slow.fleet.verifier.score

    def expiring(items: Sequence[Item]) -> Logits:
        slow.fleet.edge.handlers.expire()
        return score(items)

    monkeypatch.setattr(slow.fleet.verifier, "score", expiring)
    before = slow.fleet.clock()
    done = slow.device.generate(prompt=PROMPT)
    assert slow.fleet.clock() - before > 5 * slow.fleet.edge.sessions.lease_s
    assert (done.reason, done.resumes) == (EndReason.LENGTH, 0)


def test_a_request_waits_while_its_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, token_s=0.5)
    before = slow.fleet.clock()
    assert slow.generate() is EndReason.LENGTH
    assert slow.fleet.clock() - before > 3 * PATIENCE.resume_s
    assert [each.computed for each in slow.progress] == sorted({each.computed for each in slow.progress})
    assert len(slow.progress) > 5
    assert slow.reasons[: len(slow.progress)] == [progress_sentence(EDGE, each) for each in slow.progress]


@pytest.mark.parametrize("token_s", [0.0, 0.01])
def test_short_waits_need_no_message(monkeypatch: pytest.MonkeyPatch, token_s: float) -> None:
    slow = Slow(monkeypatch, token_s=token_s)
    assert slow.generate() is EndReason.LENGTH
    assert slow.progress == []


def test_an_edge_that_repeats_itself_gets_nowhere() -> None:
    device = LoneDevice()
    same = Progress(handle=1, computed=5, tokens=10, ahead=0)
    edge = ScriptedEdge(device.broker)
    device.inbox.each_second = lambda: edge.send([same])
    with pytest.raises(EdgeUnavailable):
        device.generate()


@pytest.mark.parametrize(
    ("progress", "left_s"),
    [
        (Progress(handle=1, computed=200, tokens=1000, ahead=0, tokens_per_s=100.0), 8.0),
        (Progress(handle=1, computed=200, tokens=1000, ahead=400, tokens_per_s=100.0), 12.0),
        (Progress(handle=1, computed=1001, tokens=1000, ahead=0, tokens_per_s=100.0), 0.0),
        (Progress(handle=1, computed=200, tokens=1000, ahead=400), None),
    ],
)
def test_the_time_that_is_left_follows_from_the_rate(progress: Progress, left_s: float | None) -> None:
    assert progress.left_s == left_s
    assert progress_sentence(EDGE, progress)


def _say(device: LoneDevice, **fields: object) -> Callable[[], None]:
    link = MemoryLink(device.broker, EDGE)
    link.start(timeout_s=1.0)
    topic = build(Topic.EDGE_STATE, fleet=FLEET, edge=EDGE)
    link.publish(topic, encode_json(edge_state(Presence.OFFLINE, **fields)), retain=True)
    return link.stop


def test_a_request_waits_for_an_edge_that_loads_its_model() -> None:
    device = LoneDevice()
    stop = _say(device, loading=40)
    began = device.clock()

    def come() -> None:
        if device.clock() >= began + 10 * PATIENCE.open_s and not edges:
            stop()
            edges.append(
                ScriptedEdge(
                    device.broker,
                    on_open=lambda message: [opened(message)],
                    on_draft=lambda _message, draft: [
                        accepted(draft, next=None) if draft.base + len(draft.tokens) >= 8 else accepted(draft)
                    ],
                )
            )

    edges: list[ScriptedEdge] = []
    device.inbox.each_second = come
    assert device.generate().reason is EndReason.LENGTH


def test_an_edge_that_has_failed_to_load_is_not_waited_for() -> None:
    device = LoneDevice()
    _say(device)
    with pytest.raises(EdgeUnavailable):
        device.generate()

import random

import cbor2
import pytest

from fleet_edge.errors import DraftFault
from fleet_edge.session_log.records import (
    LeaveReason,
)
from fleet_edge.sessions.drafts import DraftResult
from fleet_edge.sessions.machine import EdgeSession
from sampling.distribution import shape
from schemas.codec import decode_verdict, encode_close, encode_draft, encode_open
from schemas.control import DeviceState, Presence, Telemetry, encode_json
from schemas.messages import Closed, Draft, Fault, Opened, Refused, Verdict
from schemas.policy import Mode
from schemas.reasons import Action, EndReason, FaultCode, Finish, RefusalCode
from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary
from tests.support.drafts import arrived, draft
from tests.support.memory_fleet import EDGE, END, FLEET, START, TARGET, Device, MemoryFleet, lossless_text, run, terms
from tests.support.memory_link import MemoryLink

STATE = DeviceState(presence=Presence.ONLINE, software="1", draft_model="toy", quantization="none", since=START)


class Scene:
    def __init__(self, **settings: int) -> None:
        self.fleet = MemoryFleet(settings={"max_draft": 4, **settings})
        self.good = Device(self.fleet, "good", terms(1, mode=Mode.COUPLED, max_new_tokens=20), length=2, ahead=True)
        self.bad = Device(self.fleet, "bad", terms(2, max_new_tokens=20), length=2, ahead=False)
        for device in (self.good, self.bad):
            device.open()
        self.fleet.settle()
        for device in (self.good, self.bad):
            assert device.driver.step()
        assert self.good.session.opened is not None
        self.handle = self.bad.session.opened.handle
        self.replies = self.bad.messages

    def draft(self, **fields: object) -> Draft:
        whole = {"handle": self.handle, "round": 0, "epoch": 0, "base": 0, "digest": 0, "tokens": (1,), "counts": (9,)}
        return Draft.model_validate(whole | fields)

    def send(self, payload: bytes, topic: Topic = Topic.DRAFT) -> None:
        self.bad.publish(topic, payload, edge=EDGE if topic is Topic.DRAFT else None)
        self.fleet.settle()

    def open(self, **changes: object) -> None:
        self.send(encode_open(self.bad.session.open().model_copy(update=changes)), Topic.OPEN)

    def close(self, reason: EndReason = EndReason.CANCELLED, **changes: object) -> None:
        """Send the bad device's Close, with some of its fields changed."""
        self.bad.session.cancel(reason)
        self.send(encode_close(self.bad.session.close(wall_ms=1.0).model_copy(update=changes)), Topic.CLOSE)

    def verdicts(self, draft: Draft) -> list[bytes]:
        """Send a draft of the bad device three times; return what it received."""
        received: list[bytes] = []
        topic = build(Topic.VERDICT, fleet=FLEET, device="bad")
        self.bad.link.subscribe(topic, lambda message: received.append(message.payload))
        for _ in range(3):
            self.send(encode_draft(draft))
        return received

    def session(self) -> EdgeSession:
        found = self.fleet.edge.sessions.by_name("bad", self.bad.terms.session)
        assert found is not None
        return found

    def faults(self) -> list[Fault]:
        return [reply for reply in self.replies if isinstance(reply, Fault)]

    def events(self) -> list[tuple[str | None, str, str]]:
        return [(event.device, event.kind, event.code) for event in self.fleet.sink.of("event")]

    def others_are_untouched(self) -> None:
        run(self.fleet, [self.good], random.Random(0))
        assert self.good.session.committed == lossless_text(self.good.terms)
        assert (self.good.faults, self.good.resumes) == ([], 0)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_another_devices_session_is_unknown(scene: Scene) -> None:
    theirs = scene.good.session.opened
    scene.send(encode_draft(scene.draft(handle=theirs.handle)))
    (fault,) = scene.faults()
    assert (fault.code, fault.action, fault.handle) == (FaultCode.UNKNOWN_SESSION, Action.RESUME, theirs.handle)
    assert scene.events() == [("bad", "fault", "unknown-session")]
    scene.others_are_untouched()


def test_another_devices_session_cannot_be_closed(scene: Scene) -> None:
    scene.close(session=scene.good.terms.session)
    assert len(scene.fleet.edge.sessions) == 2
    scene.others_are_untouched()


def test_another_devices_name_opens_a_session_of_ones_own(scene: Scene) -> None:
    thief = Device(scene.fleet, "thief", scene.good.terms.model_copy(), length=2, ahead=False)
    run(scene.fleet, [thief], random.Random(0))
    scene.others_are_untouched()


HOSTILE_DRAFTS = {
    "unknown handle": ({"handle": 999}, FaultCode.UNKNOWN_SESSION),
    "ids outside the vocabulary": ({"tokens": (1, 6), "counts": (9, 9)}, FaultCode.TOKEN),
    "the highest id there is": ({"tokens": ((1 << 21) - 1,)}, FaultCode.TOKEN),
    "a correction outside the vocabulary": ({"fix": 6, "base": 1}, FaultCode.TOKEN),
    "no counts": ({"counts": None}, FaultCode.COUNTS),
    "tokens behind the end": ({"tokens": (END, 1), "counts": (9, 9)}, FaultCode.TOKEN),
    "longer than agreed": ({"tokens": (1,) * 5, "counts": (9,) * 5}, FaultCode.TOO_LONG),
    "beyond the end of the text": ({"base": 20}, FaultCode.TOO_LONG),
    "far beyond it": ({"base": (1 << 20) - 1}, FaultCode.TOO_LONG),
    "another text": ({"digest": 7}, FaultCode.TOKENS_DIFFER),
    "an epoch to come": ({"epoch": 9}, FaultCode.TOKENS_DIFFER),
    "a correction of nothing": ({"fix": 1, "base": 1}, FaultCode.TOKENS_DIFFER),
    "samples of nothing": ({"tokens": (), "counts": None, "tried": 16}, FaultCode.TOKENS_DIFFER),
}


@pytest.mark.parametrize(("fields", "code"), HOSTILE_DRAFTS.values(), ids=HOSTILE_DRAFTS.keys())
def test_a_draft_that_cannot_be_judged_gets_a_fault(scene: Scene, fields: dict[str, object], code: FaultCode) -> None:
    scene.send(encode_draft(scene.draft(**fields)))
    (fault,) = scene.faults()
    action = Action.RESUME if code in {FaultCode.TOKENS_DIFFER, FaultCode.UNKNOWN_SESSION} else Action.GIVE_UP
    assert (fault.code, fault.round, fault.action) == (code, 0, action)
    assert fault.sentence.endswith(".")
    assert scene.events() == [("bad", "fault", code.value)]
    scene.send(encode_draft(scene.draft(round=1)))
    assert isinstance(scene.replies[-1], Verdict)  # its own session goes on too
    scene.others_are_untouched()


NAN = cbor2.CBORTag(85, b"\x00\x00\xc0\x7f")
MALFORMED = {
    "random bytes": random.Random(1).randbytes(40),
    "a kilobyte and more": b"\x00" * 2000,
    "counts of zero": cbor2.dumps([0, 0, 0, 0, None, [1], [-1], False, 0]),
    "absurd counts": cbor2.dumps([0, 0, 0, 0, None, [1], [1 << 40], False, 0]),
    "counts that are no numbers": cbor2.dumps([0, 0, 0, 0, None, [1], NAN, False, 0]),
    "tokens that are no numbers": cbor2.dumps([0, 0, 0, 0, None, NAN, [1], False, 0]),
    "a long key twice": b"\xa2" + (b"\x79\x01\x90" + b"a" * 400 + b"\x01") * 2,
}


@pytest.mark.parametrize("topic", [Topic.DRAFT, Topic.OPEN, Topic.CLOSE])
@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_message_gets_a_fault(scene: Scene, topic: Topic, payload: bytes) -> None:
    scene.send(payload, topic)
    (fault,) = scene.faults()
    assert (fault.code, fault.action, fault.handle) == (FaultCode.MALFORMED, Action.GIVE_UP, None)
    assert scene.events() == [("bad", "fault", "malformed")]
    scene.others_are_untouched()


def test_a_draft_cut_off_anywhere_gets_a_fault(scene: Scene) -> None:
    payload = encode_draft(scene.draft())
    for length in range(1, len(payload)):
        scene.send(payload[:length])
    assert [fault.code for fault in scene.faults()] == [FaultCode.MALFORMED] * (len(payload) - 1)
    scene.others_are_untouched()


def test_a_state_that_is_none_is_logged(scene: Scene) -> None:
    scene.send(b"{}", Topic.STATE)
    assert scene.replies == []
    assert scene.events() == [("bad", "fault", "malformed")]


HOSTILE_OPENS = {
    "an empty prompt": ({"prompt": ()}, RefusalCode.PROMPT_EMPTY),
    "a prompt longer than the context": ({"prompt": (1,) * 256}, RefusalCode.PROMPT_TOO_LONG),
    "no tokens to write": ({"max_new_tokens": 0}, RefusalCode.MAX_NEW_TOKENS),
    "ids outside the vocabulary": ({"prompt": (6,)}, RefusalCode.TOKEN),
    "another vocabulary": ({"vocabulary": Vocabulary.of(["a", "b"])}, RefusalCode.VOCABULARY),
    "a vocabulary of the same size": ({"vocabulary": Vocabulary.of(["a"] * TARGET.size)}, RefusalCode.VOCABULARY),
    "resumed with ids outside the vocabulary": ({"resume": (6,)}, RefusalCode.TOKEN),
    "resumed with all its tokens": ({"resume": (1,) * 20}, RefusalCode.MAX_NEW_TOKENS),
    "another protocol": ({"protocol": 99}, RefusalCode.PROTOCOL),
}


@pytest.mark.parametrize(("fields", "code"), HOSTILE_OPENS.values(), ids=HOSTILE_OPENS.keys())
def test_an_open_that_cannot_be_served_is_refused(scene: Scene, fields: dict[str, object], code: RefusalCode) -> None:
    scene.open(session=b"another1", **fields)
    (refused,) = scene.replies
    assert isinstance(refused, Refused)
    assert (refused.code, refused.session) == (code, b"another1")
    assert refused.sentence.endswith(".")
    assert scene.events() == [("bad", "refused", code.value)]
    assert len(scene.fleet.edge.sessions) == 2
    scene.others_are_untouched()


@pytest.mark.parametrize(("wait_s", "retry_s"), [(None, None), (60.0, None), (0.0, 10.0), (4.0, 6.0), (1e300, None)])
def test_an_open_whose_first_token_would_come_after_its_time_is_refused_at_once(
    scene: Scene, wait_s: float | None, retry_s: float | None
) -> None:
    scene.fleet.edge.scheduler._cost._prompt_token_s = 0.1
    scene.open(session=b"another1", prompt=(1,) * 100, wait_s=wait_s)
    (reply,) = scene.replies
    if retry_s is None:
        assert isinstance(reply, Opened)
    else:
        assert isinstance(reply, Refused)
        assert (reply.code, reply.retry_s) == (RefusalCode.TOO_LATE, pytest.approx(retry_s, rel=0.2))
        assert scene.events() == [("bad", "refused", "too-late")]
        scene.others_are_untouched()


@pytest.mark.parametrize("wait_s", [-1.0, float("nan"), float("inf")])
def test_a_hostile_time_of_waiting_is_malformed(scene: Scene, wait_s: object) -> None:
    scene.open(session=b"another1", wait_s=wait_s)
    assert [fault.code for fault in scene.faults()] == [FaultCode.MALFORMED]
    scene.others_are_untouched()


def test_a_refused_resume_leaves_the_session_as_it_is(scene: Scene) -> None:
    scene.open(resume=(1,) * 20)
    assert isinstance(scene.replies.pop(), Refused)
    scene.send(encode_draft(scene.draft()))
    assert isinstance(scene.replies[-1], Verdict)


def test_a_device_with_too_many_sessions_is_told_so() -> None:
    scene = Scene(max_sessions_per_device=2)
    for number in range(3):
        scene.open(session=b"another%d" % number)
    assert [type(reply) for reply in scene.replies] == [Opened, Refused, Refused]
    scene.others_are_untouched()


def test_a_draining_edge_takes_nothing_new_and_ends_what_it_has(scene: Scene) -> None:
    scene.fleet.edge.handlers.draining = True
    scene.open(session=b"another1")
    (refused,) = scene.replies
    assert isinstance(refused, Refused)
    assert refused.code is RefusalCode.DRAINING
    scene.others_are_untouched()


def test_an_open_delivered_twice_or_late_opens_nothing_anew(scene: Scene) -> None:
    first = scene.bad.session.open()
    second = scene.bad.session.open()
    for message in (second, second, first):
        scene.send(encode_open(message), Topic.OPEN)
    assert [(reply.attempt, reply.handle) for reply in scene.replies if isinstance(reply, Opened)] == [(2, 2), (2, 2)]
    assert len(scene.replies) == 2
    assert len(scene.fleet.sink.of("opened")) == 3


def test_a_repeated_draft_gets_the_same_bytes_and_is_verified_once(scene: Scene) -> None:
    received = scene.verdicts(scene.draft())
    assert len(received) == 3
    assert len(set(received)) == 1
    session = scene.session()
    assert (session.counters.rounds, session.counters.drafted) == (1, 1)
    assert session.counters.downlink_bytes == 3 * len(received[0])
    assert decode_verdict(received[0]).round == 0


def test_a_repeated_request_for_samples_gets_the_same_bytes_and_is_counted_once(scene: Scene) -> None:
    session = scene.session()
    p = shape(TARGET.logits((1, 2)), session.policy)
    session._reject(DraftResult(arrived(draft()), accepted=0, tested=1, token=None, p=p, finish=Finish.NO))
    received = scene.verdicts(scene.draft(round=5, epoch=1, tokens=(), counts=None, tried=16))
    assert len(received) == 3
    assert len(set(received)) == 1
    assert session.counters.rounds == 1


def test_a_close_ends_the_session_and_tells_what_was_counted(scene: Scene) -> None:
    scene.close()
    scene.close()
    first, second = scene.replies
    assert isinstance(first, Closed)
    assert isinstance(second, Closed)
    assert (first.reason, first.attempt, second.attempt) == (EndReason.CANCELLED, 0, None)
    assert len(scene.fleet.edge.sessions) == 1
    assert {record.reason for record in scene.fleet.sink.of("closed")} == {EndReason.CANCELLED}
    scene.others_are_untouched()


def test_a_close_under_anothers_session_id_is_told_as_ones_own(scene: Scene) -> None:
    scene.close(EndReason.FAILED, session=scene.good.terms.session)
    assert [record.device for record in scene.fleet.sink.of("reported")] == ["bad"]
    assert scene.fleet.sink.of("closed") == []
    scene.others_are_untouched()


def test_a_close_of_another_edges_session_is_that_edges_business(scene: Scene) -> None:
    for session in (b"another1", scene.bad.terms.session):
        scene.close(edge="edge-2", session=session)
    assert scene.replies == []
    assert scene.fleet.sink.of("closed") == []
    assert len(scene.fleet.edge.sessions) == 1  # what was left here is forgotten
    scene.others_are_untouched()


def test_an_edge_that_knows_less_of_a_text_than_its_device_does_not_say_how_long_it_was(scene: Scene) -> None:
    """A repeated Open arrived here too, and the edge with the session ended before its end was known."""
    scene.close(EndReason.LENGTH, edge=None, handle=None, tokens=7)
    assert scene.fleet.sink.of("closed") == []
    assert [record.reason for record in scene.fleet.sink.of("left")] == [LeaveReason.RESUMED]
    assert [record.tokens for record in scene.fleet.sink.of("reported")] == [7]
    scene.others_are_untouched()


def test_a_session_whose_device_is_gone_ends_also_while_its_draft_waits(scene: Scene) -> None:
    scene.bad.publish(Topic.DRAFT, encode_draft(scene.draft()), edge=EDGE)
    scene.fleet.broker.pump()
    scene.fleet.edge._receive(0.0)
    assert scene.session().ready is not None
    state = STATE.model_copy(update={"presence": Presence.OFFLINE})
    scene.bad.publish(Topic.STATE, encode_json(state), edge=None)
    scene.fleet.broker.pump()
    scene.fleet.edge._receive(0.0)
    scene.fleet.clock.seconds += 16.0
    scene.fleet.edge.handlers.expire()
    assert len(scene.fleet.edge.sessions) == 1


def test_a_lease_that_runs_out_ends_the_session_as_lost_and_frees_its_memory(scene: Scene) -> None:
    scene.send(encode_draft(scene.draft()))
    scene.fleet.clock.seconds += 59.0
    scene.good.act()
    scene.fleet.settle()
    scene.fleet.clock.seconds += 2.0
    room = scene.fleet.verifier.capacity()
    scene.fleet.edge.handlers.expire()
    scene.fleet.settle()
    (closed,) = [reply for reply in scene.replies if isinstance(reply, Closed)]
    assert (closed.reason, closed.session) == (EndReason.LOST, scene.bad.terms.session)
    assert scene.fleet.verifier.capacity() > room
    (record,) = scene.fleet.sink.of("closed")
    assert (record.reason, record.code) == (EndReason.LOST, "device-silent")
    assert ("bad", "session", "lost") in scene.events()
    scene.others_are_untouched()


@pytest.mark.parametrize("presence", [Presence.OFFLINE, Presence.CLOSED])
def test_a_device_that_is_declared_gone_has_a_grace_to_come_back(scene: Scene, presence: Presence) -> None:
    scene.send(encode_json(STATE.model_copy(update={"presence": presence})), Topic.STATE)
    assert [record.presence for record in scene.fleet.sink.of("device")] == [presence]
    scene.fleet.clock.seconds += 14.0
    scene.fleet.edge.handlers.expire()
    assert len(scene.fleet.edge.sessions) == 2
    scene.fleet.clock.seconds += 2.0
    scene.fleet.edge.handlers.expire()
    assert len(scene.fleet.edge.sessions) == 1
    assert [record.code for record in scene.fleet.sink.of("closed")] == ["device-offline"]
    scene.others_are_untouched()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"code": "drafter-error", "sentence": "It is gone."}, ("drafter-error", "It is gone.")),
        ({"sentence": "It is \x1b[2J gone."}, ("device", "It is \N{REPLACEMENT CHARACTER}[2J gone.")),
        ({}, ("device", "The device gave up without a reason.")),
    ],
)
def test_a_text_that_fails_says_why(scene: Scene, told: dict[str, str], expected: tuple[str, str]) -> None:
    scene.close(EndReason.FAILED, **told)
    (record,) = scene.fleet.sink.of("closed")
    assert (record.reason, record.code, record.sentence) == (EndReason.FAILED, *expected)
    assert scene.events() == [("bad", "session", "failed")]


def test_what_the_edge_has_given_up_says_why_if_the_device_does_not(scene: Scene) -> None:
    scene.session().fail(DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, "The logits are not numbers."))
    scene.close(EndReason.FAILED)
    (record,) = scene.fleet.sink.of("closed")
    assert (record.code, record.sentence) == ("internal", "The logits are not numbers.")


def test_a_text_that_ends_as_it_should_has_no_cause(scene: Scene) -> None:
    run(scene.fleet, [scene.good, scene.bad], random.Random(0))
    ends = [(record.reason, record.code) for record in scene.fleet.sink.of("closed")]
    assert len(ends) == 2
    assert {code for _, code in ends} == {None}
    assert [code for _, _, code in scene.events()] == []


def test_a_session_that_goes_on_is_told_where_it_was(scene: Scene) -> None:
    scene.good.driver.resume()
    scene.fleet.settle()
    assert ("good", "session", "resumed") in scene.events()
    for session in scene.fleet.edge.sessions:
        scene.fleet.edge.answers.record_leave(session, LeaveReason.HANDED_OVER)
        scene.fleet.edge.sessions.remove(session)
    scene.good.driver.resume()
    scene.fleet.settle()
    assert ("good", "session", "handed-over") in scene.events()
    assert ("good", "session", "taken-over") in scene.events()


def test_telemetry_of_devices_is_recorded(scene: Scene) -> None:
    link = MemoryLink(scene.fleet.broker, "told")
    link.start(timeout_s=1.0)
    for number in range(3):
        told = Telemetry(sessions=number, tokens=0, round_trip_ms=float(number), plan="ahead", plan_reason="Faster.")
        link.publish(build(Topic.TELEMETRY, fleet=FLEET, device="bad"), encode_json(told))
        scene.fleet.settle()
    found = [(record.device, record.round_trip_ms) for record in scene.fleet.sink.of("telemetry")]
    assert found == [("bad", 0.0), ("bad", 1.0), ("bad", 2.0)]
    assert {record.plan_reason for record in scene.fleet.sink.of("telemetry")} == {"Faster."}


def test_a_flush_logs_what_has_been_counted_so_far(scene: Scene) -> None:
    scene.send(encode_draft(scene.draft()))
    scene.fleet.edge.handlers.flush()
    progress = {record.session: record for record in scene.fleet.sink.of("progress")}
    assert (progress[scene.bad.terms.session.hex()].rounds, progress[scene.good.terms.session.hex()].rounds) == (1, 0)


def test_what_ended_sessions_have_computed_is_dropped_after_a_day() -> None:
    fleet = MemoryFleet()
    device = Device(fleet, "device-1", terms(1, prompt=[1, 2, 3, 4] * 6), length=2, ahead=False)
    device.open()
    run(fleet, [device], random.Random(1))
    scheduler = fleet.edge.scheduler

    def retained() -> int:
        fleet.edge.handlers.expire()
        scheduler.note_memory(fleet.edge.sessions, then=lambda: None)
        return scheduler.memory.retained

    assert retained() >= 20
    fleet.clock.seconds += 23 * 3600.0
    assert retained() >= 20
    fleet.clock.seconds += 2 * 3600.0
    assert retained() == 0

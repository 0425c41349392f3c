from dataclasses import replace

import pytest

from fleet_common.mqtt.link import Message
from fleet_edge.answers.answers import ReportedLoads, Responder
from fleet_edge.answers.publisher import Publisher
from fleet_edge.answers.recorder import Recorder
from fleet_edge.errors import DraftFault
from fleet_edge.guard import DeviceGuard
from fleet_edge.limits import QuarantineSettings, QuotaSettings
from fleet_edge.metrics import Figures
from fleet_edge.session_log.counters import SEGMENT_COUNTERS, SegmentCounters
from fleet_edge.session_log.records import (
    LeaveReason,
)
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.sessions.statistics import AcceptanceByModel
from sampling.distribution import shape
from sampling.downlink import FormName
from sampling.verification import Judgement
from schemas.codec import decode_reply, decode_verdict
from schemas.downlink import Samples
from schemas.fields import EdgeLoad
from schemas.messages import Closed, Fault, Opened, SessionReply, Verdict
from schemas.policy import Mode
from schemas.reasons import Action, EndReason, FaultCode
from schemas.topics import Topic, build
from tests.support.drafts import TOY, arrived, draft, edge_session, open_message
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_fleet import EDGE, FLEET, TARGET, Clock, Sink
from tests.support.memory_link import MemoryLink


def test_a_grant_names_the_session_and_its_limits() -> None:
    limits = SessionLimits(max_new_tokens=20, max_draft=4, window=2, vocabulary=10, end_tokens=frozenset({9, 0, 5}))
    session = edge_session(attempt=3, resume=(4, 5), limits=limits)
    load = EdgeLoad(requests=2, request_ms=4.5, token_ms=1.25)
    exchange = Exchange()
    replace(exchange.answers, target=replace(TOY, name="t" * 5000), load=lambda: load).repeat_grant(session)
    granted = exchange.listen()[-1]
    assert isinstance(granted, Opened)
    assert (granted.session, granted.attempt, granted.handle, granted.position) == (b"session1", 3, 7, 2)
    assert (granted.max_new_tokens, granted.max_draft, granted.window, granted.lease_s) == (20, 4, 2, 60.0)
    assert granted.end_tokens == (0, 5, 9)
    assert (len(granted.target), granted.target_id) == (200, TOY.target_id)
    assert granted.load is not None
    assert (granted.load.requests, granted.load.request_ms, granted.load.token_ms) == (2, 4.5, 1.25)


LOAD = EdgeLoad(requests=8, writing_ms=60.0, step_ms=30.0, request_ms=5.0, token_ms=2.0, free=1)


def test_what_has_hardly_changed_is_told_as_it_was() -> None:
    loads, acceptance, session = ReportedLoads(), AcceptanceByModel(), edge_session()
    first = loads.of(session, LOAD, acceptance)
    assert loads.of(session, LOAD.model_copy(update={"writing_ms": 66.0}), acceptance) is first
    changed = loads.of(session, LOAD.model_copy(update={"requests": 16}), acceptance)
    assert changed.requests == 16
    assert changed is not first


def test_it_changes_with_what_was_told_not_with_what_was_last_known() -> None:
    """Otherwise a slowly growing load would never be reported."""
    loads, acceptance, session = ReportedLoads(), AcceptanceByModel(), edge_session()
    told = {
        loads.of(session, LOAD.model_copy(update={"requests": requests}), acceptance).requests
        for requests in range(8, 33)
    }
    assert {8, 10} <= told
    assert 8 < len(told) < 16


def test_each_draft_model_has_its_acceptance() -> None:
    loads, acceptance = ReportedLoads(), AcceptanceByModel()
    good, poor = edge_session(), edge_session()
    good.draft_model, poor.draft_model = "good", "poor"
    for model, accepted in (("good", 9), ("poor", 3)):
        acceptance.count(model, "device", tested=10, accepted=accepted)
    assert loads.of(good, LOAD, acceptance).acceptance == 0.9
    assert loads.of(poor, LOAD, acceptance).acceptance == 0.3


def test_tokens_cost_nothing_only_for_a_text_that_is_to_repeat() -> None:
    loads, acceptance = ReportedLoads(), AcceptanceByModel()
    free = {}
    for mode in Mode:
        session = edge_session()
        session.policy = session.policy.model_copy(update={"mode": mode})
        free[session.policy.repeats] = loads.of(session, LOAD, acceptance).free
    assert free == {True: 1, False: 0}


def test_draft_models_without_end_are_forgotten() -> None:
    loads, acceptance, session = ReportedLoads(), AcceptanceByModel(), edge_session()
    for number in range(1000):
        session.draft_model = f"model-{number}"
        loads.of(session, LOAD, acceptance)
    assert len(loads._known) <= 128


TIMES = {"batch": 3, "queue_ms": 2.0, "prefill_ms": 5.0, "compute_ms": 40.0}


class Exchange:
    """Answers over a memory broker, with one device that listens and one session of it."""

    def __init__(self, form: FormName = FormName.AUTO, **message: object) -> None:
        self.clock, self.sink, self.broker = Clock(), Sink(), MemoryBroker()
        self.heard: list[SessionReply | Verdict] = []
        self.sizes: list[int] = []
        link, device = MemoryLink(self.broker, EDGE), MemoryLink(self.broker, "device-1")
        device.subscribe(build(Topic.SESSION, fleet=FLEET, device="device-1"), self._hear_reply)
        device.subscribe(build(Topic.VERDICT, fleet=FLEET, device="device-1"), self._hear_verdict)
        for each in (link, device):
            each.start(timeout_s=1.0)
        figures = Figures(self.clock)
        self.answers = Responder(
            edge=EDGE,
            target=replace(TOY, name="toy-target"),
            lease_s=60.0,
            publisher=Publisher(link, FLEET, figures),
            recorder=Recorder(self.sink, EDGE, self.clock.now),
            clock=self.clock,
            guard=DeviceGuard(QuotaSettings(), QuarantineSettings(), clock=self.clock),
            figures=figures,
            form=form,
        )
        self.session = edge_session(**message)
        self.answers.grant(self.session, open_message(), size=150)

    def judge(self, judgement: Judgement, **fields: object) -> None:
        self.session.admit(arrived(draft(**fields), at=self.clock()))  # type: ignore[arg-type]
        for result in self.session.settle(self.session.chain(100), judgement):
            self.answers.send_verdict(self.session, replace(result, **TIMES))  # type: ignore[arg-type]

    def reject(self) -> None:
        self.judge(Judgement(1, rejected=True, p=shape(TARGET.logits((1, 2)), self.session.policy)))

    def listen(self) -> list[SessionReply | Verdict]:
        self.broker.pump()
        heard, self.heard = self.heard, []
        return heard

    def _hear_reply(self, message: Message) -> None:
        self.heard.append(decode_reply(message.payload))

    def _hear_verdict(self, message: Message) -> None:
        self.sizes.append(len(message.payload))
        self.heard.append(decode_verdict(message.payload))


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


def test_a_fault_is_told_and_logged_with_its_session(exchange: Exchange) -> None:
    error = DraftFault(FaultCode.TOKENS_DIFFER, Action.RESUME, "Another text.")
    exchange.answers.send_fault("device-1", error, session=exchange.session, draft=draft(round_=4))
    exchange.answers.send_fault("device-1", DraftFault(FaultCode.MALFORMED, Action.GIVE_UP, "No message."))
    of_draft, of_nothing = exchange.listen()[-2:]
    assert isinstance(of_draft, Fault)
    assert isinstance(of_nothing, Fault)
    assert (of_draft.round, of_nothing.round) == (4, None)
    assert [event.session for event in exchange.sink.of("event")] == [b"session1".hex(), None]


def test_a_verdict_its_counters_and_its_record_agree(exchange: Exchange) -> None:
    exchange.judge(Judgement(2, rejected=False, token=7))
    verdict = exchange.listen()[-1]
    assert isinstance(verdict, Verdict)
    assert (verdict.accepted, verdict.next, verdict.queue_ms, verdict.compute_ms) == (2, 7, 2.0, 40.0)
    assert exchange.session.counters == SegmentCounters(
        tokens=3,
        rounds=1,
        drafted=2,
        tested=2,
        accepted=2,
        uplink_bytes=40,
        downlink_bytes=exchange.sizes[0],
        queue_ms=2.0,
        compute_ms=40.0,
        batch_sum=3,
        prefill_ms=5.0,
    )
    (record,) = exchange.sink.of("round")
    assert (record.batch, record.queue_ms, record.prefill_ms, record.compute_ms) == (3, 2.0, 5.0, 40.0)
    assert (record.form, record.downlink_bytes, record.accepted) == ("token", exchange.sizes[0], 2)


def test_p_goes_down_in_the_form_that_was_set_and_more_of_it_when_it_failed() -> None:
    exchange = Exchange(FormName.SAMPLES)
    exchange.reject()
    first = exchange.listen()[-1]
    assert isinstance(first, Verdict)
    assert isinstance(first.next, Samples)
    tried = len(first.next.ids)
    request = arrived(draft((), text=(4,), counted=False, round_=1, epoch=1, tried=tried), at=exchange.clock())
    exchange.session.admit(request)
    exchange.clock.seconds += 0.25
    exchange.answers.send_samples(exchange.session, request)
    more = exchange.listen()[-1]
    assert isinstance(more, Verdict)
    assert isinstance(more.next, Samples)
    assert (more.round, more.accepted, more.next.start, more.queue_ms) == (1, 0, tried, 250.0)
    counters = exchange.session.counters
    assert (counters.rounds, counters.resampled, counters.batch_sum, counters.mean_batch) == (2, 1, 3, 3.0)
    assert [(record.batch, record.form) for record in exchange.sink.of("round")] == [(3, "samples"), (0, "samples")]


def test_the_end_is_told_and_logged_with_all_that_was_counted(exchange: Exchange) -> None:
    exchange.judge(Judgement(2, rejected=False, token=7))
    exchange.answers.confirm_end(exchange.session, EndReason.LOST)
    closed = exchange.listen()[-1]
    assert isinstance(closed, Closed)
    assert (closed.reason, closed.tokens, closed.rounds, closed.mean_batch) == (EndReason.LOST, 3, 1, 3.0)
    assert (closed.queue_ms, closed.compute_ms) == (2.0, 40.0)
    (progress,) = exchange.sink.of("progress")
    assert all(getattr(progress, name) == getattr(exchange.session.counters, name) for name in SEGMENT_COUNTERS)
    assert [record.reason for record in exchange.sink.of("closed")] == [EndReason.LOST]


def test_the_end_of_a_session_is_confirmed_only_when_its_record_is_safe(exchange: Exchange) -> None:
    exchange.listen()
    exchange.sink.crashing = True
    exchange.answers.confirm_end(exchange.session, EndReason.STOP)
    assert exchange.listen() == []


def test_a_resumed_session_counts_what_it_writes_here() -> None:
    exchange = Exchange(resume=(4, 5))
    exchange.judge(Judgement(2, rejected=False, token=7), text=(4, 5))
    exchange.answers.record_leave(exchange.session, LeaveReason.HANDED_OVER)
    (progress,) = exchange.sink.of("progress")
    assert (progress.tokens, exchange.session.committed) == (3, 5)
    assert len(exchange.sink.of("left")) == 1

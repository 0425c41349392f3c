import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cbor2
import numpy as np
import pytest

from benchmarks.exactness.cases import fold_ends
from fleet_device.client.agent import Agent
from fleet_device.client.driver import SessionEnd
from fleet_device.client.messaging import ConnectionChanged
from fleet_device.drafters.suffix import SuffixDrafter
from fleet_device.drafters.suffix_index import History
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import EdgeUnavailable, InvalidRequest, ProtocolViolation, SessionFailed, SessionRefused
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import DraftOutcome, FixedPacing, Pacing, Plan
from fleet_device.requests.generate import Cancellation, GenerateRequest, Generation, RequestContext
from fleet_edge.session_log.records import Record
from sampling.distribution import Dist
from schemas.codec import encode_reply
from schemas.control import EdgeState, Presence
from schemas.messages import Closed, Fault
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action, EndReason, FaultCode, RefusalCode
from schemas.topics import Topic, build
from tests.support.drafts import close
from tests.support.log_records import of_kind
from tests.support.memory_broker import Faults
from tests.support.memory_device import announce_edge
from tests.support.memory_fleet import (
    EDGE,
    END,
    FLEET,
    TARGET,
    Device,
    MemoryFleet,
    lossless_text,
    possible,
    terms,
)
from tests.support.memory_link import MemoryLink
from tests.support.newer_release import rewrite
from tests.support.scripted_edge import PATIENCE, LoneDevice, closed
from tests.support.statistics import ALARM, p_value

PROMPT = (1, 2)
SEED = 6  # its output has no end token


class Scene(LoneDevice):
    def __init__(self, fleet: MemoryFleet | None = None, pacing: Pacing | None = None, *, context: int = 4096) -> None:
        self.fleet = fleet or MemoryFleet()
        super().__init__(self.fleet, pacing=pacing, context=context)
        self.say(Presence.ONLINE)
        self.fleet.settle()

    def write(
        self,
        seed: int = SEED,
        *,
        on_tokens: Callable[[Sequence[int]], bool | None] = lambda _tokens: None,
        cancellation: Cancellation | None = None,
        **given: Any,
    ) -> Generation:
        context = RequestContext(on_tokens=on_tokens, cancellation=cancellation or Cancellation())
        usual: dict[str, Any] = {"mode": Mode.COUPLED, "most": 40}
        return self.generate(seed=seed, context=context, **(usual | given))

    def say(self, presence: Presence, *, edge: str = EDGE) -> None:
        announce_edge(self.fleet, presence, edge=edge)

    def tell(self, message: Fault | Closed | bytes) -> None:
        link = MemoryLink(self.fleet.broker, "edge-voice")
        link.start(timeout_s=1.0)
        payload = message if isinstance(message, bytes) else encode_reply(message)
        link.publish(build(Topic.SESSION, fleet=FLEET, device="device-1"), payload)
        link.stop()

    def when(self, number: int, act: Callable[[], None]) -> None:
        """Run `act` just before the agent waits for the n-th time."""
        self.inbox.on_wait = lambda wait: act() if wait == number else None


@dataclass
class Watched(AdaptivePacing):
    plans: set[Plan] = field(default_factory=set)
    ways: set[bool] = field(default_factory=set)

    def learn(self, outcome: DraftOutcome) -> None:
        self.ways.add(outcome.ahead)
        AdaptivePacing.learn(self, outcome)

    def plan(self, *, longest: int, window: int) -> Plan:
        plan = AdaptivePacing.plan(self, longest=longest, window=window)
        self.plans.add(plan)
        return plan


def expected(seed: int = SEED, *, most: int = 40) -> tuple[int, ...]:
    return tuple(lossless_text(terms(seed, mode=Mode.COUPLED, max_new_tokens=most)))


@pytest.mark.parametrize("pacing", [FixedPacing(0), FixedPacing(3), FixedPacing(2, ahead=True), AdaptivePacing()])
def test_a_text_is_written_told_and_counted(pacing: Pacing) -> None:
    scene = Scene(pacing=pacing)
    told: list[int] = []
    done = scene.write(on_tokens=told.extend)
    assert done.tokens == expected()
    assert tuple(told) == done.tokens
    assert done.reason is EndReason.LENGTH
    assert (done.closed.tokens, done.closed.rounds, done.resumes) == (40, done.counters.rounds, 0)
    assert done.wall_ms >= (done.first_ms or 0.0)
    (closed,) = scene.fleet.sink.of("closed")
    assert (closed.counters.drafted, closed.counters.accepted) == (done.counters.drafted, done.counters.accepted)


def test_edge_only_decoding_generates_the_same() -> None:
    scene = Scene(pacing=FixedPacing(3))
    policy = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=5, top_p=0.93, seed=SEED)
    done = scene.agent.generate(GenerateRequest(PROMPT, policy, max_new_tokens=40, edge_only=True))
    assert done.tokens == expected()
    assert (done.counters.drafted, done.counters.edge_only) == (0, len(done.tokens))
    assert scene.write().counters.drafted > 0  # requests after it draft again


def test_behind_the_draft_models_context_the_target_writes_alone() -> None:
    scene = Scene(context=10)
    done = scene.write()
    assert done.tokens == expected()
    assert 0 < done.counters.drafted < Scene().write().counters.drafted / 2


def test_a_prompt_outside_the_draft_vocabulary_is_refused_before_any_open() -> None:
    scene = Scene()
    with pytest.raises(InvalidRequest):
        scene.write(prompt=(99,))
    scene.fleet.settle()
    assert list(scene.fleet.sink) == []


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ()}, RefusalCode.PROMPT_EMPTY),
        ({"most": 0}, RefusalCode.MAX_NEW_TOKENS),
        ({"most": 1 << 20}, RefusalCode.MAX_NEW_TOKENS),
        ({"prompt": (1,) * 300}, RefusalCode.PROMPT_TOO_LONG),
    ],
    ids=["empty", "nothing", "too much", "long"],
)
def test_a_refusal_is_passed_on(fields: dict[str, object], code: RefusalCode) -> None:
    with pytest.raises(SessionRefused) as caught:
        Scene().write(**fields)  # type: ignore[arg-type]
    assert caught.value.code is code


def test_without_an_edge_it_gives_up_and_says_what_to_do() -> None:
    scene = Scene()
    scene.edge_works = False
    before = scene.fleet.clock()
    with pytest.raises(EdgeUnavailable, match="edge-1"):
        scene.write()
    assert 5.0 <= scene.fleet.clock() - before <= 7.0


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("ahead", [False, True])
def test_an_edge_restart_is_survived(mode: Mode, ahead: bool) -> None:
    for wait in range(1, 12, 2):
        scene = Scene(pacing=FixedPacing(2, ahead=ahead))
        scene.when(wait, scene.fleet.restart_edge)
        done = scene.write(mode=mode)
        assert possible(terms(SEED, max_new_tokens=40), done.tokens)
        if mode is Mode.COUPLED:
            assert done.tokens == expected()
            assert done.resumes == 1


@pytest.mark.parametrize("refusals", [1, 4])
def test_an_open_refused_by_an_edge_that_ends_is_asked_again(refusals: int) -> None:
    scene = Scene()
    scene.fleet.edge.handlers.draining = True
    asked = 2 * refusals - 1  # it waits for the answer, and then for a while
    scene.when(asked, lambda: setattr(scene.fleet.edge.handlers, "draining", False))  # as if another took it
    before = scene.fleet.clock()
    done = scene.write()
    assert (done.tokens, done.resumes) == (expected(), 0)
    scene.fleet.edge.handlers.recorder.flush()
    last = scene.fleet.sink.of("event")[-1]
    assert (last.code, last.count) == ("draining", refusals)
    assert scene.fleet.clock() - before == refusals * PATIENCE.retry_s


def test_a_full_edge_is_waited_for_as_long_as_an_open_may_take() -> None:
    scene = Scene(fleet=MemoryFleet())
    scene.fleet.edge.sessions.most = 1
    other = Device(scene.fleet, "other", terms(1), length=2, ahead=False)
    other.open()
    scene.fleet.settle()
    session, before = next(iter(scene.fleet.edge.sessions)), scene.fleet.clock()
    with pytest.raises(SessionRefused) as caught:
        scene.write()
    assert caught.value.code is RefusalCode.BUSY
    assert PATIENCE.open_s <= scene.fleet.clock() - before <= PATIENCE.open_s + PATIENCE.retry_s
    before = scene.fleet.clock()
    scene.inbox.on_wait = lambda _wait: (
        scene.fleet.edge.sessions.remove(session) if scene.fleet.clock() >= before + 2.0 else None
    )
    assert scene.write().tokens == expected()
    assert scene.fleet.clock() >= before + 2.0


def test_a_text_that_ends_while_its_edge_ends_is_written_down_by_another() -> None:
    scene = Scene()

    def happen(wait: int) -> None:
        if scene.edge_works is False:
            scene.edge_works = True
            scene.fleet.settings = scene.fleet.settings.model_copy(update={"edge": "edge-2"})
            scene.fleet.restart_edge()
            scene.say(Presence.OFFLINE)
        elif wait == 3:
            scene.edge_works = False
            cancellation.cancel()

    cancellation = Cancellation()
    scene.inbox.on_wait = happen
    done = scene.write(cancellation=cancellation)
    assert done.closed is not None
    (closed,) = scene.fleet.sink.of("reported")
    assert (closed.reason, closed.tokens) == (EndReason.CANCELLED, len(done.tokens))


@pytest.mark.parametrize("when", ["within the wait for the confirmation", "as the wait ends"])
def test_an_edge_that_was_away_when_a_text_ended_receives_its_close_once_it_is_back(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, cancellation = Scene(), Cancellation()
    quiet = SessionEnd.on_quiet

    def back() -> None:
        scene.edge_works = True
        scene.fleet.restart_edge()
        scene.say(Presence.ONLINE)

    def happen(wait: int) -> None:
        if wait == 3:
            scene.edge_works = False
            cancellation.cancel()
        elif wait == 4 and when.startswith("within"):
            back()

    def on_quiet(closing: SessionEnd) -> None:
        quiet(closing)
        if not scene.edge_works:
            back()
            scene.fleet.settle()

    scene.inbox.on_wait = happen
    monkeypatch.setattr(SessionEnd, "on_quiet", on_quiet)
    done = scene.write(cancellation=cancellation)
    scene.fleet.settle()
    assert (done.closed is not None) is when.startswith("within")
    (closed,) = scene.fleet.sink.of("reported")
    assert (closed.session, closed.reason) == (done.session.hex(), EndReason.CANCELLED)


@pytest.mark.parametrize("comes_back", ["edge", "link"])
def test_an_edge_that_dies_before_the_end_is_recorded_hears_of_it_when_it_is_back(comes_back: str) -> None:
    scene = Scene()
    scene.fleet.sink.crashing = True
    opened = scene.fleet.sink.put

    def keep_openings(record: Record, *, urgent: bool = False, then: Callable[[], None] | None = None) -> None:
        scene.fleet.sink.crashing = not of_kind([record], "opened")
        opened(record, urgent=urgent, then=then)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene.fleet.sink, "put", keep_openings)
        done = scene.write()
    assert done.tokens == expected()
    assert done.closed is None, "an edge must not confirm what a crash can undo"
    assert not scene.fleet.sink.of("closed")
    scene.fleet.sink.crashing = False
    scene.fleet.restart_edge()
    if comes_back == "edge":
        scene.say(Presence.ONLINE)
    else:
        scene.fleet.broker.kill("device-1")
        scene.fleet.broker.revive("device-1")
    scene.fleet.settle()
    (closed,) = scene.fleet.sink.of("reported")
    assert (closed.session, closed.reason, closed.tokens) == (done.session.hex(), EndReason.LENGTH, 40)
    scene.say(Presence.ONLINE)
    scene.fleet.settle()
    assert len(scene.fleet.sink.of("reported")) == 1, "what is confirmed is not said again"


def test_a_lost_lease_is_resumed_and_the_resumed_segments_closed_counts() -> None:
    scene = Scene()
    deaf = Faults(drop=1.0, only=build(Topic.DRAFT, fleet=FLEET, device="device-1", edge=EDGE))

    def expire(wait: int) -> None:
        scene.fleet.broker.faults = deaf if wait == 2 else Faults()
        if wait == 3:  # the draft that would have renewed the lease is lost
            scene.fleet.clock.seconds += 61.0
            scene.fleet.edge.handlers.expire()

    scene.inbox.on_wait = expire
    before = scene.fleet.clock()
    done = scene.write()
    assert scene.fleet.clock() - before < 61.0 + PATIENCE.verdict_s  # at once, not when a repeated draft finds nobody
    assert done.tokens == expected()
    assert done.resumes == 1
    assert (done.closed.reason, done.closed.tokens) == (EndReason.LENGTH, 40)


def test_a_late_end_of_a_segment_resumed_elsewhere_is_ignored() -> None:
    scene = Scene()

    def stale() -> None:
        name = bytes.fromhex(scene.fleet.sink.of("opened")[-1].session)
        scene.tell(closed(close(session=name), attempt=7))

    scene.when(3, stale)
    done = scene.write()
    assert (done.tokens, done.resumes) == (expected(), 0)


@pytest.mark.parametrize("wait", [0, 3])
def test_a_fault_that_cannot_be_resumed_ends_the_session(wait: int) -> None:
    scene = Scene()
    scene.when(
        wait,
        lambda: scene.tell(Fault(handle=None, code=FaultCode.MALFORMED, action=Action.GIVE_UP, sentence="Nonsense.")),
    )
    with pytest.raises(SessionFailed, match="Nonsense"):
        scene.write()
    scene.fleet.settle()
    assert len(scene.fleet.edge.sessions) == 0
    assert [record.reason for record in scene.fleet.sink.of("closed")] == [EndReason.FAILED]


def test_a_fault_of_another_session_is_not_ours() -> None:
    scene = Scene()
    scene.when(3, lambda: scene.tell(Fault(handle=99, code=FaultCode.INTERNAL, action=Action.GIVE_UP, sentence="No.")))
    assert scene.write().tokens == expected()


@pytest.mark.parametrize("wait", [0, 1, 4])
def test_a_cancelled_text_ends_early_and_is_closed(wait: int) -> None:
    scene = Scene()
    cancellation = Cancellation()

    scene.when(wait, cancellation.cancel)
    done = scene.write(cancellation=cancellation)
    assert done.reason is EndReason.CANCELLED
    assert done.tokens == expected()[: len(done.tokens)]
    assert len(done.tokens) < 40
    scene.fleet.settle()
    assert len(scene.fleet.edge.sessions) == 0


def test_a_cancelled_text_does_not_wait_for_a_silent_edge() -> None:
    scene = Scene()
    cancellation = Cancellation()

    def cancel() -> None:
        scene.edge_works = False
        cancellation.cancel()

    scene.when(3, cancel)
    before = scene.fleet.clock()
    assert scene.write(cancellation=cancellation).reason is EndReason.CANCELLED
    assert scene.fleet.clock() - before <= PATIENCE.close_s


def test_a_text_cancelled_while_it_drafts_does_not_wait_either(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    cancellation = Cancellation()
    drafter = scene.agent.drafter

    def cancel(policy: SamplingPolicy) -> Dist | None:
        scene.edge_works = False
        cancellation.cancel()
        return ScriptedDrafter.next(drafter, policy)  # type: ignore[arg-type]

    monkeypatch.setattr(drafter, "next", cancel)
    before = scene.fleet.clock()
    assert scene.write(cancellation=cancellation).reason is EndReason.CANCELLED
    assert scene.fleet.clock() - before <= PATIENCE.close_s


@pytest.mark.parametrize("enough", range(3, 12))
def test_the_log_ends_a_text_where_its_device_does_whatever_is_verified_beyond(enough: int) -> None:
    scene = Scene(pacing=FixedPacing(2, ahead=True))
    seen: list[int] = []

    def stop(tokens: Sequence[int]) -> bool:
        seen.extend(tokens)
        return len(seen) >= enough

    done = scene.write(on_tokens=stop)
    (closed,) = scene.fleet.sink.of("closed")
    assert (closed.reason, closed.tokens) == (done.reason, len(done.tokens)) == (EndReason.STOP, len(seen))
    assert len(seen) < 40


def test_an_interrupt_closes_the_session_as_cancelled() -> None:
    scene = Scene()

    def interrupt() -> None:
        raise KeyboardInterrupt

    scene.when(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        scene.write()
    scene.fleet.settle()
    assert [record.reason for record in scene.fleet.sink.of("closed")] == [EndReason.CANCELLED]


def test_what_arrived_for_an_earlier_text_is_thrown_away() -> None:
    scene = Scene()
    scene.inbox.put(ConnectionChanged(up=True))
    scene.tell(Fault(handle=None, code=FaultCode.MALFORMED, action=Action.GIVE_UP, sentence="Old."))
    scene.fleet.broker.pump()
    assert scene.write().tokens == expected()


@pytest.mark.parametrize("seed", range(40))
def test_losses_of_every_kind_are_survived(seed: int) -> None:
    rng = random.Random(seed)
    fleet = MemoryFleet(rng=rng)
    fixed = FixedPacing(rng.randint(0, 4), ahead=rng.random() < 0.5)
    scene = Scene(fleet=fleet, pacing=AdaptivePacing() if seed % 4 == 0 else fixed)
    fleet.broker.faults = Faults(drop=0.1, duplicate=0.1, delay=0.2, reorder=0.1)
    scene.when(rng.randint(1, 10), fleet.restart_edge)
    assert scene.write().tokens == expected()


# An edge of the next minor release.


def changed(scene: Scene, *, topic: Topic, kind: str | None = None, **fields: object) -> None:
    """Change fields of the edge's messages of one kind, also to values that we do not know."""

    def change(at: Topic, content: Any) -> Any:
        ours = at is topic and (kind is None or content["kind"] == kind)
        return content | fields if ours else content

    rewrite(scene.fleet.broker, change)


def test_a_refusal_for_an_unknown_reason_is_not_waited_out() -> None:
    """A resuming device tries again only for reasons that are known to pass."""
    scene = Scene()

    def restart() -> None:
        scene.fleet.restart_edge()
        scene.fleet.edge.handlers.draining = True

    scene.when(3, restart)
    changed(scene, topic=Topic.SESSION, kind="refused", code="moving", sentence="The edge is moving.")
    before = scene.fleet.clock()
    with pytest.raises(SessionRefused, match="The edge is moving"):
        scene.write()
    assert scene.fleet.clock() - before < PATIENCE.resume_s


def test_an_action_that_is_unknown_is_giving_up_with_the_faults_own_sentence() -> None:
    scene = Scene()
    scene.when(3, scene.fleet.restart_edge)
    changed(scene, topic=Topic.SESSION, kind="fault", action="move", sentence="Go on at edge-2.")
    with pytest.raises(SessionFailed, match=r"^Go on at edge-2\.$"):
        scene.write()
    scene.fleet.settle()
    assert [record.reason for record in scene.fleet.sink.of("reported")] == [EndReason.FAILED]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_finish_that_is_unknown_ends_the_text_there(ahead: bool) -> None:
    scene = Scene(pacing=FixedPacing(2, ahead=ahead))

    def change(topic: Topic, content: Any) -> Any:
        return [*content[:4], 9, *content[5:]] if topic is Topic.VERDICT and content[1] >= 3 else content

    rewrite(scene.fleet.broker, change)
    before = scene.fleet.clock()
    done = scene.write()
    assert done.reason is EndReason.LENGTH
    assert 0 < len(done.tokens) < 40
    assert done.tokens == expected()[: len(done.tokens)]
    assert done.closed is not None
    assert scene.fleet.clock() == before  # nothing was waited for
    assert len(scene.fleet.edge.sessions) == 0


@pytest.mark.parametrize("number", [0, 6, 255])
def test_a_form_of_p_that_is_unknown_fails_the_session_by_name_and_nothing_is_guessed(number: int) -> None:
    scene = Scene()

    def change(topic: Topic, content: Any) -> Any:
        if topic is Topic.VERDICT and isinstance(content[3], list):
            content[3] = [number, *content[3][1:]]
        return content

    plain = Scene().write(mode=Mode.RESIDUAL)
    rewrite(scene.fleet.broker, change)
    told: list[int] = []
    before = scene.fleet.clock()
    with pytest.raises(ProtocolViolation, match=f"{number}"):
        scene.write(mode=Mode.RESIDUAL, on_tokens=told.extend)
    assert scene.fleet.clock() == before  # at once, not when all patience is spent
    assert tuple(told) == plain.tokens[: len(told)]
    scene.fleet.settle()
    assert [record.reason for record in scene.fleet.sink.of("closed")] == [EndReason.FAILED]


def test_in_coupled_mode_a_form_that_is_unknown_fails_the_session_too() -> None:
    scene = Scene()

    def change(topic: Topic, content: Any) -> Any:
        return [*content[:3], [7, "?"], *content[4:]] if topic is Topic.VERDICT else content

    rewrite(scene.fleet.broker, change)
    with pytest.raises(ProtocolViolation):
        scene.write()


def test_a_reply_of_an_unknown_kind_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.when(3, lambda: scene.tell(cbor2.dumps({"kind": "notice", "load": 0.9})))
    done = scene.write()
    assert (done.tokens, done.resumes, scene.inbox.malformed) == (expected(), 0, 1)
    assert re.search("down/session is ignored", caplog.text)


def test_an_edge_of_unknown_presence_keeps_its_session_and_gets_no_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    changed(scene, topic=Topic.EDGE_STATE, presence="warming-up")
    scene.when(3, lambda: scene.say(Presence.ONLINE))
    states: list[EdgeState] = []
    note = scene.inbox.edges.note_state

    def remember(edge: str, state: EdgeState) -> Presence | None:
        states.append(state)
        return note(edge, state)

    monkeypatch.setattr(scene.inbox.edges, "note_state", remember)
    done = scene.write()
    assert (done.tokens, done.resumes) == (expected(), 0)
    assert [state.presence for state in states] == [Presence.DRAINING]


def test_a_device_that_asks_for_a_setting_that_the_edge_lacks_is_told_which() -> None:
    scene = Scene()

    def change(topic: Topic, content: Any) -> Any:
        return content | {"policy": content["policy"] | {"top_a": 0.1}} if topic is Topic.OPEN else content

    rewrite(scene.fleet.broker, change)
    with pytest.raises(
        SessionFailed, match=r"policy\.top_a, which this release does not know: leave it out, or update"
    ):
        scene.write()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.RESIDUAL, pytest.param(Mode.COUPLED, marks=pytest.mark.exhaustive)])
def test_texts_follow_the_target_while_the_pacing_finds_its_way(mode: Mode) -> None:
    # With fresh seeds a false alarm would occur once in 10,000 runs.
    length, scene, pacing = 3, Scene(), Watched()
    ticks = itertools.count()
    scene.agent.pacing, scene.agent.clock = pacing, lambda: next(ticks) * 1e-3  # so that everything takes its time
    scene.agent._availability.clock = scene.agent.clock
    counts = np.zeros((TARGET.size,) * length, dtype=np.int64)
    for seed in range(1000):
        text = scene.write(seed, mode=mode, most=length).tokens
        counts[text + (END,) * (length - len(text))] += 1
    policy = SamplingPolicy(mode=mode, temperature=0.8, top_k=5, top_p=0.93, seed=0)
    law = fold_ends(TARGET.joint(PROMPT, length=length, policy=policy), (END,))
    assert p_value(counts.ravel(), law.ravel()) > ALARM
    assert len(pacing.plans) > 3
    assert pacing.ways == {False, True}


@pytest.mark.parametrize("length", [1, 3])
def test_what_an_agent_has_written_it_drafts_again_and_the_text_is_the_same(length: int) -> None:
    scene = Scene(pacing=FixedPacing(length))
    history = History(memory_bytes=100_000)
    drafter = SuffixDrafter.before(scene.agent.drafter, history)
    scene.agent = Agent(
        scene.link, FLEET, "device-1", drafter, scene.agent.pacing, scene.fleet.clock, PATIENCE, scene.inbox
    )
    written = [scene.write() for _ in range(4)]
    assert len({text.tokens for text in written}) == 1
    assert history.tokens > 4 * len(written[0].tokens)
    first, last = written[0].counters, written[-1].counters
    assert last.suffix_accepted > first.suffix_accepted
    assert last.suffix_accepted > 10

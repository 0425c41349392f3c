from collections.abc import Callable
from dataclasses import replace

import pytest

from fleet_device.errors import EdgeUnavailable, ProtocolViolation
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.settings import OfflinePolicy, Outages
from schemas.control import Presence
from schemas.messages import Draft, Open
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason, RefusalCode
from tests.support.memory_fleet import TARGET_ID
from tests.support.scripted_edge import Answers, LoneDevice, ScriptedEdge, accepted, opened, refusal

OTHER_ID = b"otherone"
KILLED_AT = 5  # tokens
LENGTH = 24
FAIL = Outages(policy=OfflinePolicy.FAIL, after_s=6.0)
LOCAL, WAIT, ANY = (
    replace(FAIL, policy=policy) for policy in (OfflinePolicy.LOCAL, OfflinePolicy.WAIT, OfflinePolicy.OTHER_TARGET)
)


class Scene:
    """Two edges with different target models; the first ends in the middle of a request."""

    def __init__(self) -> None:
        self.device = LoneDevice()
        self.first = self.edge("edge-1")
        self.second = self.edge("edge-2", OTHER_ID)
        self.tokens: list[int] = []
        self.origins: list[TokenOrigin] = []
        self.reasons: list[str] = []
        self.ended = False
        self.at_the_end: Callable[[], None] = lambda: None

    def edge(self, name: str, target_id: bytes = TARGET_ID) -> ScriptedEdge:
        def on_open(message: Open) -> Answers:
            if message.target_id not in (None, target_id):
                return [refusal(message, RefusalCode.OTHER_TARGET)]
            # The first Open is for the first edge, whichever of them the broker chooses.
            if not message.attempt and name != "edge-1":
                return [refusal(message, RefusalCode.BUSY)]
            return [opened(message, edge=name, target_id=target_id)]

        return ScriptedEdge(
            self.device.broker, name=name, target_id=target_id, on_open=on_open, on_draft=self.verify, shared=True
        )

    def verify(self, _message: Open, draft: Draft) -> Answers:
        return [accepted(draft, next=1)]

    def end(self, edge: ScriptedEdge) -> None:
        edge.say(Presence.OFFLINE)
        edge.stop()

    def generate(self, outages: Outages) -> Generation:
        def take(tokens: CommittedTokens) -> None:
            self.tokens += tokens.ids
            self.origins += tokens.origins
            if len(self.tokens) >= KILLED_AT and self.first.opens and not self.ended:
                self.ended = True
                self.end(self.first)
                self.at_the_end()

        self.device.broker.pump()
        policy = SamplingPolicy(temperature=0.8, top_k=5, top_p=0.93, seed=6)
        request = GenerateRequest((1, 2), policy=policy, max_new_tokens=LENGTH, outages=outages)
        return self.device.agent.generate(request, RequestContext(on_tokens=take, on_wait=self.reasons.append))


def test_a_request_waits_for_an_edge_of_its_own_target_and_says_so() -> None:
    scene = Scene()
    before = scene.device.clock()
    with pytest.raises(EdgeUnavailable) as unavailable:
        scene.generate(FAIL)
    assert unavailable.value.code == "other_target"
    assert scene.device.clock() - before == pytest.approx(FAIL.absence_s, abs=2.0)
    assert len(scene.tokens) < LENGTH
    assert scene.second.drafts == []
    assert len(scene.second.opens) <= 1, "presence says that it need not be asked"


def test_it_goes_on_once_such_an_edge_is_there() -> None:
    scene = Scene()
    later: list[ScriptedEdge] = []

    def start_third() -> None:
        if scene.reasons and not later:  # the wait was reported
            later.append(scene.edge("edge-3"))

    scene.device.inbox.each_second = start_third
    done = scene.generate(WAIT)
    assert (done.edge, done.reason, done.unverified, done.target_id) == ("edge-3", EndReason.LENGTH, 0, TARGET_ID)
    assert len(scene.reasons) == 1
    assert scene.second.drafts == []
    assert all(message.target_id == TARGET_ID for message in later[0].opens)


def test_another_file_under_the_old_name_is_noticed() -> None:
    scene = Scene()
    restarted: list[ScriptedEdge] = []

    def restart() -> None:
        if scene.ended and not restarted:
            restarted.append(scene.edge("edge-1", OTHER_ID))

    scene.device.inbox.each_second = restart
    with pytest.raises(EdgeUnavailable) as unavailable:
        scene.generate(FAIL)
    assert unavailable.value.code == "other_target"
    assert restarted[0].drafts == []


def test_it_goes_on_elsewhere_only_if_the_application_allows_it_and_the_tokens_are_marked() -> None:
    scene = Scene()
    done = scene.generate(ANY)
    own = len(scene.tokens) - done.unverified
    assert (done.edge, done.reason, len(done.tokens)) == ("edge-2", EndReason.LENGTH, LENGTH)
    assert KILLED_AT <= own < LENGTH
    assert TokenOrigin.OTHER_TARGET not in scene.origins[:own]
    assert set(scene.origins[own:]) == {TokenOrigin.OTHER_TARGET}
    assert done.target_id == TARGET_ID
    assert (scene.second.closes[-1].unverified, scene.second.closes[-1].tokens) == (done.unverified, LENGTH)


def test_with_that_permission_it_still_prefers_its_own_target() -> None:
    scene = Scene()
    scene.at_the_end = lambda: third.append(scene.edge("edge-3"))
    third: list[ScriptedEdge] = []
    done = scene.generate(ANY)
    assert (done.edge, done.unverified) == ("edge-3", 0)


def test_a_request_without_tokens_goes_anywhere() -> None:
    scene = Scene()
    scene.verify = lambda _message, _draft: ()  # type: ignore[method-assign]
    scene.first.on_draft = lambda _message, _draft: scene.end(scene.first) or ()  # type: ignore[func-returns-value]
    scene.second.on_draft = lambda _message, draft: [accepted(draft, next=1)]
    done = scene.generate(FAIL)
    assert (done.edge, done.unverified, done.target_id) == ("edge-2", 0, OTHER_ID)
    assert [message.target_id for message in scene.second.opens if message.attempt] == [None]


def test_the_shared_subscription_may_choose_a_foreign_edge_first() -> None:
    scene = Scene()
    scene.at_the_end = lambda: third.append(scene.edge("edge-3"))
    third: list[ScriptedEdge] = []
    foreign = [scene.edge(f"edge-{number}", OTHER_ID) for number in range(4, 8)]
    done = scene.generate(FAIL)
    assert (done.edge, done.unverified) == ("edge-3", 0)
    assert all(edge.drafts == [] for edge in foreign)


def test_an_edge_that_continues_with_another_target_is_not_believed() -> None:
    scene = Scene()
    scene.at_the_end = lambda: scene.second.say(Presence.ONLINE, target_id=TARGET_ID)  # it lies about itself
    scene.second.on_open = lambda message: (
        [opened(message, edge="edge-2", target_id=OTHER_ID)]
        if message.attempt
        else [refusal(message, RefusalCode.BUSY)]
    )
    with pytest.raises(ProtocolViolation):
        scene.generate(FAIL)
    assert scene.second.drafts == []


def test_without_an_edge_of_its_target_the_draft_model_goes_on_alone() -> None:
    scene = Scene()
    done = scene.generate(LOCAL)
    assert done.unverified > 0
    assert scene.origins[-1] is TokenOrigin.UNVERIFIED
    assert scene.second.drafts == []

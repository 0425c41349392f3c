import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fleet_device.client.reports import UnverifiedReports
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import EdgeUnavailable
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.service import retry_policy
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.settings import DeviceSettings, OfflinePolicy, Outages
from sampling.drawing import propose
from schemas.control import Presence
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from tests.fleet_device.client.test_agent import PROMPT, SEED, Scene, expected
from tests.support.memory_fleet import DRAFT, END, ChangingPacing
from tests.support.waiting import until

AFTER_S, ANSWER_S = 2.0, 4.0
FAIL = Outages(policy=OfflinePolicy.FAIL, after_s=AFTER_S, answer_s=ANSWER_S)
LOCAL = replace(FAIL, policy=OfflinePolicy.LOCAL)
MOST = 40


class Text:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.verified: list[bool] = []
        self.at: Callable[[int], None] = lambda _length: None

    @property
    def reads_verified(self) -> bool:
        return all(self.verified)

    def on_tokens(self, tokens: CommittedTokens) -> None:
        self.tokens += tokens.ids
        self.verified += [origin is not TokenOrigin.UNVERIFIED for origin in tokens.origins]
        self.at(len(self.tokens))


def write(scene: Scene, outages: Outages, text: Text | None = None, *, mode: Mode = Mode.COUPLED) -> Generation:
    text = text or Text()
    policy = SamplingPolicy(mode=mode, temperature=0.8, top_k=5, top_p=0.93, seed=SEED)
    done = scene.agent.generate(
        GenerateRequest(PROMPT, policy=policy, max_new_tokens=MOST, outages=outages),
        RequestContext(on_tokens=text.on_tokens),
    )
    assert text.tokens == list(done.tokens)
    assert text.verified == [True] * (len(done.tokens) - done.unverified) + [False] * done.unverified
    return done


def end_edge(scene: Scene, *, says: bool = True) -> None:
    scene.edge_works = False
    if says:
        scene.fleet._link.stop()
        scene.say(Presence.OFFLINE)


def bring_back(scene: Scene) -> None:
    scene.fleet.restart_edge()
    scene.edge_works = True
    scene.say(Presence.ONLINE)
    scene.fleet.settle()


def alone(tokens: Sequence[int], *, mode: Mode = Mode.COUPLED) -> int:
    """Return the token that the draft model generates after a prefix, by the request's own random numbers."""
    policy = SamplingPolicy(mode=mode, temperature=0.8, top_k=5, top_p=0.93, seed=SEED)
    drafter = ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,))
    drafter.reset((*PROMPT, *tokens))
    q = drafter.next(policy)
    assert q is not None
    return propose(q, policy=policy, position=len(tokens)).token


def hang(scene: Scene) -> None:
    end_edge(scene, says=False)


def wake(scene: Scene) -> None:
    scene.edge_works = True


def lose_broker(scene: Scene) -> None:
    scene.fleet.broker.go_down()


def bring_back_broker(scene: Scene) -> None:
    scene.fleet.broker.come_up()
    scene.say(Presence.ONLINE)


each_way = pytest.mark.parametrize("interrupt", [end_edge, hang, lose_broker])


def test_nobody_there_from_the_beginning_is_told_within_seconds_and_the_next_time_at_once() -> None:
    scene = Scene()
    end_edge(scene)
    for limit_s in (AFTER_S, 0.0):
        before = scene.fleet.clock()
        with pytest.raises(EdgeUnavailable):
            write(scene, FAIL)
        assert limit_s <= scene.fleet.clock() - before <= limit_s + 1.0


each_interruption = pytest.mark.parametrize(
    ("interrupt", "end"),
    [(end_edge, bring_back), (hang, wake), (lose_broker, bring_back_broker)],
    ids=["edge", "hung edge", "broker"],
)


@pytest.mark.parametrize("begun", [False, True])
@each_interruption
def test_by_default_a_request_rides_out_an_interruption(
    interrupt: Callable[[Scene], None], end: Callable[[Scene], None], begun: bool
) -> None:
    assert ridden_out(Scene(), [interrupt, end], begun=begun) == expected()


@pytest.mark.parametrize("begun", [False, True])
@each_interruption
def test_a_request_may_wait_for_hours(
    interrupt: Callable[[Scene], None], end: Callable[[Scene], None], begun: bool
) -> None:
    assert ridden_out(Scene(), [interrupt, end], begun=begun, apart_s=10_000.0, offline="wait") == expected()


def test_interruptions_one_after_the_other_do_not_add_up() -> None:
    """No token comes between the first and the last step: the edge hangs, and its broker restarts."""
    assert ridden_out(Scene(), [hang, lose_broker, bring_back_broker, wake], begun=True) == expected()


def ridden_out(
    scene: Scene, steps: Sequence[Callable[[Scene], None]], *, begun: bool, apart_s: float = 15.0, **given: str
) -> tuple[int, ...]:
    """Return a text by settings, with a step every 15 s, the first before or during the text."""
    defaults = DeviceSettings.model_validate(given)
    scene.agent.retry_policy = retry_policy(defaults)
    at: list[float] = []

    def step() -> None:
        steps[len(at)](scene)
        at.append(scene.fleet.clock())

    def each_second() -> None:
        if 0 < len(at) < len(steps) and scene.fleet.clock() >= at[-1] + apart_s:
            step()

    scene.inbox.each_second = each_second
    if begun:
        scene.when(3, step)
    else:
        step()
    done = write(scene, defaults.outages())
    assert (len(at), done.unverified) == (len(steps), 0)
    return done.tokens


@pytest.mark.parametrize("mode", Mode)
@each_way
def test_the_draft_model_goes_on_alone_and_says_so(interrupt: Callable[[Scene], None], mode: Mode) -> None:
    scene, text = Scene(), Text()
    scene.when(5, lambda: interrupt(scene))
    before = scene.fleet.clock()
    done = write(scene, LOCAL, text, mode=mode)
    limit_s = ANSWER_S if interrupt is hang else AFTER_S
    assert limit_s <= scene.fleet.clock() - before <= limit_s + 1.0
    verified = len(done.tokens) - done.unverified
    assert 0 < verified < len(done.tokens)
    assert done.reason is (EndReason.STOP if done.tokens[-1] == END else EndReason.LENGTH)
    for position in range(verified, len(done.tokens)):
        assert done.tokens[position] == alone(done.tokens[:position], mode=mode)
    if mode is Mode.COUPLED:
        assert done.tokens[:verified] == expected()[:verified]


def test_a_drafter_without_a_model_cannot_go_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    monkeypatch.setattr(scene.agent.drafter, "next", lambda _policy: None)
    scene.when(3, lambda: end_edge(scene))
    with pytest.raises(EdgeUnavailable):
        write(scene, LOCAL)


def test_another_edge_that_is_there_goes_on_whatever_the_policy() -> None:
    for outages in (FAIL, LOCAL):
        scene = Scene()

        def happen(wait: int, scene: Scene = scene) -> None:
            if wait == 3:  # the one says that it is gone while the other is there
                scene.fleet.settings = scene.fleet.settings.model_copy(update={"edge": "edge-2"})
                scene.fleet.restart_edge()
                scene.say(Presence.OFFLINE)
                scene.say(Presence.ONLINE, edge="edge-2")

        scene.inbox.on_wait = happen
        done = write(scene, outages)
        assert (done.tokens, done.unverified, done.edge) == (expected(), 0, "edge-2")


def test_an_edge_that_is_back_changes_nothing_for_a_request_that_goes_on_alone() -> None:
    scene, text = Scene(), Text()
    scene.when(5, lambda: end_edge(scene))

    def at(_length: int) -> None:
        if not text.reads_verified:
            scene.fleet.clock.seconds += 1.5
            scene.say(Presence.ONLINE)  # and nobody is there
            scene.fleet.broker.pump()

    text.at = at
    done = write(scene, LOCAL, text)
    assert done.unverified
    for position in range(len(done.tokens) - done.unverified, len(done.tokens)):
        assert done.tokens[position] == alone(done.tokens[:position])


@pytest.mark.parametrize("granted", [False, True])
def test_the_end_says_for_which_application_the_text_was_unless_an_edge_knows(granted: bool) -> None:
    scene = Scene()
    if granted:
        scene.when(5, lambda: end_edge(scene))
    else:
        end_edge(scene)
    policy = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=5, top_p=0.93, seed=SEED)
    scene.agent.generate(GenerateRequest(PROMPT, policy=policy, max_new_tokens=MOST, outages=LOCAL, app="meter"))
    (kept,) = scene.agent._unconfirmed._closes.values()
    assert kept.unverified
    assert kept.app == (None if granted else "meter")


class Weather:
    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng, self.up = scene, rng, True

    def may_change(self, chance: float) -> None:
        if self.rng.random() >= chance:
            return
        broker = self.scene.fleet.broker
        if not self.up:
            if not broker.up:
                broker.come_up()
            bring_back(self.scene)
        elif self.rng.random() < 0.5:
            end_edge(self.scene)
        else:
            broker.go_down(forget_retained=False)
        self.up = not self.up

    def pass_time(self) -> None:
        self.scene.fleet.clock.seconds += self.rng.choice((0.0, 0.4, 1.5))
        self.may_change(0.2)
        self.scene.fleet.broker.pump()


def test_the_session_log_is_told_once_when_an_edge_is_back(tmp_path: Path) -> None:
    scene = Scene()
    reports = scene.agent.reports = UnverifiedReports(tmp_path / "unverified")
    scene.agent.attach()
    reports.start()
    scene.when(5, lambda: end_edge(scene))
    done = write(scene, LOCAL)
    assert len(reports) == 1
    bring_back(scene)
    until(lambda: scene.fleet.settle() or len(reports) == 0)
    scene.say(Presence.ONLINE)
    scene.fleet.settle()
    reports.stop()
    told = {record.session: record for record in scene.fleet.sink.of("reported")}
    assert set(told) == {done.session.hex()}
    record = told[done.session.hex()]
    assert (record.tokens, record.counters.unverified) == (len(done.tokens), done.unverified)


@pytest.mark.parametrize("seed", range(24))
def test_whatever_happens_the_verified_head_follows_the_target(seed: int) -> None:
    rng = random.Random(seed)
    scene, text = Scene(pacing=ChangingPacing(rng=random.Random(seed))), Text()
    weather = Weather(scene, rng)
    scene.inbox.on_wait = lambda _wait: weather.may_change(0.25)
    text.at = lambda _length: None if text.reads_verified else weather.pass_time()
    done = write(scene, LOCAL, text)
    verified = len(done.tokens) - done.unverified
    assert done.reason is (EndReason.STOP if done.tokens[-1] == END else EndReason.LENGTH)
    assert done.unverified or len(done.tokens) == MOST
    assert done.tokens[:verified] == expected()[:verified]
    for position in range(verified, len(done.tokens)):
        assert done.tokens[position] == alone(done.tokens[:position])

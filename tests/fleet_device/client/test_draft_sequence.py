from dataclasses import dataclass, field

import pytest

from dssd.distribution import Dist
from fleet_device.client.drafting import DraftSequence
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.session.machine import DeviceSession
from schemas.messages import Opened, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason, Finish
from tests.support.memory_fleet import DRAFT, terms

PROMPT = (1, 2)


@dataclass
class Scene:
    """A coupled session that is open, and drafting for it with a draft model that can fall silent."""

    context: int = 4096
    silent: bool = False
    times: list[float] = field(default_factory=lambda: [0.0])

    def __post_init__(self) -> None:
        scene = self

        class Model(ScriptedDrafter):
            def next(self, policy: SamplingPolicy) -> Dist | None:  # type: ignore[override]
                scene.times[0] += 0.25
                return None if scene.silent else super().next(policy)

        asked = terms(6, mode=Mode.COUPLED, prompt=PROMPT)
        self.model = Model(DRAFT, DRAFT.words, context=self.context)
        self.session = DeviceSession(asked)
        self.session.open()
        self.session.on_opened(
            Opened(
                session=asked.session, handle=7, edge="edge-1", target="toy", position=0, max_new_tokens=12,
                max_draft=4, window=1, lease_s=60.0, end_tokens=(),
            )
        )  # fmt: skip
        self.drafting = DraftSequence(self.session, self.model, lambda: self.times[0])
        self.drafting.rewind()

    def draft(self, limit: int = 4) -> tuple[int, ...]:
        """Draft all that may be drafted and send it."""
        while self.drafting.draft(limit):
            pass
        return self.session.send().tokens

    def judge(self, accepted: int, token: int, finish: Finish = Finish.NO) -> None:
        for effect in self.session.on_verdict(Verdict(handle=7, round=0, accepted=accepted, next=token, finish=finish)):
            self.drafting.follow(effect)

    @property
    def sequence(self) -> tuple[int, ...]:
        return tuple(self.model._tokens)


def test_the_draft_model_goes_ahead_as_far_as_the_draft_may() -> None:
    scene = Scene()
    drafted = scene.draft(3)
    assert len(drafted) == 3
    assert scene.sequence == (*PROMPT, *drafted)
    assert scene.session.counters.draft_ms == 750.0


@pytest.mark.parametrize(("accepted", "token"), [(3, 5), (1, 5), (0, 4)])
def test_it_follows_the_text(accepted: int, token: int) -> None:
    scene = Scene()
    drafted = scene.draft(3)
    scene.judge(accepted, token)
    assert scene.sequence == (*PROMPT, *drafted[:accepted], token) == (*PROMPT, *scene.session.committed)


def test_it_follows_no_text_that_has_ended() -> None:
    scene = Scene()
    drafted = scene.draft(3)
    scene.judge(1, 5, Finish.STOP)
    assert scene.session.ended is EndReason.STOP
    assert scene.sequence == (*PROMPT, *drafted)


def test_it_goes_back_to_the_committed_text() -> None:
    scene = Scene()
    scene.draft(3)
    scene.judge(1, 5)
    scene.drafting.draft(4)
    scene.session.open()
    scene.drafting.rewind()
    assert scene.sequence == (*PROMPT, *scene.session.committed)


def test_nothing_is_drafted_without_an_idea_or_behind_the_context() -> None:
    assert Scene(silent=True).draft() == ()
    assert len(Scene(context=4).draft()) == 2

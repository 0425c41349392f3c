import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from fleet_edge.verifiers.contract import Item, Logits
from schemas.messages import Closed, Fault, Opened
from schemas.policy import Mode
from schemas.reasons import EndReason
from tests.fleet_edge.test_pieces import AskingScene
from tests.support.memory_fleet import Device, MemoryFleet, run, terms
from tests.support.waiting import PATIENCE_S, until

LENGTH = 20


class Steps:
    """Runs hooks during an edge's steps, and records concurrent use of the verifier in `clashes`."""

    def __init__(self, fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.computed: list[Sequence[Item]] = []
        self.clashes: list[str] = []
        self._meanwhile: Callable[[], None] | None = None
        self._failure: Exception | None = None
        self._in_use = threading.RLock()
        for name in ("open", "close", "fork", "truncate", "computed", "fits", "capacity"):
            monkeypatch.setattr(fleet.verifier, name, self._alone(name, getattr(fleet.verifier, name)))
        score = self._alone("score", fleet.verifier.score)

        def scored(items: Sequence[Item]) -> Logits:
            self.computed.append(items)
            with self._in_use:
                act, self._meanwhile = self._meanwhile, None
                if act is not None:
                    act()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            return score(items)

        monkeypatch.setattr(fleet.verifier, "score", scored)

    def during_next(self, act: Callable[[], None], *, failing: Exception | None = None) -> None:
        """Run `act` during the next step, on the thread that computes it; `failing` makes the step fail."""
        self._meanwhile, self._failure = act, failing

    def _alone(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> object:
            if not self._in_use.acquire(blocking=False):
                self.clashes.append(name)
                return method(*arguments)
            try:
                return method(*arguments)
            finally:
                self._in_use.release()

        return call


class Scene(AskingScene):
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(piece_s=0.0, length=LENGTH)
        self.steps = Steps(self.fleet, monkeypatch)

    def ask_meanwhile(self, round_: int, **draft: Any) -> None:
        """Send a draft during the next step, and wait until it is handled."""

        def act() -> None:
            self.ask(round_, **draft)
            taken = threading.Event()
            self.fleet.edge.inbox.put(taken.set)
            assert taken.wait(PATIENCE_S)
            self.fleet.edge.inbox.put(taken.clear)  # the messages of that take come after its calls
            until(lambda: not taken.is_set())

        self.steps.during_next(act)

    @property
    def written(self) -> list[int]:
        return self.session.tokens[self.session.prompt_length :]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    scene = Scene(monkeypatch)
    yield scene
    assert scene.steps.clashes == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_an_open_is_answered_while_a_step_is_computed(scene: Scene) -> None:
    other = Device(scene.fleet, "other", terms(7, mode=Mode.COUPLED, max_new_tokens=LENGTH), length=3, ahead=False)
    answered: list[object] = []

    def open_other() -> None:
        other.open()
        until(lambda: scene.fleet.broker.pump() >= 0 and bool(other.messages))
        answered.extend(other.messages)

    scene.steps.during_next(open_other)
    scene.ask(0, base=0, tokens=scene.text[:2])
    scene.fleet.step()
    assert [type(message) for message in answered] == [Opened]
    assert scene.written == scene.text[:3]
    session = scene.fleet.edge.sessions.by_name(other.name, other.terms.session)
    scene.fleet.settle()
    assert scene.fleet.verifier.computed(session.handle) == len(other.terms.prompt) - 1


def test_verdicts_are_sent_during_the_next_step(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    edge, link = scene.fleet.edge, scene.fleet._link
    computing: list[bool] = []
    publish = link.publish

    def published(*arguments: Any, **options: Any) -> None:
        computing.append(edge._running is not None)
        publish(*arguments, **options)

    monkeypatch.setattr(link, "publish", published)
    told: list[int] = []

    def look() -> None:
        until(lambda: len(scene.verdicts) == 1)
        told.append(len(scene.verdicts))

    scene.steps.during_next(lambda: scene.steps.during_next(look))
    scene.ask(0, base=0, write=2)
    scene.fleet.settle()
    assert told == [1]
    assert computing == [True, False]
    assert scene.written == scene.text[:2]


@pytest.mark.parametrize("drafted", [True, False])
def test_a_session_that_is_closed_in_a_step_has_no_verdict(scene: Scene, drafted: bool) -> None:
    device = scene.device if drafted else Device(scene.fleet, "other", terms(7), length=3, ahead=False)

    def close() -> None:
        device.session.cancel(EndReason.CANCELLED)
        device.driver.closing.send_close()
        until(lambda: scene.fleet.broker.pump() >= 0 and any(isinstance(each, Closed) for each in device.messages))

    scene.steps.during_next(close)
    if drafted:
        scene.ask(0, base=0, tokens=scene.text[:2])
    else:
        device.open()  # and its prompt is computed
        scene.fleet.broker.pump()
    scene.fleet.step()
    scene.fleet.settle()
    assert len(scene.steps.computed) == 1
    assert not scene.verdicts
    (closed,) = scene.fleet.sink.of("closed")
    assert (closed.reason, closed.tokens) == (EndReason.CANCELLED, 0)
    assert not scene.fleet.sink.of("round")
    assert scene.fleet.sink.of("progress")[-1].rounds == 0
    handles = {session.handle for session in scene.fleet.edge.sessions}
    assert set(scene.fleet.verifier._table.lengths) == handles
    scheduler = scene.fleet.edge.scheduler
    assert set(scheduler._used) == set(scheduler._prefill_log._steps) == handles


def test_a_session_that_is_resumed_in_a_step_goes_on_from_what_it_was_resumed_with(scene: Scene) -> None:
    scene.ask(0, base=0, tokens=scene.text[:2])

    def resume() -> None:
        scene.device.resume()
        until(lambda: scene.fleet.broker.pump() >= 0 and bool(scene.device.messages))

    scene.steps.during_next(resume)
    scene.fleet.step()
    scene.fleet.settle()
    assert [type(message) for message in scene.device.messages] == [Opened]
    assert scene.written == []
    run(scene.fleet, [scene.device], random.Random(0))
    assert scene.device.session.committed == scene.text


def test_a_request_to_write_on_costs_no_token_that_is_being_computed(scene: Scene) -> None:
    scene.ask(0, base=0, write=4)
    scene.ask_meanwhile(1, base=0, write=8)
    scene.fleet.settle()
    assert scene.written == scene.text[:8]
    assert len(scene.steps.computed) == 8
    assert [verdict.round for verdict in scene.verdicts] == [1] * 8


def test_a_request_to_stop_voids_the_token_that_is_being_computed(scene: Scene) -> None:
    scene.ask(0, base=0, write=8)
    scene.ask_meanwhile(1, base=0, write=0)
    scene.fleet.settle()
    assert scene.written == []
    assert [verdict.written for verdict in scene.verdicts] == [()]
    scene.ask(2, base=0, write=2)
    scene.fleet.settle()
    assert scene.written == scene.text[:2]


def test_a_draft_takes_the_place_of_the_token_that_is_being_computed(scene: Scene) -> None:
    scene.ask(0, base=0, write=8)
    scene.ask_meanwhile(1, base=0, tokens=scene.text[:3])
    scene.fleet.settle()
    assert scene.written == scene.text[:4]
    assert [(verdict.round, verdict.accepted) for verdict in scene.verdicts] == [(1, 3)]


def test_a_draft_that_is_given_up_in_its_step_is_not_decided_on(scene: Scene) -> None:
    scene.ask(0, base=0, tokens=scene.text[:3])
    scene.ask_meanwhile(1, base=0, write=2)
    scene.fleet.settle()
    assert [(verdict.round, verdict.written) for verdict in scene.verdicts] == [
        (1, (scene.text[0],)), (1, (scene.text[1],)),
    ]  # fmt: skip
    assert scene.written == scene.text[:2]


def test_a_draft_that_comes_again_in_its_step_is_answered_once(scene: Scene) -> None:
    scene.ask(0, base=0, tokens=scene.text[:3])
    scene.ask_meanwhile(0, base=0, tokens=scene.text[:3])
    scene.fleet.settle()
    assert [verdict.round for verdict in scene.verdicts] == [0]


def test_a_failed_step_reports_to_those_who_wait(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    other = scene.join("other", 7)
    scene.steps.computed.clear()
    other.act()
    scene.ask(0, base=0, tokens=scene.text[:2])

    def close() -> None:
        other.session.cancel(EndReason.CANCELLED)
        other.driver.closing.send_close()
        until(lambda: scene.fleet.broker.pump() >= 0 and bool(other.messages))

    scene.steps.during_next(close, failing=RuntimeError("no power"))
    with caplog.at_level(logging.CRITICAL):
        scene.fleet.step()
    scene.fleet.broker.pump()
    assert len(scene.steps.computed[0]) == 2
    assert [type(message) for message in other.messages] == [Closed]
    (fault,) = scene.device.messages
    assert isinstance(fault, Fault)
    assert "no power" in fault.sentence


def test_what_has_begun_is_told_before_the_end(scene: Scene) -> None:
    scene.ask(0, base=0, write=LENGTH)
    scene.fleet.step()  # has begun the next one
    scene.fleet.edge.receive_last(wait_s=0.0)
    assert len(scene.verdicts) == len(scene.steps.computed) == 2

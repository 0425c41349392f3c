from collections.abc import Sequence

import pytest

from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.verifiers.contract import Item, Logits, TargetAway
from schemas.codec import encode_draft
from schemas.messages import Draft, Fault, Verdict
from schemas.policy import Mode
from schemas.topics import Topic
from schemas.vocabulary import EMPTY_DIGEST, extend_digest
from tests.support.memory_fleet import EDGE, Device, MemoryFleet, lossless_text, terms

SEED = 6  # its output has no end token
LENGTH = 40
STEP_S = 0.03


class AskingScene:
    """An edge and one device whose drafts the test writes itself."""

    def __init__(self, *, piece_s: float, length: int) -> None:
        self.fleet = MemoryFleet(settings={"piece_s": piece_s})
        self.length = length
        self.device = self.join("device-1", SEED)
        self.text = lossless_text(self.device.terms)

    def join(self, name: str, seed: int) -> Device:
        asked = terms(seed, mode=Mode.COUPLED, max_new_tokens=self.length)
        device = Device(self.fleet, name, asked, length=3, ahead=False)
        device.open()
        self.fleet.settle()
        assert device.driver.step()  # takes the grant
        return device

    def ask(self, round_: int, *, base: int, write: int | None = None, tokens: Sequence[int] = ()) -> None:
        opened = self.device.session.opened
        digest = extend_digest(EMPTY_DIGEST, self.text[:base])
        message = Draft(
            handle=opened.handle, round=round_, epoch=0, base=base, digest=digest, tokens=tuple(tokens), write=write
        )
        self.device.publish(Topic.DRAFT, encode_draft(message), edge=EDGE)
        self.fleet.broker.pump()

    @property
    def session(self) -> EdgeSession:
        session = self.fleet.edge.sessions.by_name(self.device.name, self.device.terms.session)
        assert session is not None
        return session

    @property
    def verdicts(self) -> list[Verdict]:
        self.fleet.broker.pump()
        return [message for message in self.device.messages if isinstance(message, Verdict)]


class Scene(AskingScene):
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, step_s: float = STEP_S, piece_s: float = 0.1) -> None:
        super().__init__(piece_s=piece_s, length=LENGTH)
        self.failure: Exception | None = None
        score = self.fleet.verifier.score

        def slowly(items: Sequence[Item]) -> Logits:
            self.fleet.clock.seconds += step_s
            failure, self.failure = self.failure, None
            if failure is not None:
                raise failure
            return score(items)

        monkeypatch.setattr(self.fleet.verifier, "score", slowly)

    def pieces(self) -> list[tuple[int, ...]]:
        taken = self.verdicts
        assert all(tuple(self.text[each.base : each.base + len(each.written or ())]) == each.written for each in taken)
        self.device.messages[:] = [message for message in self.device.messages if not isinstance(message, Verdict)]
        return [each.written or () for each in taken]

    def lengths(self) -> list[int]:
        return [len(piece) for piece in self.pieces()]


def test_the_first_token_is_sent_at_once_and_others_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.ask(0, base=0, write=LENGTH)
    for _ in range(10):
        scene.fleet.step()
    assert scene.lengths() == [1, 3, 3, 3]


@pytest.mark.parametrize(("step_s", "piece_s"), [(0.03, 0.0), (0.0, 0.0), (0.06, 0.1)])
def test_slow_tokens_are_sent_one_by_one(monkeypatch: pytest.MonkeyPatch, step_s: float, piece_s: float) -> None:
    scene = Scene(monkeypatch, step_s=step_s, piece_s=piece_s)
    scene.ask(0, base=0, write=LENGTH)
    for _ in range(6):
        scene.fleet.step()
    assert scene.lengths() == [1] * 6


def test_the_device_is_told_when_half_is_written_and_when_all_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for more then; if it learned that late, the edge would idle."""
    scene = Scene(monkeypatch, step_s=0.001)
    scene.ask(0, base=0, write=16)
    scene.fleet.settle()
    assert scene.lengths() == [1, 7, 8]


def test_a_new_request_does_not_make_the_next_token_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.ask(0, base=0, write=16)
    scene.fleet.step()
    scene.ask(1, base=1, write=LENGTH)
    for _ in range(3):
        scene.fleet.step()
    assert scene.lengths() == [1, 3]


def test_a_request_to_stop_is_answered_with_all_that_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.ask(0, base=0, write=LENGTH)
    for _ in range(3):
        scene.fleet.step()
    assert scene.lengths() == [1]
    scene.ask(1, base=1, write=0)
    scene.fleet.settle()
    assert scene.lengths() == [2]


def test_each_piece_with_something_new_is_a_round_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are counted as the device does, whichever message a piece answers, also if the session migrates."""
    scene = Scene(monkeypatch)
    scene.ask(0, base=0, write=LENGTH)
    for _ in range(3):
        scene.fleet.step()
    scene.ask(1, base=1, write=0)
    scene.fleet.edge._receive(0.0)
    assert (scene.lengths(), scene.session.counters.rounds) == ([1, 2], 2)
    scene.ask(1, base=1, write=0)  # which it repeats
    scene.fleet.settle()
    assert (scene.lengths(), scene.session.counters.rounds) == ([2], 2)
    scene.ask(2, base=3, write=4)
    scene.fleet.settle()
    assert (sum(scene.lengths()), scene.session.counters.tokens) == (4, 7)


def test_what_waits_is_sent_where_the_next_step_fails_for_want_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.ask(0, base=0, write=LENGTH)
    scene.fleet.step()
    scene.fleet.step()
    assert scene.lengths() == [1]
    scene.fleet.edge.finish_step()
    assert scene.lengths() == [2]
    scene.fleet.step()  # and has begun the next, whose token waits
    scene.failure = TargetAway("It is away.", retry_s=60.0)
    scene.fleet.step()
    scene.fleet.step()
    assert sum(scene.lengths()) >= 1
    session = scene.session
    assert session.decode.sent == session.committed


def test_every_token_counts_against_the_quota_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    spent: list[int] = []
    monkeypatch.setattr(type(scene.fleet.edge.answers.guard), "spend", lambda _guard, _device, n: spent.append(n))
    scene.ask(0, base=0, write=10)
    scene.fleet.settle()
    assert sum(spent) == 10
    assert len(spent) == len(scene.pieces()) < 10


def test_a_failed_session_sends_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(monkeypatch)
    scene.ask(0, base=0, write=LENGTH)
    scene.fleet.step()
    scene.fleet.step()
    scene.pieces()
    scene.fleet.edge.finish_step()
    scene.pieces()
    scene.failure = RuntimeError("no power")
    with caplog.at_level("CRITICAL"):
        scene.fleet.step()
    scene.fleet.broker.pump()
    assert [type(message) for message in scene.device.messages] == [Fault]

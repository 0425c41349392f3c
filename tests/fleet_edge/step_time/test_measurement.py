"""A verifier whose steps take what a formula says, on a clock of its own, comes out as that formula."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_edge.step_time.errors import CurveError
from fleet_edge.step_time.measurement import MOST_NEW, CurveMeasurement
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetInfo
from schemas.policy import Mode
from schemas.vocabulary import Vocabulary

SIZE = 60


@dataclass
class TimedVerifier:
    """Takes 5 ms a step, 2 for each sequence, 1 for each token."""

    room: int = 1 << 20
    context: int = 1024
    now: float = 0.0
    lengths: dict[int, int] = field(default_factory=dict)
    stable: set[bool] = field(default_factory=set)

    @property
    def info(self) -> TargetInfo:
        return TargetInfo("timed", Vocabulary(size=SIZE, fingerprint=bytes(32)), self.context, (0,))

    def open(self, sequence: int) -> None:
        self.lengths[sequence] = 0

    def fork(self, sequence: int, source: int, length: int) -> None:
        if sum(self.lengths.values()) + length > self.room:
            raise CapacityExceeded("full")
        assert self.lengths[source] >= length
        self.lengths[sequence] = length

    def fits(self, items: Sequence[Item]) -> bool:
        return sum(self.lengths.values()) + sum(len(item.tokens) for item in items) <= self.room

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        self.stable |= {item.stable for item in items}
        for item in items:
            self.lengths[item.sequence] += len(item.tokens)
            assert self.lengths[item.sequence] <= self.context
        self.now += (5 + sum(2 + len(item.tokens) for item in items)) / 1e3
        return np.zeros((sum(item.rows for item in items), SIZE), np.float32)

    def truncate(self, sequence: int, length: int) -> None:
        self.lengths[sequence] = length

    def close(self, sequence: int) -> None:
        del self.lengths[sequence]


def measurement(verifier: TimedVerifier, **how: object) -> CurveMeasurement:
    return CurveMeasurement(clock=lambda: verifier.now, **how)  # type: ignore[arg-type]


def test_each_size_takes_what_its_steps_took_and_nothing_is_left() -> None:
    verifier = TimedVerifier()
    curve = measurement(verifier).measure(verifier, engine="timed")  # type: ignore[arg-type]
    assert list(curve.rows) == [1, 2, 4, 8, 16, 32, 64]
    for sessions, tokens, ms in curve.steps():
        assert ms == pytest.approx(5 + sessions * (2 + tokens))
    assert curve.step_ms(0, 0, prefill=256) == pytest.approx(5 + 2 + 256)
    assert (curve.target, curve.engine, curve.context) == ("timed", "timed", 256)
    assert verifier.lengths == {}


@pytest.mark.parametrize(("mode", "stable"), [(Mode.RESIDUAL, False), (Mode.COUPLED, True)])
def test_steps_are_those_of_the_mode(mode: Mode, stable: bool) -> None:
    verifier = TimedVerifier()
    curve = measurement(verifier, mode=mode, sessions=(1,)).measure(verifier)  # type: ignore[arg-type]
    assert verifier.stable == {stable}
    assert curve.mode == mode.value


def test_the_curve_ends_where_memory_does() -> None:
    verifier = TimedVerifier(room=6 * 300)
    curve = measurement(verifier).measure(verifier)  # type: ignore[arg-type]
    assert list(curve.rows) == [1, 2, 4]
    assert verifier.lengths == {}


def test_the_curve_ends_when_its_time_is_over() -> None:
    verifier = TimedVerifier()
    curve = measurement(verifier, limit_s=0.0).measure(verifier)  # type: ignore[arg-type]
    assert list(curve.rows) == [1]
    assert len(curve.rows[1]) == 6


def test_prompts_are_as_long_as_the_context_lets_them() -> None:
    verifier = TimedVerifier(context=255)
    curve = measurement(verifier, sessions=(1,)).measure(verifier)  # type: ignore[arg-type]
    assert [tokens for tokens, _ in curve.prefill] == [16, 64, 128]
    assert curve.context == 255 - MOST_NEW


def test_a_context_that_holds_no_measurement_is_refused() -> None:
    verifier = TimedVerifier(context=15)
    with pytest.raises(CurveError, match="larger --context"):
        measurement(verifier).measure(verifier)  # type: ignore[arg-type]
    assert verifier.lengths == {}

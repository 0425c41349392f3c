import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from fleet_edge.step_curve import CurveError, CurveMeasurement, StepCurve, as_json, read_curve, write_curve
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetInfo
from schemas.vocabulary import Vocabulary

CURVE = StepCurve(
    rows={1: ((1, 10), (3, 20), (9, 26)), 4: ((1, 30), (3, 60)), 16: ((1, 90), (3, 120))},
    prefill=((16, 40), (128, 264)),
)
TIMES = st.floats(0.1, 1000.0)


def curves() -> st.SearchStrategy[StepCurve]:
    row = st.dictionaries(st.integers(2, 32), TIMES, max_size=4)
    rows = st.dictionaries(st.integers(2, 64), st.tuples(TIMES, row), max_size=3)
    prefill = st.dictionaries(st.integers(1, 512), TIMES, max_size=3)
    first = st.tuples(TIMES, row)
    return st.builds(
        lambda one, more, prompts: StepCurve(
            rows={sessions: ((1, ms), *others.items()) for sessions, (ms, others) in {**more, 1: one}.items()},
            prefill=tuple(prompts.items()),
        ),
        first,
        rows,
        prefill,
    )


@pytest.mark.parametrize(
    ("sessions", "tokens", "ms"),
    [
        (1, 1, 10.0),
        (16, 3, 120.0),
        (1, 2, 15.0),  # between tokens
        (1, 6, 23.0),
        (2.5, 1, 20.0),  # between sessions
        (10, 2, 75.0),  # both: halfway between 45 and 105
        (1, 15, 32.0),  # beyond the last tokens, with the last slope
        (32, 1, 180.0),  # beyond the last sessions, in proportion
    ],
)
def test_a_step_is_interpolated(sessions: float, tokens: float, ms: float) -> None:
    assert CURVE.step_ms(sessions, tokens) == pytest.approx(ms)


def test_a_prompt_alone_and_beside_verification() -> None:
    assert CURVE.step_ms(0, 0, prefill=72) == pytest.approx(152.0)
    assert CURVE.step_ms(4, 1, prefill=128) == pytest.approx(30.0 + 264.0 - 40.0)
    assert CURVE.step_ms(4, 1, prefill=0) == pytest.approx(30.0)


def test_a_measurement_that_was_disturbed_makes_no_larger_step_cheaper() -> None:
    curve = StepCurve(rows={1: ((1, 30), (3, 12)), 2: ((1, 11), (3, 40))}, prefill=())
    assert curve.step_ms(1, 3) == pytest.approx(30.0)
    assert curve.step_ms(2, 1) == pytest.approx(30.0)


@given(
    curve=curves(),
    sessions=st.floats(1, 200),
    tokens=st.floats(1, 64),
    prefill=st.floats(0, 600),
    more=st.floats(0, 50),
)
def test_a_step_with_more_of_anything_takes_no_less(
    curve: StepCurve, sessions: float, tokens: float, prefill: float, more: float
) -> None:
    step_ms = curve.step_ms(sessions, tokens, prefill=prefill)
    slack = 1e-9 * max(1.0, step_ms)
    assert step_ms > 0.0
    assert curve.step_ms(sessions + more, tokens, prefill=prefill) >= step_ms - slack
    assert curve.step_ms(sessions, tokens + more, prefill=prefill) >= step_ms - slack
    assert curve.step_ms(sessions, tokens, prefill=prefill + more) >= step_ms - slack


@pytest.mark.parametrize(
    "rows",
    [
        {2: ((1, 10),)},
        {1: ((2, 10),)},
        {1: ((1, 10),), 4: ((3, 10),)},
        {1: ((1, 10), (1, 11))},
        {1: ((1, 0),)},
        {1: ((1, float("nan")),)},
        {1: ((1, 1e9),)},
    ],
)
def test_a_curve_that_says_nothing_is_refused(rows: Any) -> None:
    with pytest.raises(CurveError):
        StepCurve(rows=rows, prefill=())


def good() -> dict[str, Any]:
    return as_json(CURVE)


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        *(
            json.dumps(good() | {"rows": rows})
            for rows in ({}, {"1": [[1]]}, {"1": [[1, -1]]}, {"1": []}, {"2": [[1, 1]]})
        ),
        json.dumps(good() | {"unknown": 1}),
        " " * (1 << 20) + "{}",
    ],
)
def test_a_file_that_holds_no_curve_is_one_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "curve.json"
    file.write_text(content)
    with pytest.raises(CurveError) as failed:
        read_curve(file)
    assert "\n" not in str(failed.value)
    assert str(file) in str(failed.value)


def test_a_file_that_is_not_there_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CurveError):
        read_curve(tmp_path / "none.json")
    with pytest.raises(CurveError):
        write_curve(CURVE, tmp_path / "none" / "curve.json")


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
    for sessions, row in curve.rows.items():
        assert [ms for _, ms in row] == pytest.approx([5 + sessions * (2 + tokens) for tokens, _ in row])
    assert curve.step_ms(0, 0, prefill=256) == pytest.approx(5 + 2 + 256)
    assert (curve.target, curve.engine, curve.context) == ("timed", "timed", 256)
    assert verifier.lengths == {}


def test_the_curve_ends_where_memory_does() -> None:
    verifier = TimedVerifier(room=6 * 300)
    curve = measurement(verifier).measure(verifier)  # type: ignore[arg-type]
    assert list(curve.rows) == [1, 2, 4]
    assert verifier.lengths == {}


def test_a_context_that_holds_no_measurement_is_refused() -> None:
    verifier = TimedVerifier(context=15)
    with pytest.raises(CurveError, match="--context"):
        measurement(verifier).measure(verifier)  # type: ignore[arg-type]
    assert verifier.lengths == {}

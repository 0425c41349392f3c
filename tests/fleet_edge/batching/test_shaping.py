"""Rows that are shaped at once, as arrays or as tensors, are shaped as the reference law shapes each."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dssd.distribution import shape
from fleet_edge.batching import shaping, torch_shaping
from fleet_edge.batching.shaping import ShapedRows
from schemas.policy import SamplingPolicy

Rows = NDArray[np.float32]
ShapeRows = Callable[[Rows, Sequence[SamplingPolicy], int], ShapedRows]
VOCABULARY = 30


def of_tensors(logits: Rows, policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    return torch_shaping.shape_rows(torch.from_numpy(logits), policies, support)


both = pytest.mark.parametrize("shape_rows", [shaping.shape_rows, of_tensors])


def check(shape_rows: ShapeRows, logits: Rows, policies: Sequence[SamplingPolicy], support: int) -> None:
    before = logits.copy()
    shaped = shape_rows(logits, policies, support)
    np.testing.assert_array_equal(logits, before)
    for number, (row, policy) in enumerate(zip(logits, policies, strict=True)):
        try:
            expected = shape(row, policy)
        except ValueError:
            with pytest.raises(ValueError, match="not numbers"):
                shaped.row(number)
            continue
        found = shaped.row(number)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.probs == pytest.approx(expected.probs, rel=1e-6)
        assert (found.probs.astype(np.float32) == found.probs).all()


@both
@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    support=st.integers(1, VOCABULARY - 1),
    choices=st.lists(
        st.tuples(st.sampled_from((0.01, 0.3, 1.0, 5.0)), st.sampled_from((1e-9, 0.3, 0.8, 0.999, 1.0))),
        min_size=1,
        max_size=5,
    ),
    ties=st.booleans(),
    hidden=st.sampled_from((0.0, 0.3, 0.95)),
    wrong=st.sampled_from((0.0, 0.0, 0.02)),
)
def test_rows_are_shaped_as_the_law_shapes_each(
    *,
    shape_rows: ShapeRows,
    seed: int,
    support: int,
    choices: list[tuple[float, float]],
    ties: bool,
    hidden: float,
    wrong: float,
) -> None:
    random = np.random.default_rng(seed)
    logits = (2 * random.normal(size=(len(choices), VOCABULARY))).astype(np.float32)
    logits = np.round(logits) if ties else logits
    logits[random.random(logits.shape) < hidden] = -np.inf
    logits[random.random(logits.shape) < wrong] = np.inf
    logits[random.random(logits.shape) < wrong] = np.nan
    policies = [SamplingPolicy(temperature=t, top_p=p, top_k=support, seed=1) for t, p in choices]
    check(shape_rows, logits, policies, support)


@both
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("temperature", "support"), [(0.0, 1), (1.0, 1), (1.0, 5)])
def test_a_row_of_nothing_but_what_is_no_number_is_refused(
    shape_rows: ShapeRows, wrong: float, temperature: float, support: int
) -> None:
    logits = np.full((2, VOCABULARY), wrong, dtype=np.float32)
    logits[1] = 1.0
    check(shape_rows, logits, [SamplingPolicy(temperature=temperature, top_k=support, seed=1)] * 2, support)


@both
def test_of_equals_the_lower_ids_are_kept(shape_rows: ShapeRows) -> None:
    logits = np.zeros((1, VOCABULARY), dtype=np.float32)
    logits[0, [4, 20]] = 1.0
    check(shape_rows, logits, [SamplingPolicy(top_k=4, seed=1)], 4)
    check(shape_rows, logits, [SamplingPolicy(temperature=0, seed=1)], 1)


@both
def test_a_head_that_reaches_top_p_exactly_is_not_lengthened(shape_rows: ShapeRows) -> None:
    logits = np.full((1, VOCABULARY), -9.0, dtype=np.float32)
    logits[0, [3, 5, 7, 9]] = 1.0
    policy = SamplingPolicy(top_k=4, top_p=0.5, seed=1)
    check(shape_rows, logits, [policy], 4)
    assert shape_rows(logits, [policy], 4).row(0).ids.tolist() == [3, 5]


@both
def test_a_temperature_of_nearly_0_leaves_the_largest(shape_rows: ShapeRows) -> None:
    logits = np.random.default_rng(1).normal(size=(1, VOCABULARY)).astype(np.float32)
    check(shape_rows, logits, [SamplingPolicy(temperature=1e-308, top_k=5, seed=1)], 5)


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.0), (0.9, 0.7)])
def test_arrays_and_tensors_of_a_real_size_are_shaped_alike(top_p: float, temperature: float) -> None:
    logits = 4 * np.random.default_rng(5).standard_normal((20, 49_152), dtype=np.float32)
    policies = [SamplingPolicy(temperature=temperature, top_k=50, top_p=top_p, seed=1)] * len(logits)
    check(shaping.shape_rows, logits, policies, 50)
    check(of_tensors, logits, policies, 50)

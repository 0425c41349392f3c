import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from fleet_edge.batching import shaping, torch_shaping
from fleet_edge.batching.shaping import ShapedRows
from sampling.distribution import DEPTH, shape
from schemas.policy import SamplingPolicy

Head = tuple[NDArray[np.float32], NDArray[np.int64]]
TopK = Callable[[NDArray[Any], int], Head]


def of_tensors(logits: NDArray[Any], k: int) -> Head:
    values, ids = torch_shaping.top_k(torch.from_numpy(logits), k)
    return values.numpy(), ids.numpy()


both = pytest.mark.parametrize("top_k", [shaping.top_k, of_tensors])


def check(top_k: TopK, logits: NDArray[np.float32], k: int) -> None:
    values, ids = top_k(logits, k)
    assert (values.dtype, ids.dtype) == (np.float32, np.int64)
    # Ascending and reversed: NaN comes first, and of equal values the lower id.
    expected = np.argsort(logits[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :k]
    expected = logits.shape[1] - 1 - expected
    assert ids.tolist() == expected.tolist()
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


@both
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 4),
    size=st.integers(1, 6 * DEPTH + 3),
    k=st.integers(1, 12),
    levels=st.sampled_from([1, 2, 5, 1000]),
    hidden=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    wrong=st.sampled_from([0.0, 0.0, 0.01, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_a_stable_sort_with_ties_infinities_and_what_is_no_number(
    *, top_k: TopK, rows: int, size: int, k: int, levels: int, hidden: float, wrong: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = random.integers(-levels, levels + 1, size=(rows, size)).astype(np.float32)
    logits[random.random(logits.shape) < hidden] = -np.inf
    logits[random.random(logits.shape) < wrong] = np.inf
    logits[random.random(logits.shape) < wrong] = np.nan
    check(top_k, logits, k)


@both
@pytest.mark.parametrize("size", [49_152, 151_665])
@pytest.mark.parametrize("k", [1, 50, 1000])
def test_equals_a_stable_sort_at_the_size_of_real_vocabularies(top_k: TopK, size: int, k: int) -> None:
    logits = 4 * np.random.default_rng(size + k).standard_normal((3, size), dtype=np.float32)
    check(top_k, logits, k)
    check(top_k, np.round(logits, 1), k)  # many ties


@both
@pytest.mark.parametrize("k", [9, 10, 11, DEPTH, 10 * DEPTH - 1, 10 * DEPTH, 20 * DEPTH + 1])
def test_a_k_beyond_the_columns_or_the_row_is_a_sort(top_k: TopK, k: int) -> None:
    check(top_k, np.random.default_rng(1).standard_normal((2, 10 * DEPTH), dtype=np.float32), k)


@both
def test_zeros_of_both_signs_are_equal(top_k: TopK) -> None:
    logits = np.zeros((1, 4 * DEPTH), dtype=np.float32)
    logits[0, ::2] = -0.0
    check(top_k, logits, 1)
    check(top_k, logits, 3)


@both
def test_the_largest_may_lie_behind_the_last_whole_line_of_columns(top_k: TopK) -> None:
    logits = np.random.default_rng(3).standard_normal((2, 5 * DEPTH + 3), dtype=np.float32)
    logits[:, -2:] = 100.0
    check(top_k, logits, 3)


@both
def test_a_view_with_padding_cut_off_is_read_in_place(top_k: TopK) -> None:
    whole = np.random.default_rng(2).standard_normal((4, 5 * DEPTH), dtype=np.float32)
    whole[:, 300:] = 100.0
    check(top_k, whole[:, :300], 3)


@both
@pytest.mark.parametrize(
    ("logits", "k"),
    [(np.zeros((2, 4), np.float32), 0), (np.zeros(4, np.float32), 1), (np.zeros((2, 4)), 1)],
)
def test_what_is_no_rows_of_float32_is_refused(top_k: TopK, logits: NDArray[Any], k: int) -> None:
    with pytest.raises(ValueError, match="float32"):
        top_k(logits, k)


Rows = NDArray[np.float32]
ShapeRows = Callable[[Rows, Sequence[SamplingPolicy], int], ShapedRows]
VOCABULARY = 30


def shaping_of_tensors(logits: Rows, policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    return torch_shaping.shape_rows(torch.from_numpy(logits), policies, support)


shaping_both = pytest.mark.parametrize("shape_rows", [shaping.shape_rows, shaping_of_tensors])


def shaping_check(shape_rows: ShapeRows, logits: Rows, policies: Sequence[SamplingPolicy], support: int) -> None:
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


@shaping_both
@settings(max_examples=120, deadline=None)
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
    shaping_check(shape_rows, logits, policies, support)


@shaping_both
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("temperature", "support"), [(0.0, 1), (1.0, 1), (1.0, 5)])
def test_a_row_of_no_numbers_is_refused(shape_rows: ShapeRows, wrong: float, temperature: float, support: int) -> None:
    logits = np.full((2, VOCABULARY), wrong, dtype=np.float32)
    logits[1] = 1.0
    shaping_check(shape_rows, logits, [SamplingPolicy(temperature=temperature, top_k=support, seed=1)] * 2, support)


@shaping_both
def test_a_head_that_reaches_top_p_exactly_is_not_lengthened(shape_rows: ShapeRows) -> None:
    logits = np.full((1, VOCABULARY), -9.0, dtype=np.float32)
    logits[0, [3, 5, 7, 9]] = 1.0
    policy = SamplingPolicy(top_k=4, top_p=0.5, seed=1)
    shaping_check(shape_rows, logits, [policy], 4)
    assert shape_rows(logits, [policy], 4).row(0).ids.tolist() == [3, 5]


@shaping_both
def test_a_temperature_of_nearly_0_leaves_the_largest(shape_rows: ShapeRows) -> None:
    logits = np.random.default_rng(1).normal(size=(1, VOCABULARY)).astype(np.float32)
    shaping_check(shape_rows, logits, [SamplingPolicy(temperature=1e-308, top_k=5, seed=1)], 5)


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.0), (0.9, 0.7)])
def test_arrays_and_tensors_of_a_real_size_are_shaped_alike(top_p: float, temperature: float) -> None:
    logits = 4 * np.random.default_rng(5).standard_normal((20, 49_152), dtype=np.float32)
    policies = [SamplingPolicy(temperature=temperature, top_k=50, top_p=top_p, seed=1)] * len(logits)
    shaping_check(shaping.shape_rows, logits, policies, 50)
    shaping_check(shaping_of_tensors, logits, policies, 50)

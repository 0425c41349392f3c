"""Both `top_k`, of arrays and of tensors, are the head of a stable descending sort, whatever the logits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fleet_edge.batching import topk, torch_topk

Head = tuple[NDArray[np.float32], NDArray[np.int64]]
TopK = Callable[[NDArray[Any], int], Head]
DEPTH = topk.DEPTH


def of_tensors(logits: NDArray[Any], k: int) -> Head:
    values, ids = torch_topk.top_k(torch.from_numpy(logits), k)
    return values.numpy(), ids.numpy()


both = pytest.mark.parametrize("top_k", [topk.top_k, of_tensors])


def check(top_k: TopK, logits: NDArray[np.float32], k: int) -> None:
    values, ids = top_k(logits, k)
    assert (values.dtype, ids.dtype) == (np.float32, np.int64)
    # Ascending and reversed: what is not a number comes first, and of equals the lower id.
    expected = np.argsort(logits[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :k]
    expected = logits.shape[1] - 1 - expected
    assert ids.tolist() == expected.tolist()
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


@both
@settings(max_examples=150, deadline=None)
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
@pytest.mark.parametrize("size", [49_152, 50_257, 151_665])
@pytest.mark.parametrize("k", [1, 50, 300, 1000])
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
def test_what_is_no_number_comes_first(top_k: TopK) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 8 * DEPTH), dtype=np.float32)
    logits[0, 100] = np.nan
    logits[1] = np.nan
    logits[2, [3, 70, 140, 210, 280]] = np.nan
    check(top_k, logits, 1)
    check(top_k, logits, 4)


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
    with pytest.raises(ValueError, match="float32 logits"):
        top_k(logits, k)

"""`top_k` is the head of a stable descending sort, whatever the logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_edge.batching.topk import BLOCK, top_k


def _check(logits: torch.Tensor, k: int) -> None:
    values, ids = top_k(logits, k)
    expected_values, expected_ids = logits.sort(dim=1, descending=True, stable=True)
    assert values.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids[:, :k])
    torch.testing.assert_close(values, expected_values[:, :k], atol=0, rtol=0, equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 4),
    size=st.integers(1, 6 * BLOCK + 3),
    k=st.integers(1, 12),
    levels=st.sampled_from([1, 2, 5, 1000]),
    hidden=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_a_stable_sort_with_ties_and_minus_infinity(
    *, rows: int, size: int, k: int, levels: int, hidden: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels + 1, (rows, size), generator=generator).float()
    logits[torch.rand(logits.shape, generator=generator) < hidden] = -torch.inf
    _check(logits, k)


@pytest.mark.parametrize("size", [49_152, 50_257, 151_665])
@pytest.mark.parametrize("k", [1, 50, 300])
def test_equals_a_stable_sort_at_the_size_of_real_vocabularies(size: int, k: int) -> None:
    logits = 4 * torch.randn(3, size, generator=torch.Generator().manual_seed(size + k))
    _check(logits, k)
    _check(logits.bfloat16().float(), k)  # many ties


@pytest.mark.parametrize("k", [BLOCK, 10 * BLOCK, 20 * BLOCK + 1])
def test_a_k_beyond_the_blocks_or_the_row_is_a_sort(k: int) -> None:
    _check(torch.randn(2, 10 * BLOCK, generator=torch.Generator().manual_seed(1)), k)


def test_zeros_of_both_signs_are_equal() -> None:
    logits = torch.zeros(1, 4 * BLOCK)
    logits[0, ::2] = -0.0
    _check(logits, 3)


def test_nan_sorts_first() -> None:
    logits = torch.randn(3, 8 * BLOCK, generator=torch.Generator().manual_seed(1))
    logits[0, 100] = torch.nan
    logits[1] = torch.nan
    logits[2, [3, 70, 140, 210, 280]] = torch.nan
    _check(logits, 4)


def test_a_view_with_padding_cut_off_is_read_in_place() -> None:
    whole = torch.randn(4, 5 * BLOCK, generator=torch.Generator().manual_seed(2))
    whole[:, 300:] = 100.0
    _check(whole[:, :300], 3)


@pytest.mark.parametrize(
    ("logits", "k"),
    [(torch.zeros(2, 4), 0), (torch.zeros(4), 1), (torch.zeros(2, 4, dtype=torch.float64), 1)],
)
def test_other_tensors_are_refused(logits: torch.Tensor, k: int) -> None:
    with pytest.raises(ValueError, match="float32 logits"):
        top_k(logits, k)

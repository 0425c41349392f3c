import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention, silu

from fleet_edge.verifiers.packed.kernels import ROWS_AT_ONCE, Kernels, kernels
from fleet_edge.verifiers.packed.lean import Product, Quantized, Workspace, hadamard

ULP = 2.0**-23
LOOPS = kernels(parallel=False)


@pytest.fixture(params=[False, True], ids=["one thread", "threads"])
def loops(request: pytest.FixtureRequest) -> Kernels:
    return kernels(parallel=request.param)


def _floats(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _numbers(quantized: Quantized) -> npt.NDArray[np.float64]:
    return (quantized.rows.astype(np.float64) - 128) * quantized.scales[:, None]


@given(
    rows=st.integers(1, 14),
    fours=st.integers(1, 40),
    outputs=st.integers(1, 150),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_exact_sums(rows: int, fours: int, outputs: int, extreme: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (outputs, 4 * fours))
    inputs = rng.integers(1, 256, (rows, 4 * fours))
    if extreme:
        weight, inputs = np.sign(weight) * 127, np.where(inputs < 128, 1, 255)
    scale, bias = _floats(seed, outputs), _floats(seed + 1, outputs)
    tensors = {"w.weight": weight.astype(np.int8), "w.scale": scale, "w.bias": bias}
    product = Product({name: torch.from_numpy(array) for name, array in tensors.items()}, "w", LOOPS, Workspace())
    given_ = Quantized(inputs.astype(np.uint8), np.abs(_floats(seed + 2, rows)))
    wanted = (((inputs - 128) @ weight.T).astype(np.float32) * scale * given_.scales[:, None]) + bias
    assert np.array_equal(product(given_)[:, :outputs], wanted.astype(np.float32))


@pytest.mark.parametrize("width", [4, 20, 576])
def test_rows_are_added_normalized_and_quantized(loops: Kernels, width: int) -> None:
    x, more, eps = 5 * _floats(1, 7, width), _floats(2, 7, width + 9), np.float32(0.1)
    wanted = (x + more[:, :width]).astype(np.float64)
    found = Quantized.empty(7, width)
    loops.normalize(x, more, eps, found.rows, found.scales)
    assert np.array_equal(x, wanted.astype(np.float32))
    wanted /= np.sqrt((wanted**2).sum(1, keepdims=True) + eps)
    step = np.abs(wanted).max(1, keepdims=True) / 127
    assert (np.abs(_numbers(found) - wanted) <= 0.5001 * step).all()


def test_a_row_of_zeros_stays_zero(loops: Kernels) -> None:
    found = Quantized.empty(1, 8)
    loops.quantize(np.zeros((1, 8), np.float32), found.rows, found.scales)
    assert not _numbers(found).any()


@pytest.mark.parametrize("size", [1, 2, 32, 512])
def test_gate_and_up_are_multiplied_and_spread(loops: Kernels, size: int) -> None:
    inner = 3 * size if size > 2 else 12
    both = 3 * _floats(3, 5, 2 * inner + 7)
    gate, up = torch.from_numpy(both).double().split([inner, inner + 7], 1)
    wanted = ((silu(gate) * up[:, :inner]).reshape(-1, size) @ hadamard(size).double()).reshape(5, inner).numpy()
    found = Quantized.empty(5, inner)
    loops.gate(both, size, found.rows, found.scales)
    step = np.abs(wanted).max(1, keepdims=True) / 127
    assert (np.abs(_numbers(found) - wanted) <= 0.501 * step).all()


@pytest.mark.parametrize("large", [-1e30, -200.0, -87.0, 87.0, 1e30])
def test_gates_far_from_zero_are_finite(loops: Kernels, large: float) -> None:
    both = np.full((1, 8), large, np.float32)
    both[:, 4:] = 1
    found = Quantized.empty(1, 4)
    loops.gate(both, 1, found.rows, found.scales)
    assert np.isfinite(found.scales).all()
    assert _numbers(found)[0, 0] == pytest.approx(max(large, 0.0), rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(("shared", "kv_heads"), [(1, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("start", [0, 1, 15, 127, 140])
def test_attention_is_that_of_torch(loops: Kernels, shared: int, kv_heads: int, start: int) -> None:
    dim, rows, capacity = 8, ROWS_AT_ONCE + 3, 160
    keys, values = _floats(4, 2, kv_heads, dim, capacity), _floats(5, 2, kv_heads, capacity, dim)
    query, out = (
        2 * _floats(6, rows, shared * kv_heads * dim + 5),
        np.empty((rows, shared * kv_heads * dim), np.float32),
    )
    positions = np.arange(start, start + rows, dtype=np.int32)
    keys[:, :, :, start + rows :] = values[:, :, start + rows :] = np.nan  # memory that was never written
    starts = np.array([0, ROWS_AT_ONCE, rows], np.int32)
    loops.attend(query, np.ones(rows, np.int32), positions, starts, keys, values, shared, out)
    seen = slice(0, start + rows)
    heads = torch.from_numpy(query[:, : shared * kv_heads * dim]).view(rows, -1, dim).transpose(0, 1)
    wanted = scaled_dot_product_attention(
        heads.double(),
        torch.from_numpy(keys[1, :, :, seen]).transpose(1, 2).repeat_interleave(shared, 0).double(),
        torch.from_numpy(values[1, :, seen]).repeat_interleave(shared, 0).double(),
        attn_mask=torch.arange(start + rows)[None] <= torch.from_numpy(positions)[:, None],
        scale=1.0,
    )
    np.testing.assert_allclose(out, wanted.transpose(0, 1).flatten(1).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_keys_and_values_go_to_their_places(loops: Kernels, normed: bool, turned: bool) -> None:
    heads, kv_heads, dim, rows, eps = 4, 2, 8, 3, np.float32(0.3)
    qkv = _floats(7, rows, (heads + 2 * kv_heads) * dim)
    given_ = qkv.reshape(rows, -1, dim).astype(np.float64)
    keys, values = np.zeros((2, kv_heads, dim, 10), np.float32), np.zeros((2, kv_heads, 10, dim), np.float32)
    norms = _floats(8, 2, dim) if normed else np.empty((2, 0), np.float32)
    angles = np.arange(10)[:, None] * _floats(9, dim // 2)
    cos, sin = (
        turn(angles).astype(np.float32) if turned else np.empty((0, 0), np.float32) for turn in (np.cos, np.sin)
    )
    slots, positions = np.array([0, 0, 1], np.int32), np.array([3, 4, 9], np.int32)
    loops.place(qkv, norms[0], norms[1], eps, cos, sin, slots, positions, keys, values, heads)
    both = given_[:, : heads + kv_heads]
    if normed:
        both = both / np.sqrt((both**2).sum(-1, keepdims=True) + eps)
        both = both * np.repeat(norms, [heads, kv_heads], 0)
    if turned:
        left, right = np.split(both, 2, -1)
        c, s = cos[positions][:, None], sin[positions][:, None]
        both = np.concatenate((left * c - right * s, right * c + left * s), -1)
    near = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(qkv.reshape(rows, -1, dim)[:, :heads], both[:, :heads], **near)
    for row in range(rows):
        np.testing.assert_allclose(keys[slots[row], :, :, positions[row]], both[row, heads:], **near)
        assert np.array_equal(values[slots[row], :, positions[row]], given_[row, heads + kv_heads :].astype(np.float32))
    assert np.count_nonzero(values) == rows * kv_heads * dim


def test_exponentials_are_near_those_of_numpy(loops: Kernels) -> None:
    """Seen through attention over two keys, whose weights are a sigmoid of the difference of their scores."""
    for difference in np.linspace(0, 30, 61):
        keys = np.zeros((1, 1, 4, 16), np.float32)
        keys[0, 0, 0, 1] = difference
        values = np.zeros((1, 1, 16, 4), np.float32)
        values[0, 0, 0] = 1
        out = np.empty((1, 4), np.float32)
        query, one = np.array([[1, 0, 0, 0]], np.float32), np.array([1], np.int32)
        loops.attend(query, 0 * one, one, np.array([0, 1], np.int32), keys, values, 1, out)
        wanted = 1 / (1 + math.exp(np.float32(difference)))
        assert out[0, 0] == pytest.approx(wanted, rel=8 * ULP)

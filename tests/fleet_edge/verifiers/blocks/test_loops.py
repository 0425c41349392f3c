from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from fleet_edge.verifiers.blocks.geometry import Activation
from fleet_edge.verifiers.blocks.kv import PAGE
from fleet_edge.verifiers.blocks.loops import Loops, loops
from fleet_edge.verifiers.blocks.products import Inputs

Doubles = npt.NDArray[np.float64]


@pytest.fixture(params=[False, True], ids=["one thread", "threads"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Loops:
    monkeypatch.setattr("fleet_edge.verifiers.blocks.loops._SMALL_SIZE", 0)  # so that threads divide few rows as well
    return loops(parallel=request.param)


def _floats(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _numbers(inputs: Inputs) -> Doubles:
    assert (inputs.sums == inputs.values.reshape(*inputs.sums.shape, 32).sum(2)).all()
    return inputs.values.astype(np.float64) * np.repeat(inputs.scales, 32, axis=1)


def _close(found: Inputs, wanted: Doubles) -> None:
    blocks = np.abs(wanted).reshape(len(wanted), -1, 32).max(2)
    assert (np.abs(_numbers(found) - wanted) <= np.repeat(0.501 * blocks / 127, 32, axis=1)).all()


def test_rows_are_added_normalized_and_quantized(compiled: Loops) -> None:
    x, more, weight, eps = 5 * _floats(1, 7, 96), _floats(2, 7, 128), _floats(3, 96), np.float32(0.1)
    wanted = (x + more[:, :96]).astype(np.float64)
    found = Inputs.empty(7, 96)
    compiled.normalize(x, more, weight, eps, found.values, found.scales, found.sums)
    assert np.array_equal(x, wanted.astype(np.float32))
    _close(found, wanted / np.sqrt((wanted**2).mean(1, keepdims=True) + eps) * weight)


@pytest.mark.parametrize("activation", Activation)
def test_gate_and_up_are_multiplied(compiled: Loops, activation: Activation) -> None:
    both = 3 * _floats(3, 5, 2 * 64 + 32)
    both[0, :64] = np.linspace(-100, 100, 64)  # where exponentials would overflow
    gate, up = both[:, :64].astype(np.float64), both[:, 64:128].astype(np.float64)
    inner = 1.5957691216 * (gate + 0.044715 * gate**3) if activation is Activation.GELU else gate
    if activation is Activation.CLAMPED:
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        inner = 1.702 * gate
    found = Inputs.empty(5, 64)
    compiled.gate(both, 64, int(activation), found.values, found.scales, found.sums)
    wanted = gate / (1 + np.exp(np.minimum(-inner, 700))) * up
    _close(found, wanted if activation.has_gate else np.maximum(gate, 0) ** 2)


@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize(("shared", "dim"), [(1, 64), (3, 64), (7, 128), (2, 24)])
def test_attention_is_that_of_the_definition(compiled: Loops, shared: int, dim: int, window: int) -> None:
    _check_attention(compiled, shared=shared, dim=dim, window=window)


@pytest.mark.parametrize("change", [{"cap": 2.0}, {"sinks": True}, {"values_normalized": True}, {"has_values": False}])
def test_attention_of_other_kinds_is_that_of_the_definition(compiled: Loops, change: dict[str, Any]) -> None:
    _check_attention(compiled, shared=2, dim=64, window=70, **change)


def _check_attention(
    compiled: Loops,
    *,
    shared: int,
    dim: int,
    window: int,
    cap: float = 0.0,
    sinks: bool = False,
    values_normalized: bool = False,
    has_values: bool = True,
) -> None:
    kv_heads, layers, layer = 2, 2, 1
    heads, length, new = kv_heads * shared, 2 * PAGE + 9, 5
    keys = np.zeros((4, layers, kv_heads, dim, PAGE), np.uint16)
    values = np.zeros((4, layers, kv_heads, PAGE, dim), np.uint16)
    tables, positions = np.array([[2, 0, 3]], np.int32), np.arange(length, dtype=np.int32)
    qkv = 2 * _floats(7, length, (heads + (1 + has_values) * kv_heads) * dim)
    given = qkv.astype(np.float64).reshape(length, -1, dim)
    none, no_turns = np.empty(0, np.float32), np.empty((length, 0), np.float32)
    where = (tables, np.zeros(length, np.int32), positions)
    scale = np.float32(dim**-0.5)
    first_value = heads + has_values * kv_heads
    compiled.place(
        qkv, none, none, values_normalized, np.float32(0), scale, no_turns, no_turns, *where,
        layer, keys, values, heads, kv_heads, first_value * dim,
    )  # fmt: skip
    of_values = given[:, first_value : first_value + kv_heads]
    if values_normalized:
        of_values = of_values / np.sqrt((of_values**2).mean(2, keepdims=True))
    rows = slice(length - new, length)
    out = np.empty((new, heads * dim), np.float32)
    part = (tables, np.zeros(new, np.int32), positions[rows], np.array([0, new], np.int32))
    sink = np.linspace(-1, 3, heads).astype(np.float32) if sinks else np.full(heads, -np.inf, np.float32)
    compiled.attend(qkv[rows].copy(), *part, window, np.float32(cap), sink, layer, keys, values, shared, out)
    for row, position in enumerate(range(length)[rows]):
        seen = slice(max(0, position - window + 1) if window else 0, position + 1)
        for head in range(heads):
            scores = given[seen, heads + head // shared] @ given[position, head] * dim**-0.5
            scores = cap * np.tanh(scores / cap) if cap else scores
            weights = np.exp(scores - scores.max())
            total = weights.sum() + np.exp(sink[head] - scores.max())
            wanted = weights @ of_values[seen, head // shared] / total
            assert np.abs(out[row, head * dim : head * dim + dim] - wanted).max() < 0.02  # float16 keys and values


def test_rows_go_to_the_experts_with_the_largest_logits(compiled: Loops) -> None:
    experts, used, hidden = 10, 3, 96
    x, norm, router = _floats(1, 13, hidden), _floats(2, hidden), _floats(3, hidden, 16)
    bias, factors, eps = _floats(4, 16), np.abs(_floats(5, experts)), np.float32(0.1)
    logits = np.empty((13, 16), np.float32)
    compiled.route(x, norm, router, bias, eps, logits)
    normal = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + eps) * norm
    assert np.abs(logits - (normal @ router + bias)).max() < 1e-4
    chosen, places, shares = np.empty((13, used), np.int32), np.empty((13, used), np.int32), np.empty((13, used), "f4")
    normalized = False
    compiled.choose(logits, factors, normalized, chosen, shares)
    weights = np.exp(logits[:, :experts].astype(np.float64))
    weights /= weights.sum(1, keepdims=True)
    for row in range(13):
        wanted = sorted(np.argsort(-logits[row, :experts])[:used])
        assert chosen[row].tolist() == wanted
        assert np.allclose(shares[row], weights[row, wanted] * factors[wanted], rtol=1e-5)
    starts, rows = np.empty(experts + 1, np.int32), np.empty(13 * used, np.int32)
    compiled.sort(chosen, starts, rows, places)
    of_places = np.repeat(np.arange(experts), np.diff(starts))
    assert (of_places[places] == chosen).all()
    assert (rows[places] == np.arange(13)[:, None]).all()
    found, total = _floats(6, 13 * used, hidden), np.empty((13, hidden), np.float32)
    compiled.combine(found, places, shares, total)
    assert np.allclose(total, (found[places] * shares[:, :, None]).sum(1), atol=1e-5)
    more = _floats(7, 13, hidden)
    compiled.add_gated(total, more, logits, 15)
    gate = 1 / (1 + np.exp(-logits[:, 15:]))
    assert np.allclose(total, (found[places] * shares[:, :, None]).sum(1) + more * gate, atol=1e-5)


def test_large_numbers_are_bound(compiled: Loops) -> None:
    x = np.array([[-1e30, -70, -1, 0, 1e-3, 5, 70, 1e30]], np.float32)
    wanted = 30 * np.tanh(x.astype(np.float64) / 30)
    compiled.bound(x, np.float32(30))
    assert np.abs(x - wanted).max() < 1e-5


def test_a_small_loop_leaves_the_number_of_threads_as_it_was() -> None:
    found = Inputs.empty(1, 32)
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    loops(parallel=True).quantize(_floats(1, 1, 32), found.values, found.scales, found.sums)
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS

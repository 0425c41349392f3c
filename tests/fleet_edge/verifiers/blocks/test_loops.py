import numpy as np
import numpy.typing as npt
import pytest

from fleet_edge.verifiers.blocks.kv import PAGE
from fleet_edge.verifiers.blocks.loops import Loops, loops
from fleet_edge.verifiers.blocks.products import Inputs

Doubles = npt.NDArray[np.float64]


@pytest.fixture(params=[False, True], ids=["one thread", "threads"])
def compiled(request: pytest.FixtureRequest) -> Loops:
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


@pytest.mark.parametrize("gelu", [False, True])
def test_gate_and_up_are_multiplied(compiled: Loops, gelu: bool) -> None:
    both = 3 * _floats(3, 5, 2 * 64 + 32)
    both[0, :64] = np.linspace(-100, 100, 64)  # where exponentials would overflow
    gate, up = both[:, :64].astype(np.float64), both[:, 64:128].astype(np.float64)
    inner = 1.5957691216 * (gate + 0.044715 * gate**3) if gelu else gate
    found = Inputs.empty(5, 64)
    compiled.gate(both, 64, gelu, found.values, found.scales, found.sums)
    _close(found, gate / (1 + np.exp(np.minimum(-inner, 700))) * up)


@pytest.mark.parametrize("window", [0, 5, 70])
@pytest.mark.parametrize(("shared", "dim"), [(1, 64), (3, 64), (7, 128), (2, 24)])
def test_attention_is_that_of_the_definition(compiled: Loops, shared: int, dim: int, window: int) -> None:
    kv_heads, layers, layer = 2, 2, 1
    heads, length, new = kv_heads * shared, 2 * PAGE + 9, 5
    keys = np.zeros((4, layers, kv_heads, dim, PAGE), np.uint16)
    values = np.zeros((4, layers, kv_heads, PAGE, dim), np.uint16)
    tables, positions = np.array([[2, 0, 3]], np.int32), np.arange(length, dtype=np.int32)
    qkv = 2 * _floats(7, length, (heads + 2 * kv_heads) * dim)
    given = qkv.astype(np.float64).reshape(length, -1, dim)
    none, no_turns = np.empty(0, np.float32), np.empty((length, 0), np.float32)
    where = (tables, np.zeros(length, np.int32), positions)
    scale = np.float32(dim**-0.5)
    compiled.place(qkv, none, none, scale, scale, no_turns, no_turns, *where, layer, keys, values, heads)
    rows = slice(length - new, length)
    out = np.empty((new, heads * dim), np.float32)
    part = (tables, np.zeros(new, np.int32), positions[rows], np.array([0, new], np.int32))
    compiled.attend(qkv[rows].copy(), *part, window, layer, keys, values, shared, out)
    for row, position in enumerate(range(length)[rows]):
        seen = slice(max(0, position - window + 1) if window else 0, position + 1)
        for head in range(heads):
            own = heads + head // shared
            scores = given[seen, own] @ given[position, head] * dim**-0.5
            weights = np.exp(scores - scores.max())
            wanted = weights @ given[seen, own + kv_heads] / weights.sum()
            assert np.abs(out[row, head * dim : head * dim + dim] - wanted).max() < 0.02  # float16 keys and values

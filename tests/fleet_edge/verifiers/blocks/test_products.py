import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, strategies as st

from fleet_edge.verifiers.blocks.compiler import processor_features
from fleet_edge.verifiers.blocks.layout import EIGHT, FOUR, FOUR_WITH_MINIMUMS, NON_LINEAR
from fleet_edge.verifiers.blocks.products import PORTABLE, Inputs, multiply, multiply_experts, variants
from fleet_edge.verifiers.blocks.weights import Weights, pack

KINDS = {
    "4 bits": FOUR,
    "4 bits with minimums": FOUR_WITH_MINIMUMS,
    "4 bits by a table": NON_LINEAR,
    "8 bits": EIGHT,
}
FAST = [name for name in variants() if name != PORTABLE]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = numba.get_num_threads()  # perhaps fewer than there are: a model has set them
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("This machine has one processor.")
    numba.set_num_threads(request.param)
    yield
    numba.set_num_threads(before)


def _inputs(rng: np.random.Generator, rows: int, width: int, *, extreme: bool = False) -> Inputs:
    values = rng.integers(-127, 128, (rows, width), dtype=np.int8)
    if extreme:
        values = np.where(values < 0, -127, 127).astype(np.int8)
    scales = rng.uniform(1e-4, 0.1, (rows, width // 32)).astype(np.float32)
    return Inputs(values, scales, values.reshape(rows, -1, 32).sum(2, dtype=np.int32))


def _case(
    rng: np.random.Generator, kind: str, outputs: int, width: int, *, extreme: bool = False
) -> tuple[Weights, npt.NDArray[np.float64]]:
    """Return a random weight, and its numbers as float64."""
    wanted = KINDS[kind]
    bits, with_minimums = wanted.bits, wanted.minimums
    values = rng.integers(0, 1 << bits, (outputs, width)).astype(np.uint8)
    if extreme:
        values = np.where(values < 1 << bits - 1, 0, (1 << bits) - 1).astype(np.uint8)
    shape = (outputs, width // 32)
    scales = rng.uniform(-0.01, 0.01, shape).astype(np.float16)
    scales[0, 0] = np.float16(1e-7)  # a subnormal number
    minimums = rng.uniform(-0.05, 0.05, shape).astype(np.float16) if with_minimums else None
    meant = np.array(wanted.table, np.uint8)[values] if wanted.table else values
    numbers = (meant.astype(np.float64) - wanted.zero).reshape(*shape, 32)
    numbers *= scales[..., None]
    if minimums is not None:
        numbers += minimums[..., None]
    return replace(pack(values, scales, minimums, bits), format=wanted), numbers.reshape(outputs, width)


def _product(
    weights: Weights, inputs: Inputs, variant: str, bias: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    out = np.full((len(inputs.values), weights.padded_outputs), np.nan, np.float32)
    multiply(weights, inputs, bias, out, variant=variant)
    return out[:, : weights.outputs]


def _cut(inputs: Inputs, rows: slice) -> Inputs:
    return Inputs(inputs.values[rows], inputs.scales[rows], inputs.sums[rows])


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("kind", KINDS)
@given(
    rows=st.integers(1, 14),
    blocks=st.integers(1, 9),
    outputs=st.integers(1, 100),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_those_of_the_numbers(
    variant: str, kind: str, rows: int, blocks: int, outputs: int, extreme: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights, numbers = _case(rng, kind, outputs, 32 * blocks, extreme=extreme)
    inputs = _inputs(rng, rows, 32 * blocks, extreme=extreme)
    bias = rng.standard_normal(outputs).astype(np.float32)
    x = inputs.values * np.repeat(inputs.scales.astype(np.float64), 32, axis=1)
    wanted = x @ numbers.T + bias
    allowed = 1e-6 * (np.abs(x) @ np.abs(numbers).T + np.abs(bias))
    assert np.all(np.abs(_product(weights, inputs, variant, bias) - wanted) <= allowed)


@pytest.mark.parametrize("variant", FAST)
@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 50), blocks=st.integers(1, 9), extreme=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_every_kernel_gives_the_bits_of_the_portable_one(
    variant: str, kind: str, rows: int, blocks: int, extreme: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights, _ = _case(rng, kind, 70, 32 * blocks, extreme=extreme)
    inputs = _inputs(rng, rows, 32 * blocks, extreme=extreme)
    wanted = _product(weights, inputs, PORTABLE)
    assert np.array_equal(_product(weights, inputs, variant).view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_rows_do_not_depend_on_those_computed_with_them(variant: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    weights, _ = _case(rng, kind, 130, 32 * 40)
    inputs = _inputs(rng, 81, 32 * 40)
    together = _product(weights, inputs, variant)
    for size in (1, 2, 3, 5, 6, 7, 16, 20, 33, 80):
        for begin in range(0, 81, size):
            part = slice(begin, min(begin + size, 81))
            found = _product(weights, _cut(inputs, part), variant)
            assert np.array_equal(found.view(np.int32), together[part].view(np.int32)), (size, begin)


def test_products_can_lie_side_by_side() -> None:
    rng = np.random.default_rng(6)
    inputs = _inputs(rng, 3, 64)
    left, right = _case(rng, "4 bits", 32, 64)[0], _case(rng, "8 bits", 50, 64)[0]
    out = np.zeros((3, 32 + 64), np.float32)
    multiply(left, inputs, None, out)
    multiply(right, inputs, None, out, 32)
    assert np.array_equal(out[:, :32], _product(left, inputs, PORTABLE))
    assert np.array_equal(out[:, 32:82], _product(right, inputs, PORTABLE))


def test_a_factor_multiplies_all_scales() -> None:
    rng = np.random.default_rng(7)
    weights, _ = _case(rng, "4 bits with minimums", 32, 96)
    inputs = _inputs(rng, 2, 96)
    smaller = Weights(weights.tiles, weights.outputs, weights.inputs, weights.format, factor=2.0**-9)
    for variant in variants():
        assert np.array_equal(
            _product(smaller, inputs, variant), _product(weights, inputs, variant) * np.float32(2.0**-9)
        )


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("threads")
def test_rows_meet_the_weights_of_their_experts(variant: str, kind: str) -> None:
    rng = np.random.default_rng(10)
    experts, outputs, width = 5, 64, 96
    weights, _ = _case(rng, kind, experts * outputs, width)
    inputs, bias = _inputs(rng, 9, width), rng.random(experts * outputs).astype(np.float32)
    counts = [3, 0, 1, 13, 0]
    starts = np.cumsum([0, *counts]).astype(np.int32)
    rows = rng.integers(0, 9, starts[-1]).astype(np.int32)
    for given_bias in (bias, None):
        out = np.full((len(rows), outputs + 32), np.nan, np.float32)
        multiply_experts(weights, inputs, rows, starts, given_bias, out, 32, variant=variant)
        whole = _product(weights, inputs, PORTABLE, given_bias)
        for expert, (first, after) in enumerate(pairwise(starts)):
            wanted = whole[rows[first:after], expert * outputs : (expert + 1) * outputs]
            assert np.array_equal(out[first:after, 32:], wanted)
        assert np.isnan(out[:, :32]).all()


def test_kernels_for_another_processor_are_refused() -> None:
    other = "dotprod" if "avx2" in variants() else "avx2"
    weights, _ = _case(np.random.default_rng(8), "4 bits", 32, 32)
    with pytest.raises(ValueError, match=other):
        multiply(weights, _inputs(np.random.default_rng(8), 1, 32), None, np.empty((1, 32), np.float32), variant=other)


LIMITED = """
import sys
from pathlib import Path
import numpy as np
from fleet_edge.verifiers.blocks.products import Inputs, multiply, variants
from fleet_edge.verifiers.blocks.weights import pack
rng = np.random.default_rng(9)
out = np.empty((7, 64), np.float32)
for bits in (4, 8):
    weights = pack(rng.integers(0, 1 << bits, (64, 96)).astype(np.uint8), rng.random((64, 3)), None, bits)
    values = rng.integers(-127, 128, (7, 96)).astype(np.int8)
    sums = values.reshape(7, 3, 32).sum(2, dtype=np.int32)
    multiply(weights, Inputs(values, rng.random((7, 3)).astype(np.float32), sums), None, out)
    sys.stdout.write(out.tobytes().hex())
print("", *variants())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        pytest.param("+sse4.2", [PORTABLE], marks=pytest.mark.exhaustive),
        ("+sse4.2,+avx2,+fma,+f16c", ["avx2", PORTABLE]),
        ("+sse4.2,+avx2,+fma,+f16c,+avxvnni", ["avxvnni", "avx2", PORTABLE]),
    ],
)
def test_a_processor_with_fewer_features_takes_other_kernels_with_the_same_bits(
    features: str, wanted: list[str]
) -> None:
    if lacking := {name.removeprefix("+") for name in features.split(",")} - processor_features():
        pytest.skip(f"This processor has no {', '.join(sorted(lacking))}.")

    def run(**limits: str) -> list[str]:
        command = [sys.executable, "-c", LIMITED]
        return subprocess.run(
            command, env=os.environ | limits, capture_output=True, text=True, check=True
        ).stdout.split()

    numbers, *chosen = run(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features)
    assert chosen == wanted
    assert numbers == run()[0]

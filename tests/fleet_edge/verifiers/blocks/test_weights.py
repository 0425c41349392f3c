from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.quants import dequantize

from fleet_edge.verifiers.blocks.layout import EIGHT, FLOATS_OF_FOUR, FOUR, FOUR_WITH_MINIMUMS, NON_LINEAR
from fleet_edge.verifiers.blocks.weights import Weights, pack, pack_floats, pack_gguf, rows

KIND = gguf.GGMLQuantizationType
SAME = {KIND.Q4_0: FOUR, KIND.Q4_1: FOUR_WITH_MINIMUMS, KIND.Q8_0: EIGHT, KIND.IQ4_NL: NON_LINEAR}
REQUANTIZED = [KIND.Q5_K, KIND.Q6_K, KIND.F16, KIND.BF16, KIND.F32, KIND.Q5_0]
SCALES = {
    **dict.fromkeys((KIND.Q4_0, KIND.Q8_0, KIND.Q5_0, KIND.IQ4_NL, KIND.IQ4_XS), (0,)),
    **dict.fromkeys((KIND.Q4_1, KIND.Q4_K, KIND.Q5_K), (0, 2)),
    KIND.Q6_K: (208,),
}


def _raw(kind: gguf.GGMLQuantizationType, outputs: int, inputs: int) -> npt.NDArray[np.uint8]:
    """Return random rows of a tensor: any bytes for the values, scales of a usual size."""
    rng = np.random.default_rng(int(kind))
    numbers = rng.standard_normal((outputs, inputs)).astype(np.float32) / 50
    if kind == KIND.F32:
        return numbers.view(np.uint8)
    if kind == KIND.F16:
        return numbers.astype(np.float16).view(np.uint8)
    if kind == KIND.BF16:
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (outputs, inputs // block, size), dtype=np.uint8)
    for place in SCALES.get(kind, ()):
        scales = rng.uniform(1e-5, 1e-3, (outputs, inputs // block, 1)).astype(np.float16)
        raw[:, :, place : place + 2] = scales.view(np.uint8)
    return raw.reshape(outputs, -1)


def _numbers(weights: Weights) -> npt.NDArray[np.float32]:
    return rows(weights, range(weights.outputs))


@pytest.mark.parametrize("kind", SAME)
def test_blocks_of_the_same_format_keep_their_numbers(kind: gguf.GGMLQuantizationType) -> None:
    raw = _raw(kind, 77, 320)
    weights = pack_gguf(raw, kind, 320)
    assert weights.format == SAME[kind]
    assert (weights.outputs, weights.inputs, weights.padded_outputs) == (77, 320, 96)
    # gguf rounds the product and the sum, here they are rounded once.
    assert np.allclose(_numbers(weights), dequantize(raw, kind), rtol=2**-22, atol=1e-9)


def test_scales_of_k_quants_are_rounded_to_half_precision() -> None:
    raw = _raw(KIND.Q4_K, 40, 768)
    weights = pack_gguf(raw, KIND.Q4_K, 768)
    assert weights.format == FOUR_WITH_MINIMUMS
    wanted = dequantize(raw, KIND.Q4_K)
    # A scale is 11 bits exact, and so is a minimum; a value is up to 15 scales, minus the minimum.
    allowed = 2.0**-11 * (np.abs(wanted) + 2 * 63 * 1e-3)
    assert np.all(np.abs(_numbers(weights) - wanted) <= allowed)


def test_scales_of_mxfp4_are_exact_and_those_of_iq4_xs_are_rounded_to_half_precision() -> None:
    raw = _raw(KIND.MXFP4, 40, 96).reshape(40, 3, 17)
    raw[..., 0] = np.random.default_rng(4).integers(105, 128, (40, 3))
    weights = pack_gguf(raw.reshape(40, -1), KIND.MXFP4, 96)
    assert weights.format == FLOATS_OF_FOUR
    assert np.array_equal(_numbers(weights), dequantize(raw.reshape(40, -1), KIND.MXFP4))
    raw = _raw(KIND.IQ4_XS, 40, 512)
    weights = pack_gguf(raw, KIND.IQ4_XS, 512)
    assert weights.format == NON_LINEAR
    assert np.allclose(_numbers(weights), dequantize(raw, KIND.IQ4_XS), rtol=2**-11, atol=0)


def test_a_scale_of_mxfp4_that_is_no_number_is_refused() -> None:
    raw = _raw(KIND.MXFP4, 32, 32)
    raw[5, 0] = 255
    with pytest.raises(ValueError, match="weights"):
        pack_gguf(raw, KIND.MXFP4, 32)


@pytest.mark.parametrize("kind", REQUANTIZED)
def test_other_kinds_become_eight_bits(kind: gguf.GGMLQuantizationType) -> None:
    raw = _raw(kind, 50, 512)
    weights = pack_gguf(raw, kind, 512)
    assert weights.format == EIGHT
    wanted = dequantize(raw, kind) if kind != KIND.F32 else raw.view(np.float32)
    steps = np.abs(wanted.reshape(50, -1, 32)).max(2) / 127
    error = np.abs(_numbers(weights) - wanted).reshape(50, -1, 32).max(2)
    assert np.all(error <= 0.51 * steps + 127 * 2.0**-12 * steps)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("bits", [4, 8])
def test_floats_are_quantized(bits: int, dtype: type) -> None:
    numbers = np.random.default_rng(1).standard_normal((50, 96)).astype(np.float32)
    numbers[0, :32] = 0
    if dtype is np.uint16:
        given = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        numbers = (given.astype(np.uint32) << 16).view(np.float32)
    else:
        given = numbers.astype(dtype)
        numbers = given.astype(np.float32)
    weights = pack_floats(given, bits)
    assert weights.format == (EIGHT if bits == 8 else FOUR)
    steps = np.abs(numbers.reshape(50, -1, 32)).max(2) / (127 if bits == 8 else 8)
    error = np.abs(_numbers(weights) - numbers).reshape(50, -1, 32).max(2)
    # With 4 bits the side without an eighth step may be as long as the other.
    assert np.all(error <= (0.55 if bits == 8 else 1.01) * steps)
    assert np.all(error[0, 0] == 0)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1, 1e4, 1e7])
def test_weights_of_any_size_keep_their_precision(size: float) -> None:
    numbers = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32) * np.float32(size)
    found = _numbers(pack_floats(numbers, 8))
    assert np.sqrt(((found - numbers) ** 2).mean() / (numbers**2).mean()) < 0.006


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30])
def test_numbers_that_no_scale_reaches_are_refused(wrong: float) -> None:
    numbers = np.ones((32, 64), np.float32)
    numbers[7, 40] = wrong
    with pytest.raises(ValueError, match="weights"):
        pack_floats(numbers, 8)


def test_scales_that_are_no_numbers_are_refused() -> None:
    raw = _raw(KIND.Q4_K, 32, 256)
    raw[5, 2:4] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="weights"):
        pack_gguf(raw, KIND.Q4_K, 256)


@pytest.mark.parametrize(("bits", "minimums"), [(4, False), (4, True), (8, False)])
def test_packed_values_are_found_again(bits: int, minimums: bool) -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(0, 1 << bits, (70, 96)).astype(np.uint8)
    scales = rng.uniform(-1, 1, (70, 3)).astype(np.float16)
    least = rng.uniform(-1, 1, (70, 3)).astype(np.float16) if minimums else None
    wanted = (values.reshape(70, 3, 32) - (0.0 if minimums else 2.0 ** (bits - 1))) * scales.astype(float)[..., None]
    wanted += 0 if least is None else least.astype(float)[..., None]
    weights = pack(values, scales, least, bits)
    assert np.allclose(_numbers(weights), wanted.reshape(70, 96), rtol=1e-6, atol=1e-6)
    assert np.array_equal(rows(weights, [69, 3, 69]), _numbers(weights)[[69, 3, 69]])
    assert weights.tiles.ctypes.data % 64 == 0


def test_tensors_can_be_packed_in_threads() -> None:
    kinds = [KIND.Q4_K, KIND.Q4_0, KIND.Q6_K, KIND.F32] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda kind: pack_gguf(_raw(kind, 64, 1024), kind, 1024), kinds))
    for kind, weights in zip(kinds, found, strict=True):
        assert np.array_equal(weights.tiles, pack_gguf(_raw(kind, 64, 1024), kind, 1024).tiles)

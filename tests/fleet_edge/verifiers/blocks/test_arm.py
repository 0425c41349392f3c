"""Kernels for ARM run in an emulator, and give the bits of the portable one."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from fleet_edge.verifiers.blocks import kernels
from fleet_edge.verifiers.blocks.compiler import arm_features
from fleet_edge.verifiers.blocks.emitter import PREPARED
from fleet_edge.verifiers.blocks.layout import EIGHT, FOUR, FOUR_WITH_MINIMUMS, NON_LINEAR, Format
from fleet_edge.verifiers.blocks.products import PORTABLE, Inputs, _prepare, multiply
from fleet_edge.verifiers.blocks.weights import pack

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
KINDS = {
    "4 bits": FOUR,
    "4 bits with minimums": FOUR_WITH_MINIMUMS,
    "4 bits by a table": NON_LINEAR,
    "8 bits": EIGHT,
}


@pytest.fixture(scope="module", params=["dotprod", "i8mm"])
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize(
    ("cores", "wanted"),
    [
        (["fp asimd aes"], set()),
        (["fp asimd asimddp", "fp asimd asimddp i8mm"], {"dotprod"}),
        (["fp asimd asimddp i8mm bf16"] * 4, {"dotprod", "i8mm"}),
        ([], set()),
    ],
)
def test_features_of_all_cores_count(cores: list[str], wanted: set[str]) -> None:
    lines = [f"processor\t: {number}\nFeatures\t: {features}\n" for number, features in enumerate(cores)]
    assert arm_features("\n".join(lines)) == wanted


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"It needs {' and '.join(MISSING)} (gcc-aarch64-linux-gnu, qemu-user).")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kernels_for_arm_give_the_bits_of_the_portable_one(tmp_path: Path, variant: str, kind: Format) -> None:
    rng = np.random.default_rng(8)
    given, wanted = [], []
    most = kernels.PROCESSORS[variant].rows
    for rows in [*range(1, most + 1)] * 3:
        extreme, blocks = len(given) >= 2 * most, int(rng.integers(1, 20))
        values = rng.integers(0, 1 << kind.bits, (32, blocks * 32)).astype(np.uint8)
        x = rng.integers(-127, 128, (rows, blocks * 32)).astype(np.int8)
        if extreme:
            values, x = np.full_like(values, (1 << kind.bits) - 1), np.where(x < 0, -127, 127).astype(np.int8)
        scales, minimums = (rng.uniform(-1, 1, (2, 32, blocks)) / 100).astype(np.float16)
        packed = pack(values, scales, minimums if kind.minimums else None, kind.bits)
        weights = replace(packed, format=kind)
        factors = rng.uniform(1e-4, 1, (rows, blocks)).astype(np.float32)
        inputs = Inputs(x, factors, x.reshape(rows, blocks, 32).sum(2, dtype=np.int32))
        bias = rng.standard_normal(32).astype(np.float32)
        prepared = np.empty(rows * blocks * PREPARED, np.int32)
        _prepare(x.view(np.int32), inputs.scales, inputs.sums, (kind.zero, np.float32(1)), most, prepared)
        head = np.array([rows, blocks, weights.nbytes], np.int64)
        given.append(b"".join(array.tobytes() for array in (head, weights.tiles, prepared, bias)))
        out = np.empty((rows, 32), np.float32)
        multiply(weights, inputs, bias, out, variant=PORTABLE)
        wanted.append(out.tobytes())
    program = _program(tmp_path, variant, kind)
    found = subprocess.run(
        [EMULATOR, "-cpu", "max", program], input=b"".join(given), capture_output=True, check=True
    ).stdout
    assert found == b"".join(wanted)


def _program(folder: Path, variant: str, kind: Format) -> Path:
    """Build a program of the kernels for all numbers of rows."""
    objects, program = folder / "kernels.o", folder / "program"
    parsed = llvm.parse_assembly(str(kernels.module(variant, kind)))
    objects.write_bytes(kernels.machine(variant).emit_object(parsed))
    names = ", ".join(kernels.name_of(rows) for rows in range(1, kernels.PROCESSORS[variant].rows + 1))
    source = Path(__file__).with_name("run_kernel.c")
    subprocess.run([COMPILER, "-static", f"-DKERNELS={names}", "-o", program, source, objects], check=True)
    return program

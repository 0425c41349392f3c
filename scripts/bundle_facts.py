#!/usr/bin/env python3
"""What a machine needs to install a bundle, as JSON on standard output.

bundle-facts WHEELS ARCHIVE FLAGS

WHEELS is the folder of its wheels, ARCHIVE what is sent, FLAGS a file with the processor's features that llama.cpp was
compiled for, if it was compiled for one processor.
"""

import hashlib
import json
import platform
import re
import sys
import zipfile
from pathlib import Path
from typing import Final

# Features that ggml has kernels for; a processor that lacks a compiled one kills the program (SIGILL).
KERNELS: Final = frozenset(
    [
        "avx",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512vbmi",
        "avx512_vnni",
        "avx512_bf16",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "bmi2",
        "f16c",
        "fma",
        "sse4_2",
        "ssse3",
        "asimd",
        "asimddp",
        "asimdhp",
        "fphp",
        "i8mm",
        "sve",
        "sve2",
        "sme",
    ]
)


def main(wheels: Path, archive: Path, flags: Path) -> None:
    found = sorted(wheels.glob("*.whl"))
    features = set(flags.read_text().split()) & KERNELS if flags.exists() and _has_llama(found) else set()
    facts = {
        "architecture": platform.machine(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "glibc": ".".join(map(str, max(_glibc(path.name) for path in found))),
        "features": sorted(features),
        "bytes": archive.stat().st_size,
        "installed_bytes": sum(_unpacked(path) for path in found),
        "sha256": _digest(archive),
    }
    print(json.dumps(facts, indent=2))


def _has_llama(wheels: list[Path]) -> bool:
    return any(path.name.startswith("llama_cpp_python-") for path in wheels)


def _unpacked(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as opened:
        return sum(info.file_size for info in opened.infolist())


def _glibc(wheel: str) -> tuple[int, int]:
    """Return the oldest glibc that a wheel runs with: its tag, or this machine's if it was compiled here."""
    tags = wheel.removesuffix(".whl").rpartition("-")[2]
    if tags == "any":
        return (0, 0)
    versions = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)", tags)]
    if "manylinux2014" in tags:
        versions.append((2, 17))
    if versions or not wheel.startswith("llama_cpp_python-"):
        return min(versions, default=(0, 0))
    major, _, minor = platform.libc_ver()[1].partition(".")
    return (int(major or 0), int(minor or 0))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))

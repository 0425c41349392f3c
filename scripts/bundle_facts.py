#!/usr/bin/env python3
"""What a machine needs to install a bundle, as JSON on standard output.

bundle-facts WHEELS ARCHIVE

WHEELS is the folder of its wheels, ARCHIVE what is sent.
"""

import hashlib
import json
import platform
import re
import sys
import zipfile
from pathlib import Path


def main(wheels: Path, archive: Path) -> None:
    found = sorted(wheels.glob("*.whl"))
    facts = {
        "architecture": platform.machine(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "glibc": ".".join(map(str, max(map(_glibc, found)))),
        "bytes": archive.stat().st_size,
        "installed_bytes": sum(_unpacked(path) for path in found),
        "sha256": _digest(archive),
    }
    print(json.dumps(facts, indent=2))


def _unpacked(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as opened:
        return sum(info.file_size for info in opened.infolist())


def _glibc(wheel: Path) -> tuple[int, int]:
    """Return the oldest glibc that a wheel runs with: by its tag, or by the symbols that its libraries need."""
    tags = wheel.stem.rpartition("-")[2]
    versions = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)", tags)]
    if "manylinux2014" in tags:
        versions.append((2, 17))
    if tags == "any" or versions:
        return min(versions, default=(0, 0))
    with zipfile.ZipFile(wheel) as opened:
        libraries = [opened.read(name) for name in opened.namelist() if re.search(r"\.so(\.|$)", name)]
    needed = [each for library in libraries for each in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)]
    return max(((int(major), int(minor)) for major, minor in needed), default=(0, 0))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))

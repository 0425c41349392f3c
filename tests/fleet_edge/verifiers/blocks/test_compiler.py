"""The cache of compiled loops."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMPILE = """
from fleet_edge.verifiers.blocks.portable import from_half
assert from_half(0x3C00) == 1
print(sum(from_half.stats.cache_hits.values()))
"""


def _hits(cache: Path) -> int:
    """Return how many functions a new process read from the cache."""
    environment = os.environ | {"CACHE_DIRECTORY": str(cache)}
    return int(subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, check=True).stdout)


def _folder(cache: Path) -> Path:
    (folder,) = (cache / "blocks").iterdir()
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that a process has filled."""
    cache = tmp_path_factory.mktemp("compiled")
    assert _hits(cache) == 0
    return cache


@pytest.fixture
def cache(tmp_path: Path, compiled: Path) -> Path:
    return shutil.copytree(compiled, tmp_path / "cache")


def test_a_second_process_compiles_nothing(cache: Path) -> None:
    assert _hits(cache) == 1
    assert _folder(cache).stat().st_mode & 0o777 == 0o700


def test_code_of_other_sources_is_not_taken(cache: Path) -> None:
    _folder(cache).rename(cache / "blocks" / ("0" * 16))
    assert _hits(cache) == 0


def test_code_that_was_not_read_for_a_month_is_deleted(tmp_path: Path) -> None:
    for name, days in (("old", 31), ("recent", 29)):
        folder = tmp_path / "blocks" / name
        (folder / "serial").mkdir(parents=True)
        used = time.time() - 86_400 * days
        os.utime(folder, (used, used))
    _hits(tmp_path)
    assert {path.name for path in (tmp_path / "blocks").iterdir()} > {"recent"}
    assert not (tmp_path / "blocks" / "old").exists()


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_damaged_code_is_compiled_again(cache: Path, suffix: str) -> None:
    for path in _folder(cache).rglob(f"*.{suffix}"):
        path.write_bytes(path.read_bytes()[:-9])
    assert [_hits(cache), _hits(cache)] == [0, 1]


def test_code_that_others_can_write_is_not_executed(cache: Path) -> None:
    _folder(cache).chmod(0o770)
    assert _hits(cache) == 0


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "blocks").write_text("a file")
    assert _hits(tmp_path) == 0

"""The cache of compiled loops."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet_edge.verifiers.blocks.compiler import _Folder

COMPILE = """
from fleet_edge.verifiers.blocks.portable import from_half
assert from_half(0x3C00) == 1
print(sum(from_half.stats.cache_hits.values()))
"""


def _start(cache: Path) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"CACHE_DIRECTORY": str(cache)}
    return subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, check=True)


def _hits(cache: Path) -> int:
    """Return how many functions a new process read from the cache."""
    return int(_start(cache).stdout)


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


def _cut(content: bytes) -> bytes:
    return content[:-9]


def _flip(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _empty(content: bytes) -> bytes:
    del content
    return b""


@pytest.mark.parametrize("damage", [_cut, _flip, _empty])
def test_damaged_code_is_reported_and_compiled_again(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    (path,) = _folder(cache).iterdir()
    path.write_bytes(damage(path.read_bytes()))
    result = _start(cache)
    assert (int(result.stdout), path.name in result.stderr.decode()) == (0, True)
    assert _hits(cache) == 1


def test_every_flipped_bit_of_a_file_is_noticed(tmp_path: Path) -> None:
    folder = _Folder(tmp_path, os.open(tmp_path, os.O_RDONLY))
    folder.write("code", b"compiled")
    whole = (tmp_path / "code").read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "code").write_bytes(damaged)
        assert folder.read("code") is None
        assert not (tmp_path / "code").exists()
    os.close(folder.descriptor)


def test_code_that_others_can_write_is_not_executed(cache: Path) -> None:
    _folder(cache).chmod(0o770)
    assert _hits(cache) == 0


def test_a_link_in_place_of_the_folder_is_not_followed(cache: Path) -> None:
    folder = _folder(cache)
    folder.rename(cache / "elsewhere")
    folder.symlink_to(cache / "elsewhere")
    assert _hits(cache) == 0


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "blocks").write_text("a file")
    assert _hits(tmp_path) == 0

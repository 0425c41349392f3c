"""Mapped files: what is given back is no longer resident, and reads the same."""

import mmap
from pathlib import Path

import pytest

from fleet_common.llama import mapping
from fleet_common.llama.mapping import give_back_mapped

SIZE = 8 << 20


def resident_kib(path: Path) -> int:
    """Return how much of a mapped file this process holds."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(each.split()[1]) for each in lines if each.startswith("Rss:"))
    raise AssertionError("not mapped")


def test_the_pages_go_and_what_they_hold_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[::4096]
        assert resident_kib(path) > SIZE >> 11
        assert give_back_mapped(path) == SIZE
        assert resident_kib(path) < SIZE >> 14
        assert mapped[1000:1003] == bytes((232, 233, 234))
    assert give_back_mapped(path) == 0


def test_what_may_be_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = 1
        assert give_back_mapped(path) == 0
        assert mapped[0] == 1


def test_where_the_system_tells_nothing_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_MAPS", tmp_path / "none")
    assert give_back_mapped(tmp_path / "weights") == 0

from pathlib import Path

import pytest

from fleet_common.available_memory import available_memory

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    return tmp_path


def group(root: Path, name: str, limit: str, *, used: int = 0, cached: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file {cached}\ninactive_file {cached}\n")


def test_without_control_groups_it_is_what_the_machine_has(root: Path) -> None:
    assert available_memory(root) == 8 * GIB
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    assert available_memory(root) == 8 * GIB


def test_the_tightest_group_counts_and_pages_of_files_count_as_free(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    group(root, "a/b", "max")
    assert available_memory(root) == 8 * GIB
    group(root, "a", str(4 * GIB), used=3 * GIB, cached=GIB // 2)
    assert available_memory(root) == 2 * GIB
    group(root, "a/b", str(2 * GIB), used=GIB)
    assert available_memory(root) == GIB


def test_a_group_that_is_full_leaves_nothing(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/a\n")
    group(root, "a", str(GIB), used=GIB + 1)
    assert available_memory(root) == 0


def test_where_the_system_says_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert (available_memory() or 0) > 0

from collections.abc import Callable
from pathlib import Path

import pytest

from fleet_edge.verifiers.source import weights_digest

LARGE = 40 << 20
TENSOR = 64 << 10  # bytes; a change of less may be missed in a file of this size


def sparse_file(path: Path, size: int = LARGE) -> Path:
    with path.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(size)
    return path


def change(path: Path, begin: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(b"\x01" * length)


@pytest.mark.parametrize("begin", [0, 1 << 20, LARGE // 3, LARGE - TENSOR])
def test_a_changed_tensor_changes_the_hash_of_a_large_file(begin: int, tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a.gguf")
    before = weights_digest(path)
    change(path, begin, TENSOR)
    assert weights_digest(path) != before


def test_a_byte_changes_the_hash_of_a_small_file(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a.gguf", 17 << 20)
    before = weights_digest(path)
    change(path, (17 << 20) - 1, 1)
    assert weights_digest(path) != before


def test_name_and_time_do_not_matter_and_the_size_does(tmp_path: Path) -> None:
    one, other, longer = (sparse_file(tmp_path / name, size) for name, size in (("a", 99), ("b", 99), ("c", 100)))
    assert weights_digest(one) == weights_digest(other) != weights_digest(longer)


@pytest.mark.parametrize(
    "touch",
    [
        lambda folder: change(folder / "config.json", 0, 1),
        lambda folder: change(folder / "model-2.safetensors", 5, 1),
        lambda folder: sparse_file(folder / "model-3.safetensors", 9),
    ],
    ids=["config", "weights", "another file"],
)
def test_a_folder_counts_with_its_configuration_and_all_weights(
    touch: Callable[[Path], object], tmp_path: Path
) -> None:
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        sparse_file(tmp_path / name, 9)
    before = weights_digest(tmp_path)
    sparse_file(tmp_path / "README.md", 9)
    assert weights_digest(tmp_path) == before
    touch(tmp_path)
    assert weights_digest(tmp_path) != before


def test_all_parts_of_a_split_file_count(tmp_path: Path) -> None:
    first, second = (sparse_file(tmp_path / f"big-0000{number}-of-00002.gguf", 9) for number in (1, 2))
    before = weights_digest(first)
    change(second, 5, 1)
    assert weights_digest(first) != before

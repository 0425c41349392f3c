from pathlib import Path

import pytest
from pydantic import BaseModel

from fleet_common.cache import cache_folder, read_cache, write_cache


class Found(BaseModel):
    number: int = 0


def test_what_was_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.json"
    for number in (1, 2):
        write_cache(file, Found(number=number))
        assert read_cache(file, Found) == Found(number=number)
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"number": "many"}', b"\xff\x00", b" " * (1 << 21)])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "found.json"
    file.write_bytes(damage)
    assert read_cache(file, Found) is None


def test_no_file_and_a_folder_in_its_place_count_as_none(tmp_path: Path) -> None:
    assert read_cache(tmp_path / "found.json", Found) is None
    assert read_cache(tmp_path, Found) is None


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.mkdir()
    with pytest.raises(OSError, match="director"):
        write_cache(file, Found())
    assert list(tmp_path.iterdir()) == [file]


def test_the_folder_is_systemd_s_then_xdg_s_then_the_home_s() -> None:
    assert cache_folder({"CACHE_DIRECTORY": "/var/cache/a:/b", "XDG_CACHE_HOME": "/c"}) == Path("/var/cache/a")
    assert cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/dssd-fleet")
    for ignored in ("", "relative"):
        assert cache_folder({"XDG_CACHE_HOME": ignored}) == Path.home() / ".cache/dssd-fleet"


def test_a_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder({}) is None

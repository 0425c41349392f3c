import os
import stat
import threading
from pathlib import Path

import pytest

from fleet_common.identity.files import (
    LARGEST_FILE,
    IdentityError,
    make_folder,
    read_bounded,
    write_atomically,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("wanted", [0o600, 0o644])
def test_a_file_has_the_mode_asked_for_whatever_the_umask(tmp_path: Path, umask: int, wanted: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"content", mode=wanted)
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == wanted
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", mode=0o600)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match="space"):
        write_atomically(path, b"new", mode=0o600)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", set[bytes]()
    contents = {bytes([letter]) * 50_000 for letter in b"abc"}
    write_atomically(path, b"a" * 50_000, mode=0o600)
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            seen.add(path.read_bytes())

    thread = threading.Thread(target=read)
    thread.start()
    for content in [*contents] * 20:
        write_atomically(path, content, mode=0o600)
    ended.set()
    thread.join()
    assert seen <= contents


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "huge").write_bytes(bytes(LARGEST_FILE + 1))
    with pytest.raises(IdentityError):
        read_bounded(tmp_path / "huge", "The key")


def test_a_folder_in_which_others_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(IdentityError):
        make_folder(tmp_path / "open")

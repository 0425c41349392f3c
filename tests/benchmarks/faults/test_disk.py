import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.disk import Disk

WRITE = """
import sys
for line in sys.stdin:
    try:
        with open(line.strip(), "wb", buffering=0) as file:
            file.write(bytes(8192))
        print("written", flush=True)
    except OSError:
        print("no room", flush=True)
"""


@pytest.mark.parametrize("user", ["root", "another"])
def test_a_full_disk_has_no_room_until_it_is_freed(user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if user == "another":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = [sys.executable, "-c", WRITE]
    with (
        Disk(tmp_path / "disk") as disk,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer,
    ):
        assert writer.stdin is not None
        assert writer.stdout is not None

        def write() -> str:
            assert writer.stdin is not None
            assert writer.stdout is not None
            writer.stdin.write(f"{disk.folder / 'file'}\n")
            writer.stdin.flush()
            return writer.stdout.readline().strip()

        said = [write()]
        for change in (disk.fill, disk.free):
            (disk.folder / "file").unlink(missing_ok=True)
            change(writer.pid)
            said.append(write())
        writer.stdin.close()
    assert said == ["written", "no room", "written"]
    assert disk.how

"""Disk of an edge's session log and spool that can be filled, without filling anybody else's."""

import contextlib
import os
import resource
import subprocess
from pathlib import Path
from typing import Final, Self

_BYTES: Final = 64 << 20
_CHUNK: Final = 64 << 10


class Disk:
    """A small file system in memory where we may mount one; else a folder, and a limit on the edge's files.

    Attributes:
        folder: What is kept there.
        how: In which way it is filled, for the report.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.how = ""
        self._mounted = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            command = ["/bin/mount", "-t", "tmpfs", "-o", f"size={_BYTES}", "fleet-bench", str(self.folder)]
            with contextlib.suppress(OSError):
                self._mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
        self.how = "a tmpfs is filled" if self._mounted else "RLIMIT_FSIZE of the edge is 0"
        return self

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            subprocess.run(["/bin/umount", "--lazy", str(self.folder)], check=False)

    def fill(self, pid: int) -> None:
        """Leave no room for a process."""
        if not self._mounted:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            return
        chunk = bytes(_CHUNK)
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while file.write(chunk):
                pass

    def free(self, pid: int) -> None:
        if not self._mounted:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
            return
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

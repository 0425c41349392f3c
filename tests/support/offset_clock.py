"""Wall clock with an offset from a file, for programs under test in other processes."""

import contextlib
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

VARIABLE: Final = "FLEET_TESTING_CLOCK"
"""Environment variable that names the file."""


class OffsetClock:
    def __init__(self, file: Path | None) -> None:
        self._file = file

    @classmethod
    def from_environment(cls) -> Self:
        name = os.environ.get(VARIABLE)
        return cls(Path(name) if name else None)

    def __call__(self) -> datetime:
        offset_s = 0.0
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):
                offset_s = float(self._file.read_text(encoding="ascii"))
        return datetime.now(UTC) + timedelta(seconds=offset_s)

    def set(self, offset_s: float) -> None:
        assert self._file is not None
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(offset_s), encoding="ascii")
        fresh.replace(self._file)

"""Offset clock: a wall clock that is wrong by what a file says, for programs under test in processes of their own."""

import contextlib
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

VARIABLE: Final = "FLEET_TESTING_CLOCK"
"""Environment variable that names the file."""


class OffsetClock:
    """The wall clock (UTC), and what is to be added to it."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    @classmethod
    def from_environment(cls) -> Self:
        """Return the clock that `VARIABLE` asks for."""
        name = os.environ.get(VARIABLE)
        return cls(Path(name) if name else None)

    def __call__(self) -> datetime:
        """Return the time."""
        offset_s = 0.0
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):
                offset_s = float(self._file.read_text(encoding="ascii"))
        return datetime.now(UTC) + timedelta(seconds=offset_s)

    def set(self, offset_s: float) -> None:
        """Make all clocks on the same file wrong by so many seconds."""
        assert self._file is not None
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(offset_s), encoding="ascii")
        fresh.replace(self._file)

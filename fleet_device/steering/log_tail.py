"""Log tail: the last lines that a device has logged, kept in memory, for its administrator."""

import logging
from collections import deque
from typing import Final

from schemas.printable import printable_line

__all__ = ["MOST_LINES", "LogTail"]

MOST_LINES: Final = 1000
_LONGEST: Final = 500  # characters of a line


class LogTail(logging.Handler):
    """Keeps what is logged. Tokens and texts are never logged, so that none are here."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, line by line."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - as logging itself does: a bad record ends nothing
            self.handleError(record)
            return
        for line in text.splitlines():
            self._lines.append(printable_line(line)[:_LONGEST])

    def lines(self, number: int) -> list[str]:
        """Return the last lines, the oldest first."""
        return list(self._lines.copy())[-number:] if number > 0 else []

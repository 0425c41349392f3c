"""Log as JSON: one object a line, for a collector that reads fields where people read sentences.

Every line has `time`, `level`, `logger` and `message`, what the program is (`device`, or `edge` and `fleet`), and what
the record itself is about: `session`, `device`, and at a session's end its figures. What else a record may hold is left
out: a field is written because it stands in the list here, so that no secret gets into a log by accident.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from fleet_common.terminal import json_text

FIELDS: Final = ("session", "device", "edge", "reason", "code", "tokens", "accepted", "tested", "rounds", "resumes")
"""What a record may tell beside its message (`extra`), if it is a text or a number."""

_LONGEST: Final = 8000
"""Characters of a message or of a traceback: a collector cuts longer lines, and then they are no JSON."""


class JsonFormatter(logging.Formatter):
    """Makes a line of a record.

    Args:
        program: What every line says of the program.
    """

    def __init__(self, program: Mapping[str, str]) -> None:
        super().__init__()
        self._program = dict(program)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON, whatever its message holds."""
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record)[:_LONGEST],
            **self._program,
        }
        for name in FIELDS:
            value = record.__dict__.get(name)
            if isinstance(value, str | int | float):
                line[name] = value[:_LONGEST] if isinstance(value, str) else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-_LONGEST:]
        # A lone surrogate is valid in JSON as an escape, and nowhere else.
        return json_text(line).encode("utf-8", "backslashreplace").decode()


def write_log_as(log_format: str, **program: str) -> None:
    """Have the root logger's streams write their lines so; as JSON they tell what is below a warning, too.

    Args:
        log_format: `json`, or `plain`, which changes nothing.
        program: What every line says of the program.
    """
    if log_format != "json":
        return
    root = logging.getLogger()
    root.setLevel(min(root.level, logging.INFO))
    for handler in root.handlers:
        # Not on a subclass: a handler that was made to collect records has a form of its own.
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(JsonFormatter(program))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return f"{record.msg!r} with arguments that do not fit"

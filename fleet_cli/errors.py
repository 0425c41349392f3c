"""Errors and exit codes of the command line."""

from enum import IntEnum

from schemas.errors import FleetError


class ExitCode(IntEnum):
    """With what a command ends; docs/operations.md lists them.

    Attributes:
        DONE: It did what it was asked.
        CHECK_FAILED: What it was to check is not as it should be.
        USER_ERROR: It could not do what it was asked, and its last sentence says what to do.
        INTERRUPTED: By Ctrl-C.
        READER_GONE: Whoever read its output has closed the pipe.
    """

    DONE = 0
    CHECK_FAILED = 1
    USER_ERROR = 2
    INTERRUPTED = 130
    READER_GONE = 141


class CommandError(FleetError):
    """A command cannot do what it was asked. Its text is one sentence for the user."""

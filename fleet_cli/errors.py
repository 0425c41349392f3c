"""Errors and exit codes of the command line."""

from enum import IntEnum

from schemas.errors import FleetError


class ExitCode(IntEnum):
    """Exit codes of commands; docs/operations.md lists them."""

    DONE = 0
    CHECK_FAILED = 1  # what was checked is not as it should be
    USER_ERROR = 2  # the last sentence on standard error says what to do
    INTERRUPTED = 130  # by Ctrl-C
    READER_GONE = 141  # the reader of standard output has closed the pipe


class CommandError(FleetError):
    """A command cannot be executed."""

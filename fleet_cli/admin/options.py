"""Options that the commands of `fleet admin` share, and the session log that they open."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from fleet_cli.errors import CommandError
from fleet_common.validation import read_time

if TYPE_CHECKING:
    from fleet_edge.session_log import SessionLog

Database = Annotated[
    str, typer.Option("--db", envvar="FLEET_DB", help="sqlite:///PATH or postgresql://USER@HOST/NAME.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON rather than tables.")]
Wide = Annotated[bool, typer.Option("--wide", help="All columns, however wide the terminal is.")]
Since = Annotated[str | None, typer.Option(help="Opened since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")]
DEFAULT_DB = "sqlite:///fleet.sqlite3"


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Turn a package that is not installed into a sentence.

    Args:
        name: The extra that brings it.

    Raises:
        CommandError: It is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra {name!r}: "
            f"pip install 'dssd-fleet[{name}]'"
        ) from error


def time_of(option: str, text: str | None) -> datetime | None:
    """Read the time that an option gives.

    Raises:
        CommandError: It is none.
    """
    if text is None:
        return None
    try:
        return read_time(text, now=datetime.now(UTC))
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from error


def open_log(url: str) -> "SessionLog":
    """Open the database; all that goes wrong with it becomes one sentence, which `fleet` prints."""
    try:
        from fleet_edge.session_log import SessionLog
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra 'admin'."
        ) from error
    return SessionLog(url)

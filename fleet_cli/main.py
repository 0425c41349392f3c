"""The `fleet` command: every failure that a user can cause ends in one sentence each and exit code 2."""

import atexit
import gc
import logging
import signal
import sys
from functools import cache
from typing import Annotated, Any

import typer
import typer.main

from fleet_cli.commands import ExitCode, add_groups, not_installed
from schemas.errors import FleetError
from schemas.names import VERSION
from schemas.printable import printable


class _Formatter(logging.Formatter):
    """Prevents a quoted message from controlling the terminal, or from looking like another record."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n    ")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(VERSION)
        raise typer.Exit


def global_options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens to standard error.")] = False,
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    logging.getLogger("apscheduler").setLevel(logging.WARNING)  # it logs every job


@cache
def command_line(group: str | None) -> Any:  # noqa: ANN401 - a class that Typer keeps to itself
    app = typer.Typer(
        name="fleet",
        help="Fleets of small devices that generate with the quality of a large language model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(global_options)
    add_groups(app, group)
    return typer.main.get_command(app)


def main() -> None:
    """Run the command as a process of its own.

    What it imports stays until its end. Looking for garbage there takes a quarter of the processor time of an edge's
    restart: while modules are imported, and again when Python ends.
    """
    gc.disable()
    atexit.register(gc.freeze)
    # A shell without job control starts background commands with SIGINT ignored; the demo stops its children with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def run() -> None:
    """Run the command that `sys.argv` names."""
    try:
        try:
            command = command_line(next((word for word in sys.argv[1:] if not word.startswith("-")), None))
            if not gc.isenabled():
                gc.freeze()
                gc.enable()
            command()
        except ModuleNotFoundError as error:
            raise not_installed(error, sys.argv[1:]) from error
    except KeyboardInterrupt:
        raise SystemExit(ExitCode.INTERRUPTED) from None
    except FleetError as error:
        for line in printable(str(error)).splitlines():
            typer.echo(f"fleet: {line}", err=True)
        raise SystemExit(ExitCode.USER_ERROR) from None


if __name__ == "__main__":
    main()

"""Command table: each group of commands is imported only when it is used."""

import importlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

import typer

from fleet_common.extras import install_command
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


@dataclass(frozen=True, slots=True)
class CommandGroup:
    module: str  # with a Typer `app`
    extra: str  # with the packages that it imports
    summary: str


COMMANDS: Final = {
    "admin": CommandGroup("fleet_cli.admin", "admin", "Monitor and steer a fleet."),
    "broker": CommandGroup("fleet_cli.broker", "demo", "Set up the broker and the fleet's identities."),
    "demo": CommandGroup("fleet_cli.demo", "demo", "Run a whole fleet on this machine."),
    "device": CommandGroup("fleet_cli.device", "device", "Run a device, or generate one output."),
    "edge": CommandGroup("fleet_cli.edge", "edge", "Run an edge."),
    "models": CommandGroup("fleet_cli.models", "demo", "Check and try a pair of models."),
}


_OURS: Final = frozenset(
    {"fleet_admin", "broker_config", "sampling", "fleet_cli", "fleet_device", "fleet_edge", "fleet_common", "schemas"}
)


def add_groups(app: typer.Typer, wanted: str | None) -> None:
    """Add all groups, only one with its contents, so that a command imports nothing of the others."""
    for name, command in COMMANDS.items():
        group = importlib.import_module(command.module).app if name == wanted else _placeholder()
        app.add_typer(group, name=name, help=command.summary)


def not_installed(error: ModuleNotFoundError, arguments: Sequence[str]) -> CommandError:
    """Return an error that names the extra to install; a missing module of our own is raised as it is."""
    missing = (error.name or "").partition(".")[0]
    if missing in _OURS:
        raise error
    name = next((argument for argument in arguments if argument in COMMANDS), "")
    return CommandError(
        f"`fleet {name}` needs the package {missing!r}; install it with: "
        f"{install_command(COMMANDS[name].extra if name else 'demo')}"
    )


def program() -> str:
    """Return how a shell calls this program: `fleet` if it is on the PATH, else its path."""
    here, found = Path(sys.executable).parent / "fleet", shutil.which("fleet")
    if (found is not None and Path(found).resolve() == here.resolve()) or not here.is_file():
        return "fleet"
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def _placeholder() -> typer.Typer:
    group = typer.Typer()

    @group.callback()
    def _listed() -> None: ...

    return group

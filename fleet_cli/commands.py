"""Command table: each group is imported only when it is asked for; a device needs no edge, an edge no device."""

import importlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import typer

from fleet_cli.errors import CommandError


@dataclass(frozen=True, slots=True)
class Command:
    """A group of commands.

    Attributes:
        module: Has a Typer `app`.
        extra: Brings what it imports.
        summary: One line of help.
    """

    module: str
    extra: str
    summary: str


COMMANDS: Final = {
    "admin": Command("fleet_cli.admin", "admin", "See what a fleet does, and steer it."),
    "asyncapi": Command("fleet_cli.asyncapi", "dev", "Write the AsyncAPI document of all topics and messages."),
    "broker": Command("fleet_cli.broker", "demo", "Set up the broker and the fleet's identities."),
    "demo": Command("fleet_cli.demo.command", "demo", "Run a whole fleet on this machine."),
    "device": Command("fleet_cli.device", "device", "Run a device, or write one text with it."),
    "edge": Command("fleet_cli.edge", "edge", "Run an edge."),
    "models": Command("fleet_cli.models", "demo", "Prepare the small pair of models that the demo uses."),
}


_OURS: Final = frozenset(
    {
        "fleet_admin",
        "broker_config",
        "dssd",
        "fleet_cli",
        "fleet_device",
        "fleet_edge",
        "fleet_common",
        "schemas",
    }
)


def add_commands(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Add all commands, only the one that `arguments` call for with its contents.

    Raises:
        ModuleNotFoundError: What that one imports is not installed.
    """
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    app.registered_groups.clear()  # of a call before in the same process, as in tests
    for name, command in COMMANDS.items():
        group = importlib.import_module(command.module).app if name == wanted else _placeholder()
        app.add_typer(group, name=name, help=command.summary)


def not_installed(error: ModuleNotFoundError, arguments: Sequence[str]) -> CommandError:
    """Return which extra brings what a command could not import.

    Raises:
        ModuleNotFoundError: It is a module of our own.
    """
    missing = (error.name or "").partition(".")[0]
    if missing in _OURS:
        raise error
    name = next((argument for argument in arguments if argument in COMMANDS), "")
    return CommandError(
        f"`fleet {name}` needs the package {missing!r}; install it with: "
        f"pip install 'dssd-fleet[{COMMANDS[name].extra if name else 'demo'}]'"
    )


def program() -> str:
    """Return how a shell in this folder calls this program: `fleet` where that is on the PATH, else its path."""
    here, found = Path(sys.executable).parent / "fleet", shutil.which("fleet")
    if (found is not None and Path(found).resolve() == here.resolve()) or not here.is_file():
        return "fleet"
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def _placeholder() -> typer.Typer:
    group = typer.Typer()

    @group.callback()
    def _listed() -> None: ...

    return group

"""`fleet admin …`: what an administrator reads and does."""

import importlib
from typing import Final

import typer

app = typer.Typer(name="admin", help="See what a fleet does, and steer it.", no_args_is_help=True)

# Each has a function `register(app)` that adds its commands.
_PARTS: Final = (
    "log",
    "events",
    "machines",
    "usage",
    "rankings",
    "export",
    "fences",
    "alerts",
    "ghosts",
    "rollouts",
    "steering",
    "audit",
    "serve",
    "accounts",
    "backup",
)

for _part in _PARTS:
    importlib.import_module(f"{__name__}.{_part}").register(app)

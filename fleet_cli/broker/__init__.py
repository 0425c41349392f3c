"""`fleet broker …`: the broker's configuration and the fleet's identities."""

import importlib
from typing import Final

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

# Each has a function `register(app)` that adds its commands.
_PARTS: Final = ("render", "check", "init", "watch", "metrics", "identities")

for _part in _PARTS:
    importlib.import_module(f"{__name__}.{_part}").register(app)

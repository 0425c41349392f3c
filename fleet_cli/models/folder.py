"""The option --models-dir: the folder of the prepared models, for every command that needs it."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from fleet_cli.errors import CommandError

__all__ = ["ModelsDir"]

# The device's setting `models_dir`.
_VARIABLE: Final = "FLEET_DEVICE_MODELS_DIR"
_FORMER: Final = "FLEET_MODELS"


def _refuse_former_name(folder: Path) -> Path:
    if _FORMER in os.environ:
        raise CommandError(f"The environment variable {_FORMER} is called {_VARIABLE} now; rename it.")
    return folder


ModelsDir = Annotated[
    Path,
    typer.Option("--models-dir", envvar=_VARIABLE, callback=_refuse_former_name, help="Folder of the prepared models."),
]

"""The option --models-dir: the folder of the prepared models, for every command that needs it."""

from pathlib import Path
from typing import Annotated

import typer

ModelsDir = Annotated[
    Path,
    # The variable is that of the device's setting `models_dir`.
    typer.Option("--models-dir", envvar="FLEET_DEVICE_MODELS_DIR", help="Folder of the prepared models."),
]

"""The models that `fleet_admin.models.smollm2` makes, for tests that are marked `models`."""

import os
from pathlib import Path

from tests.support.needs import missing, require_marker

_FOLDER = Path(os.environ.get("FLEET_DEVICE_MODELS_DIR", "models")).absolute()


def prepared(name: str) -> Path:
    """Return a file or folder of the prepared model; skips the test without it, fails it in CI."""
    require_marker("models")
    path = _FOLDER / "smollm2-135m" / name
    if not path.exists():
        missing(f"{path} is not there; run: python -m fleet_admin.models.smollm2")
    return path

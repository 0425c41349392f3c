"""The models that `fleet models prepare` makes, for tests that are marked `models`."""

import os
from pathlib import Path

import pytest

from fleet_device.drafters.model_source import models_folder

__all__ = ["prepared"]

_FOLDER = models_folder().absolute()


def prepared(name: str) -> Path:
    """Return a file or folder of the prepared model; skips the test without it, fails it in CI."""
    path = _FOLDER / "smollm2-135m" / name
    if not path.exists():
        reason = f"{path} is not there; run 'fleet models prepare'"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path

"""A file of applications with one key that a test knows."""

import hashlib
from pathlib import Path

from fleet_device.applications import Application, ApplicationsFile


def keys_file(folder: Path, key: str = "sesame") -> Path:
    file = ApplicationsFile(folder / "keys.json")
    with file.changing() as applications:
        applications[:] = [Application(name="one", sha256=hashlib.sha256(key.encode()).hexdigest())]
    return file.path

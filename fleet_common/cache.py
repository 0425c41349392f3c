"""Cache files: what was found out once on this machine and may be lost, as JSON, replaced atomically.

They lie in the folder that systemd gives a service for it (`CACHE_DIRECTORY`), else in `$XDG_CACHE_HOME/dssd-fleet`,
else in `~/.cache/dssd-fleet`.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from fleet_common.folders import standard_folder

_MOST_BYTES: Final = 1 << 20

Content = TypeVar("Content", bound=BaseModel)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder of cache files, which need not exist; None for a user without a home."""
    return standard_folder(environment, service="CACHE_DIRECTORY", user="XDG_CACHE_HOME", default=".cache")


def read_cache(path: Path, content: type[Content]) -> Content | None:
    """Return what a cache file holds; None if there is none, or none that can be read.

    Args:
        path: The file.
        content: What it should hold.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError:
        return None
    if len(data) > _MOST_BYTES:
        return None
    try:
        return content.model_validate_json(data)
    except ValidationError:
        return None


def write_cache(path: Path, content: BaseModel) -> None:
    """Replace a cache file, its folder made if need be. Who reads meanwhile finds the old one or the new one, whole.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.model_dump_json(indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise

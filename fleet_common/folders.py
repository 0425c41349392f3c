"""Folders that the system gives a program: as systemd names them for a service, as XDG does for a user."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

_FOLDER: Final = "dssd-fleet"


def standard_folder(environment: Mapping[str, str], *, service: str, user: str, default: str) -> Path | None:
    """Return a folder, which need not exist; None for a user without a home.

    Args:
        environment: Of the process.
        service: The variable in which systemd names it.
        user: That in which a user may name what it is in (XDG).
        default: Below the home, what it is in otherwise.
    """
    given = environment.get(service, "").partition(":")[0]
    if given:
        return Path(given)
    base = environment.get(user, "")
    if base and Path(base).is_absolute():  # others are to be ignored, as the XDG specification says
        return Path(base) / _FOLDER
    try:
        return Path.home() / default / _FOLDER
    except RuntimeError:
        return None
